"""Random masks over patches, drawn from the samples' seeds.

Legend: B samples, N patches, K kept, M = N - K masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.models.noise import uniform


class Masking(NamedTuple):
    """Which patches are kept and which are masked."""

    keep: Int[Tensor, "b k"]  # indices of kept patches, in random order
    masked: Int[Tensor, "b m"]  # the others


def random_masking(seeds: Int[Tensor, " b"], num_patches: int, num_kept: int) -> Masking:
    """Keep the `num_kept` patches with the least noise, for each sample its own (MAE, section 3)."""
    return masking_from_noise(uniform(seeds, "mask", num_patches), num_kept)


def masking_from_noise(noise: Float[Tensor, "b n"], num_kept: int) -> Masking:
    """Masking from given noise, as the official MAE makes it from torch's: argsort, the first are kept."""
    order = torch.argsort(noise, dim=1, stable=True)
    return Masking(order[:, :num_kept], order[:, num_kept:])


def masking_from_mask(mask: Bool[Tensor, "b n"]) -> Masking:
    """Masking from a picture of it (True = masked), which must mask equally many patches in every sample.

    Raises:
        ValueError: rows differ in the number of masked patches, or none or all are masked.
    """
    counts = mask.sum(1)
    masked = int(counts[0]) if len(counts) else 0
    if bool((counts != masked).any()) or not 0 < masked < mask.shape[1]:
        raise ValueError(
            f"every row must mask the same number of patches, between 1 and N - 1; found {counts.tolist()}"
        )
    order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)
    return Masking(order[:, :-masked], order[:, -masked:])


def mask_picture(masking: Masking) -> Bool[Tensor, "b n"]:
    """True where a patch is masked, in image order."""
    num = masking.keep.shape[1] + masking.masked.shape[1]
    mask = torch.zeros(masking.keep.shape[0], num, dtype=torch.bool, device=masking.keep.device)
    return mask.scatter(1, masking.masked, True)


def take(tokens: Float[Tensor, "b n d"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """The tokens at `index`, in its order."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
