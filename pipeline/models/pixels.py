"""From uint8 images to normalised pixels and patches, and back.

Legend: B images, N patches (row by row), P = p * p * 3 values of a patch of p x p pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pipeline.data.images.pixels import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, normalise

PixelStatistics = Literal["imagenet", "clip", "half"]

PIXEL_STATISTICS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": (CLIP_MEAN, CLIP_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation per channel, for pixels in [0, 1]."""


def normalize(images: UInt8[Tensor, "b 3 h w"], statistics: PixelStatistics) -> Float[Tensor, "b 3 h w"]:
    """(pixels / 255 - mean) / std in fp32."""
    return normalise(images, *PIXEL_STATISTICS[statistics])


def denormalize(values: Float[Tensor, "b 3 h w"], statistics: PixelStatistics) -> UInt8[Tensor, "b 3 h w"]:
    """The inverse of `normalize`, rounded and clipped to what an image can show."""
    mean, std = (torch.tensor(v, device=values.device).view(1, 3, 1, 1) for v in PIXEL_STATISTICS[statistics])
    return (values.float() * (255 * std) + 255 * mean).round_().clamp_(0, 255).to(torch.uint8)


def patchify(images: Float[Tensor, "b 3 h w"], patch_size: int) -> Float[Tensor, "b n P"]:
    """Cut into patches row by row; a patch's values are ordered (row, column, channel), as MAE's targets are."""
    b, c, height, width = images.shape
    p = patch_size
    cut = images.reshape(b, c, height // p, p, width // p, p)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)


def unpatchify(patches: Float[Tensor, "b n P"], grid: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
    """The inverse of `patchify`; `grid` is rows and columns of patches."""
    b, _, values = patches.shape
    rows, columns = grid
    p = round((values // 3) ** 0.5)
    cut = patches.reshape(b, rows, columns, p, p, 3)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, rows * p, columns * p)
