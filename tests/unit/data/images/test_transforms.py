"""Transforms: driven by the seed alone, and equal in distribution to torchvision's."""

from __future__ import annotations

import io
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.batch import RawSample
from pipeline.data.images.decode import UnreadableSample
from pipeline.data.images.pixels import CLIP_MEAN, CLIP_STD, normalise
from pipeline.data.images.transforms import EvalImage, ImageExample, TrainImage
from pipeline.data.images.views import centre_crop, random_crop
from pipeline.data.reading.members import drawn_caption


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return buffer.getvalue()


def ramp(height: int, width: int) -> np.ndarray:
    """Red rises to the right, green downwards: a pixel tells where it came from."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 0 * x], axis=2).astype(np.uint8)


def letters(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[ord(c) for c in text.ljust(4)[:4]] for text in texts])


def sample(**members: bytes) -> RawSample:
    return RawSample(3, "key", members)


def test_crops_are_distributed_as_torchvisions() -> None:
    """Two-sample Kolmogorov-Smirnov statistics of area, aspect and place, below the 1e-4 threshold."""
    from scipy.stats import ks_2samp
    from torchvision.transforms.v2 import RandomResizedCrop

    for height, width in [(100, 140), (40, 300)]:
        reference = RandomResizedCrop(8, scale=(0.2, 1.0), antialias=True)
        torch.manual_seed(0)
        image = torch.empty(3, height, width)
        theirs = [reference.make_params([image]) for _ in range(3000)]
        boxes = [random_crop(height, width, (0.2, 1.0), (3 / 4, 4 / 3), random.Random(seed)) for seed in range(3000)]
        ours = [{"top": b.top, "left": b.left, "height": b.bottom - b.top, "width": b.right - b.left} for b in boxes]
        for figure in (
            lambda p: p["height"] * p["width"],
            lambda p: p["width"] / p["height"],
            lambda p: p["top"],
            lambda p: p["left"],
        ):
            assert ks_2samp([figure(p) for p in theirs], [figure(p) for p in ours]).pvalue > 1e-4


def test_impossible_ratios_fall_back_to_the_centre() -> None:
    assert random_crop(10, 1000, (0.9, 1.0), (3 / 4, 4 / 3), random.Random(0)) == (493, 0, 506, 10)
    assert random_crop(1000, 10, (0.9, 1.0), (3 / 4, 4 / 3), random.Random(0)) == (0, 493, 10, 506)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_training_image_is_the_crop_it_drew(kind: str) -> None:
    """On a ramp the mean colour is the crop's centre, whatever the scale a JPEG was decoded at."""
    data = encoded(ramp(256, 384), kind)
    for seed in range(20):
        image = TrainImage((64, 96), flip=False)(data, seed)
        assert image.shape == (3, 64, 96)
        box = random_crop(256, 384, (0.2, 1.0), (3 / 4, 4 / 3), random.Random(seed))
        red, green, _ = image.float().mean(dim=(1, 2)).tolist()
        assert red == pytest.approx(((box.left + box.right) / 2 - 0.5) * 255 / 383, abs=2)
        assert green == pytest.approx(((box.top + box.bottom) / 2 - 0.5) * 255 / 255, abs=2)


def test_scaled_decoding_changes_little() -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    source = np.asarray(Image.fromarray(colours).resize((480, 360), Image.Resampling.BICUBIC))
    for seed in range(10):
        small = TrainImage((112, 112))(encoded(source, "JPEG"), seed)
        exact = TrainImage((112, 112))(encoded(source, "PNG"), seed)
        assert (small.float() - exact.float()).abs().mean() < 2.5


def test_training_images_equal_torchvisions() -> None:
    """The same crop through torchvision's v2 functional on tensors: the same bytes; and Pillow's, but for rounding."""
    from torchvision.transforms import v2

    colours = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    source = np.asarray(Image.fromarray(colours).resize((160, 120), Image.Resampling.BICUBIC))
    tensor = torch.from_numpy(source.copy()).permute(2, 0, 1)
    for seed in range(10):
        draw = random.Random(seed)
        box = random_crop(120, 160, (0.2, 1.0), (3 / 4, 4 / 3), draw)
        mirror = draw.random() < 0.5
        place = [int(v) for v in (box.top, box.left, box.bottom - box.top, box.right - box.left)]
        mode = v2.InterpolationMode.BICUBIC
        theirs = v2.functional.resized_crop(tensor, *place, [48, 48], interpolation=mode, antialias=True)
        theirs = v2.functional.horizontal_flip(theirs) if mirror else theirs
        ours = TrainImage((48, 48))(encoded(source), seed)
        assert torch.equal(ours, theirs)
        pillow = v2.functional.resized_crop(Image.fromarray(source), *place, [48, 48], interpolation=mode)
        pillow = v2.functional.horizontal_flip(pillow) if mirror else pillow
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow)).max() <= 1


def test_several_crops_of_one_image_are_as_if_made_one_by_one() -> None:
    """Exactly so where the whole image is decoded; a JPEG is decoded at the scale that the largest need asks for."""
    transform = TrainImage((48, 48))
    data = encoded(ramp(64, 80))
    for crop, seed in zip(transform.several(data, [1, 2, 3]), [1, 2, 3], strict=True):
        assert torch.equal(crop, transform(data, seed))
    assert len(ImageExample(TrainImage((8, 8)), text=letters).several(sample(png=data, txt=b"ab"), [4, 5])) == 2


