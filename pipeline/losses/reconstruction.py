"""Losses of predicted pixels.

Legend: B samples, M masked patches, P values of a patch.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

NORM_PIX_EPS = 1e-6


class PatchStatistics(NamedTuple):
    """Mean and standard deviation of each patch."""

    mean: Float[Tensor, "b m 1"]
    std: Float[Tensor, "b m 1"]


def patch_statistics(patches: Float[Tensor, "b m P"]) -> PatchStatistics:
    """The statistics MAE normalises targets with: unbiased variance, and the epsilon inside the root."""
    variance = patches.var(dim=-1, keepdim=True, unbiased=True)
    return PatchStatistics(patches.mean(dim=-1, keepdim=True), (variance + NORM_PIX_EPS).sqrt())


def normalize_patches(patches: Float[Tensor, "b m P"]) -> Float[Tensor, "b m P"]:
    """Each patch to mean 0 and variance 1 (MAE, section 3, "norm-pix")."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def masked_mse(prediction: Float[Tensor, "b m P"], target: Float[Tensor, "b m P"]) -> Float[Tensor, " b"]:
    """Mean squared error of each sample over its masked patches, in fp32 or better."""
    difference = (prediction.float() if prediction.dtype.itemsize < 4 else prediction) - target
    return difference.square().mean(dim=(1, 2))
