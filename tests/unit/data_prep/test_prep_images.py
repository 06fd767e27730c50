import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.account import Refused
from data_prep.config import ImageConfig
from data_prep.samples.images import convert, plan_geometry
from tests.support.prep_cases import encoded, pixels


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference in grey levels of two images of one size."""
    assert a.size == b.size
    return float(np.abs(np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)).mean())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_comes_out_upright(orientation: int) -> None:
    upright = Image.fromarray(pixels(1))
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    turned = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = convert(saved(turned, "JPEG", quality=100, exif=exif), ImageConfig(resize="no", quality=100))
    assert stored.geometry.source == upright.size
    assert difference(opened(stored.data), upright) < 4
    assert opened(stored.data).getexif().get(0x0112, 1) == 1
    assert json.loads(stored.exif)["Orientation"] == str(orientation)


@pytest.mark.parametrize(("kind", "ending"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_what_would_not_change_passes_byte_for_byte(kind: str, ending: str) -> None:
    data = encoded(2, kind)
    stored = convert(data, ImageConfig(size=256, format="keep"))
    assert (stored.data, stored.extension) == (data, ending)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_images_are_resized_and_stored_in_the_format_asked_for(ending: Any) -> None:
    data = encoded(3, "PNG", width=360, height=240)
    stored = convert(data, ImageConfig(size=80, format=ending))
    assert stored.extension == ending
    result = opened(stored.data)
    assert result.size == (120, 80)
    reference = opened(data).resize((120, 80), Image.Resampling.BICUBIC)
    assert difference(result, reference) < 4


def test_scaled_jpeg_decoding_keeps_the_picture() -> None:
    data = encoded(4, "JPEG", width=1600, height=1200, quality=95)
    stored = convert(data, ImageConfig(size=120))
    assert difference(opened(stored.data), opened(data).resize((160, 120), Image.Resampling.BICUBIC)) < 2


@pytest.mark.parametrize(
    ("options", "size", "stored"),
    [
        ({"resize": "no"}, (300, 200), (300, 200)),
        ({"resize": "keep_ratio", "size": 100}, (300, 200), (150, 100)),
        ({"resize": "keep_ratio", "size": 100}, (200, 301), (100, 150)),
        ({"resize": "keep_ratio", "size": 400}, (300, 200), (300, 200)),
        ({"resize": "keep_ratio", "size": 400, "only_if_bigger": False}, (300, 200), (600, 400)),
        ({"resize": "center_crop", "size": 100}, (300, 200), (100, 100)),
        ({"resize": "center_crop", "size": 400}, (300, 200), (200, 200)),
        ({"resize": "center_crop", "size": 400, "only_if_bigger": False}, (300, 200), (400, 400)),
    ],
)
def test_resize_modes(options: dict[str, Any], size: tuple[int, int], stored: tuple[int, int]) -> None:
    geometry = plan_geometry(size, ImageConfig(**options))
    assert (geometry.width, geometry.height) == stored


def test_centre_crop_keeps_the_middle() -> None:
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (30, 0, 60, 30))
    stored = convert(saved(image, "PNG"), ImageConfig(resize="center_crop", size=30, format="png"))
    assert difference(opened(stored.data), Image.new("RGB", (30, 30), "blue")) == 0


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_pixel_format_becomes_plain_rgb_or_grey(mode: str) -> None:
    grey = Image.fromarray(pixels(5)).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    else:
        image = grey.convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    stored = convert(saved(image, kind), ImageConfig(resize="no", quality=100, format="keep"))
    assert opened(stored.data).mode in ("RGB", "L")
    assert difference(opened(stored.data), grey.convert(mode) if mode != "I;16" else grey) < 3


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    stored = convert(saved(clear, "PNG"), ImageConfig(format="png"))
    assert difference(opened(stored.data), Image.new("RGB", (20, 20), "white")) == 0


def test_of_an_animation_the_first_frame_is_stored() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        data = saved(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        stored = convert(data, ImageConfig(format="keep"))
        assert getattr(opened(stored.data), "n_frames", 1) == 1
        assert difference(opened(stored.data), frames[0]) < 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"<html>404</html>", "not_an_image"),
        (b"\xff\xd8\xff\xe0 broken", "image_damaged"),
        (encoded(6, "JPEG", 200, 200)[:2000], "image_damaged"),
        (encoded(6, "PNG", 200, 200)[:2000], "image_damaged"),
        (encoded(6, "WEBP", 200, 200)[:600], "image_damaged"),
        (encoded(6, "JPEG", 400, 10), "image_too_elongated"),
        (encoded(6, "JPEG", 9, 9), "image_too_small"),
    ],
)
def test_unusable_images_are_refused_with_their_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        convert(data, ImageConfig(min_side=10))
    assert refused.value.reason == reason


def test_the_size_limit_is_judged_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    import data_prep.samples.images

    monkeypatch.setattr(data_prep.samples.images, "decode", lambda *_: pytest.fail("decoded"))
    # Only the header of this PNG says 30,000 x 30,000; there are no pixels to decode.
    bomb = bytearray(encoded(7, "PNG"))
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(Refused) as refused:
        convert(bytes(bomb), ImageConfig())
    assert refused.value.reason == "image_too_large"