def test_one_of_several_captions_is_drawn_by_the_seed() -> None:
    members = {"txt": b"a", "json": b'{"captions": ["a", "b", "c"]}'}
    drawn = [drawn_caption(sample(**members), seed) for seed in range(600)]
    assert drawn == [drawn_caption(sample(**members), seed) for seed in range(600)]
    assert all(150 < drawn.count(text) < 250 for text in "abc")
    assert drawn_caption(sample(txt=b"a", json=b'{"url": "captions"}'), 0) == "a"
    for damaged in (b'{"captions": []}', b'{"captions": "x"}', b'{"captions": [1]}', b'{"captions"', b'["captions"]'):
        with pytest.raises(UnreadableSample):
            drawn_caption(sample(txt=b"a", json=damaged), 0)


def test_half_of_the_images_are_mirrored() -> None:
    data = encoded(ramp(32, 32))
    transform = TrainImage((8, 8), scale=(1, 1), ratio=(1, 1))
    mirrored = [bool(image[0, 0, 0] > image[0, 0, -1]) for image in (transform(data, seed) for seed in range(400))]
    assert 150 < sum(mirrored) < 250
    plain = TrainImage((8, 8), scale=(1, 1), ratio=(1, 1), flip=False)
    assert all(bool(plain(data, seed)[0, 0, 0] < 20) for seed in range(20))


def test_the_seed_alone_decides() -> None:
    data = encoded(ramp(64, 80), "JPEG")
    transform = TrainImage((16, 16))
    again = pickle.loads(pickle.dumps(transform))
    random.seed(1)
    torch.manual_seed(1)
    first = transform(data, 5)
    random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(first, again(data, 5))
    assert not torch.equal(first, transform(data, 6))


@pytest.mark.parametrize(
    ("shape", "size", "resize", "box"),
    [
        ((100, 200), (50, 50), None, (50, 0, 150, 100)),
        ((200, 100), (50, 50), 100, (25, 75, 75, 125)),
        ((100, 100), (50, 25), None, (25, 0, 75, 100)),
        ((100, 100), (80, 80), 40, (0, 0, 100, 100)),
    ],
)
def test_centre_crops(shape, size, resize, box) -> None:
    assert centre_crop(*shape, size, resize) == pytest.approx(box)


def test_eval_images_equal_torchvisions() -> None:
    from torchvision.transforms import v2

    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    source = np.asarray(Image.fromarray(colours).resize((160, 120), Image.Resampling.BICUBIC))
    reference = v2.Compose(
        [v2.Resize(60, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(48), v2.PILToTensor()]
    )
    ours = EvalImage((48, 48), resize=60)(encoded(source), 0)
    assert (ours.float() - reference(Image.fromarray(source)).float()).abs().mean() < 0.5
    assert torch.equal(EvalImage((120, 160))(encoded(source), 9), torch.from_numpy(source.copy()).permute(2, 0, 1))


def test_an_example_holds_what_was_asked_for() -> None:
    members = {"png": encoded(ramp(20, 20)), "txt": "añ".encode(), "cls": b"12\n"}
    full = ImageExample(EvalImage((8, 6)), label=True, text=letters)(sample(**members), 0)
    assert full.image is not None
    assert full.image.shape == (3, 8, 6)
    assert full.label == 12
    assert full.text is not None
    assert full.text.tolist() == [97, 241, 32, 32]
    bare = ImageExample(EvalImage((8, 6)))
    assert bare(sample(png=members["png"]), 0)[1:] == (None, None, None)
    assert pickle.loads(pickle.dumps(bare)) == bare


def test_a_blank_has_the_shapes_of_the_rest() -> None:
    transform = ImageExample(TrainImage((8, 6)), label=True, text=letters)
    blank = transform.blank()
    assert blank.image is not None
    assert blank.image.shape == (3, 8, 6)
    assert blank.text is not None
    assert blank.text.shape == (4,)
    assert blank.label == 0
    assert ImageExample(TrainImage((8, 6))).blank().text is None


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"txt": b"x", "cls": b"1"}, r"no image among its members \(cls, txt\)"),
        ({"jpg": b"", "txt": b"x", "cls": b"1"}, "an empty file"),
        ({"png": encoded(ramp(4, 4)), "cls": b"1"}, "no txt member"),
        ({"png": encoded(ramp(4, 4)), "txt": b"\xff", "cls": b"1"}, "no UTF-8"),
        ({"png": encoded(ramp(4, 4)), "txt": b"x"}, "no cls member"),
        ({"png": encoded(ramp(4, 4)), "txt": b"x", "cls": b"-1"}, "no class number"),
        ({"png": encoded(ramp(4, 4)), "txt": b"x", "cls": b"cat"}, "no class number"),
    ],
)
def test_missing_and_damaged_members_are_unreadable(members: dict, message: str) -> None:
    with pytest.raises(UnreadableSample, match=message):
        ImageExample(EvalImage((4, 4)), label=True, text=letters)(sample(**members), 0)


def test_normalise() -> None:
    images = torch.tensor([0, 255, 128], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    expected = (images.double() / 255 - torch.tensor(CLIP_MEAN).reshape(3, 1, 1)) / torch.tensor(CLIP_STD).reshape(
        3, 1, 1
    )
    result = normalise(images, CLIP_MEAN, CLIP_STD)
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), expected, atol=1e-6)
