"""timm's augmentation, driven by a sample's seed alone.

Legend: H W pixels.

timm draws from Python's and NumPy's global generators. Here these are seeded for the time of a call and put back
afterwards, one call at a time, so that neither other threads' samples nor what ran before change a sample.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.data.batch import derive_seed

POLICY = re.compile(r"rand(-(m|n|p|w|inc|mstd|mmax)\d+(\.\d+)?)*|(original|v0)r?|3a")
"""timm's names of RandAugment (`rand-m9-mstd0.5-inc1`) and AutoAugment (`original`, `v0`, `3a`) policies."""

_lock = threading.Lock()


def augment(
    image: UInt8[np.ndarray, "h w 3"], policy: str, seed: int, *, mean: tuple[float, float, float]
) -> UInt8[np.ndarray, "h w 3"]:
    """The image after a policy of timm's (see `POLICY`), with the settings of timm's training scripts.

    Args:
        mean: colour, in [0, 1], of what moves into the image from outside.
    """
    transform = _policy(policy, min(image.shape[:2]), mean)
    with _seeded(derive_seed("augment", seed)):
        return np.asarray(transform(Image.fromarray(image)))


def erase(
    image: UInt8[Tensor, "3 h w"],
    probability: float,
    seed: int,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> UInt8[Tensor, "3 h w"]:
    """Random erasing (Zhong et al. 2020): with `probability`, a rectangle of noise, as timm's mode `pixel`.

    The rectangle is timm's. The noise is N(mean, std) of each channel, rounded and clipped to what uint8 holds; timm
    writes N(0, 1) into normalised images.
    """
    canvas = torch.ones(image.shape)
    with _seeded(derive_seed("erase", seed)):
        _eraser(probability)(canvas)
    erased = canvas == 0
    if not erased.any():
        return image
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(derive_seed("erase_noise", seed)))
    scale, shift = (torch.tensor(values).view(3, 1, 1) * 255 for values in (std, mean))
    return torch.where(erased, (noise * scale + shift).round().clamp(0, 255).to(torch.uint8), image)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with _lock:
        python, numpy = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@functools.cache
def _policy(name: str, side: int, mean: tuple[float, float, float]) -> Callable[[Image.Image], Image.Image]:
    """Imported when first needed: timm's data module takes seconds."""
    from timm.data.auto_augment import auto_augment_transform, rand_augment_transform

    settings: dict[str, Any] = {
        "translate_const": int(side * 0.45),
        "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    make = rand_augment_transform if name.startswith("rand") else auto_augment_transform
    transform = make(name, settings)
    steps = transform.ops if hasattr(transform, "ops") else [step for part in transform.policy for step in part]
    for step in steps:
        if step.name.startswith("Posterize"):
            step.aug_fn = _posterize
    return cast("Callable[[Image.Image], Image.Image]", transform)


def _posterize(image: Image.Image, num_bits: int, **_: object) -> Image.Image:
    """timm's, for 0 bits too, which magnitude 10 of the increasing policies means and Pillow refuses from 12 on: all of
    a pixel's bits are cleared.
    """
    if num_bits >= 8:
        return image
    return ImageOps.posterize(image, num_bits) if num_bits > 0 else Image.new("RGB", image.size)


@functools.cache
def _eraser(probability: float) -> Callable[[Tensor], Tensor]:
    from timm.data.random_erasing import RandomErasing

    return cast("Callable[[Tensor], Tensor]", RandomErasing(probability, mode="const", device="cpu"))  # type: ignore[no-untyped-call]
