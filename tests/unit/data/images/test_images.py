"""Decoding: limits before pixels, every kind of image by rule, damage as UnreadableSample."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.images.decode import UnreadableSample, decode, read_header, scale_for_crop


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x * 255 // size[0], y * 255 // size[1], np.full_like(x, 90)], axis=2).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def closeness(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"quality": 95}), ("JPEG", {"progressive": True, "quality": 95}), ("PNG", {}), ("WEBP", {"quality": 95})],
)
def test_header_and_pixels_of_each_format(kind: str, options: dict) -> None:
    data = encoded(gradient(), kind, **options)
    assert read_header(data)[:3] == (kind.lower(), 64, 48)
    pixels = decode(data)
    assert pixels.shape == (48, 64, 3)
    assert pixels.dtype == np.uint8
    assert closeness(pixels, np.asarray(gradient())) < 3


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "I;16"])
def test_other_modes_become_rgb(mode: str) -> None:
    grey = np.asarray(gradient("L"))
    if mode == "I;16":
        image, expected = Image.fromarray(grey.astype(np.uint16) * 257), np.stack([grey] * 3, axis=2)
    else:
        image = gradient(mode)
        expected = np.asarray(image.convert("RGB"))
    pixels = decode(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert pixels.shape == (48, 64, 3)
    assert closeness(pixels, expected) < 4


def test_transparency_is_laid_over_white() -> None:
    image = gradient("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert (decode(encoded(image, "PNG")) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert (decode(encoded(palette, "PNG", transparency=0)) == 255).all()


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("min_size", "shape"), [((12, 16), (12, 16)), ((13, 16), (18, 24)), ((48, 64), (48, 64))])
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_jpegs_decode_at_the_smallest_scale_that_suffices(min_size, shape, mode: str) -> None:
    pixels = decode(encoded(gradient(mode), "JPEG"), min_size=min_size)
    if mode == "RGB":
        assert pixels.shape[:2] == shape
    assert pixels.shape[0] >= min_size[0]
    assert pixels.shape[1] >= min_size[1]


def test_scale_for_crop() -> None:
    assert scale_for_crop((100, 100), (50, 25)) == 0.5
    assert scale_for_crop((100, 100), (26, 25)) == 0.375
    assert scale_for_crop((100, 100), (51, 25)) == 1.0, "5/8 and more are slower than full size"
    assert scale_for_crop((40, 100), (50, 50)) == 1.0


def bomb() -> bytes:
    """A PNG whose header says a hundred thousand pixels square."""
    data = bytearray(encoded(gradient(), "PNG"))
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"<html>not found</html>", "no image"),
        (b"\xff\xd8 and nothing more", "damaged jpeg"),
        (encoded(gradient(), "JPEG")[:-200], "damaged jpeg"),
        (encoded(gradient(), "PNG")[:120], "damaged png"),
        (encoded(gradient(), "WEBP")[:-20], "damaged webp|no image"),
        (bomb(), "over any sensible size"),
    ],
)
def test_damage_is_named(data: bytes, message: str) -> None:
    with pytest.raises(UnreadableSample, match=message):
        decode(data)


def test_the_limit_holds_before_decoding() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        with pytest.raises(UnreadableSample, match="64x48 pixels are over the limit of 3000"):
            decode(encoded(gradient(), kind), max_pixels=3000)


@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP"]), at=st.floats(0, 1), value=st.integers(0, 255), cut=st.floats(0, 1)
)
@settings(deadline=None, max_examples=150)
def test_any_damage_is_an_unreadable_sample_at_worst(kind: str, at: float, value: int, cut: float) -> None:
    data = bytearray(encoded(gradient(), kind))
    data[int(at * (len(data) - 1))] = value
    try:
        pixels = decode(bytes(data[: int(cut * len(data))] if cut < 0.5 else data))
    except UnreadableSample:
        return
    assert pixels.ndim == 3
