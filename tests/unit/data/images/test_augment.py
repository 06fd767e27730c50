"""timm's augmentation under our seeds."""

from __future__ import annotations

import io
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.batch import derive_seed
from pipeline.data.images.augment import POLICY, augment, erase
from pipeline.data.images.pixels import IMAGENET_MEAN, IMAGENET_STD
from pipeline.data.images.transforms import TrainImage

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 40, 3)).astype(np.uint8)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n2", "original"])
def test_the_seed_alone_decides(policy: str) -> None:
    random.seed(1)
    np.random.seed(1)
    expected = [augment(PICTURE, policy, seed, mean=IMAGENET_MEAN) for seed in range(6)]
    assert random.random() == random.Random(1).random(), "Python's generator is as it was"
    assert np.random.rand() == np.random.RandomState(1).rand(), "and NumPy's"
    random.seed(2)
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda seed: augment(PICTURE, policy, seed, mean=IMAGENET_MEAN), range(6)))
    assert all(np.array_equal(one, other) for one, other in zip(expected, again, strict=True))
    assert len({image.tobytes() for image in expected}) > 3


def test_it_is_timms_policy() -> None:
    """Under the same state of the generators, but for what Pillow refuses."""
    from timm.data.auto_augment import rand_augment_transform

    settings = {"translate_const": 14, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", settings)
    for seed in range(60):
        drawn = derive_seed("augment", seed)
        random.seed(drawn)
        np.random.seed(drawn % 2**32)
        try:
            expected = np.asarray(theirs(Image.fromarray(PICTURE)))
        except ValueError:
            continue
        assert np.array_equal(augment(PICTURE, "rand-m9-mstd0.5-inc1", seed, mean=IMAGENET_MEAN), expected)


def test_the_greatest_magnitude_posterizes_to_no_bits() -> None:
    """About one image in 700 under MAE's recipe, which would otherwise stop the loader."""
    found = [augment(PICTURE, "rand-m10-n8-inc1", seed, mean=IMAGENET_MEAN) for seed in range(60)]
    assert any(not image.any() for image in found)


def test_erasing_is_a_rectangle_of_noise_in_its_share_of_images() -> None:
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    erased = [erase(image, 0.25, seed, mean=IMAGENET_MEAN, std=IMAGENET_STD) for seed in range(800)]
    touched = [one for one in erased if one.any()]
    assert 160 < len(touched) < 240
    noise = []
    for one in touched:
        place = one.any(0)
        rows, columns = place.any(1).nonzero().flatten(), place.any(0).nonzero().flatten()
        box = one[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box > 0).float().mean() > 0.9, "a full rectangle"
        assert 0.01 < box[0].numel() / 64**2 < 0.36
        noise.append(box.flatten(1).float())
    mean = torch.cat(noise, 1).mean(1) / 255
    assert (mean - torch.tensor(IMAGENET_MEAN)).abs().max() < 0.02
    assert torch.equal(
        erase(image, 1.0, 5, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        erase(image, 1.0, 5, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    )


def test_training_images_are_augmented_then_erased() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "PNG")
    plain, both = TrainImage((16, 16)), TrainImage((16, 16), policy="rand-m9-mstd0.5-inc1", erase=1.0)
    expected = augment(plain(buffer.getvalue(), 3).permute(1, 2, 0).numpy(), both.policy, 3, mean=IMAGENET_MEAN)
    image = torch.from_numpy(expected.transpose(2, 0, 1).copy())
    assert torch.equal(both(buffer.getvalue(), 3), erase(image, 1.0, 3, mean=IMAGENET_MEAN, std=IMAGENET_STD))
    assert not torch.equal(both(buffer.getvalue(), 3), plain(buffer.getvalue(), 3))


@pytest.mark.parametrize(
    ("name", "known"),
    [("rand-m9-mstd0.5-inc1", True), ("rand", True), ("originalr", True), ("3a", True), ("randm9", False), ("", False)],
)
def test_names_of_policies(name: str, known: bool) -> None:
    assert bool(POLICY.fullmatch(name)) is known
    if known:
        augment(PICTURE, name, 0, mean=IMAGENET_MEAN)
