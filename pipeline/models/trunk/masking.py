"""Random masks over patches, drawn from the samples' seeds.

Legend: B samples, N patches, K kept, M = N - K masked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.models.noise import uniform

NUM_BLOCKS = 64
"""Rectangles drawn for a block mask. Where they don't cover enough patches (rare even beyond ratio .95), whole rows are
added."""


class Masking(NamedTuple):
    """Which patches are kept and which are masked."""

    keep: Int[Tensor, "b k"]  # indices of kept patches, in random order
    masked: Int[Tensor, "b m"]  # the others, in random order


def random_masking(seeds: Int[Tensor, " b"], num_patches: int, num_kept: int) -> Masking:
    """Keep a random set of `num_kept` patches of each sample (MAE, section 3)."""
    return masking_from_noise(uniform(seeds, "mask", num_patches), num_kept)


def block_masking(seeds: Int[Tensor, " b"], grid: tuple[int, int], num_kept: int) -> Masking:
    """Mask rectangles until all but `num_kept` patches are covered, the last one cut short (BEiT's blockwise masking,
    Bao et al. 2021, algorithm 1; MAE's "block").

    Rectangles cover at least BEiT's share of the image, 16 patches of 196, and at most as much as is to be masked;
    ratios of height to width are log-uniform from 0.3 to 1/0.3.
    """
    rows, columns = grid
    num_patches = rows * columns
    draws = uniform(seeds, "block_mask", 4 * NUM_BLOCKS).view(-1, NUM_BLOCKS, 4)
    upwards = uniform(seeds, "block_mask_cut", 1) < 0.5
    low = num_patches * 16 / 196
    area = low + (max(num_patches - num_kept, low) - low) * draws[..., 0]
    ratio = (math.log(0.3) * (1 - 2 * draws[..., 1])).exp()
    height = (area * ratio).sqrt().round().clamp(1, rows)
    width = (area / ratio).sqrt().round().clamp(1, columns)
    top = (draws[..., 2] * (rows - height + 1)).floor()
    left = (draws[..., 3] * (columns - width + 1)).floor()
    down, across = (torch.arange(side, device=seeds.device) for side in grid)
    in_rows = (down >= top.unsqueeze(-1)) & (down < (top + height).unsqueeze(-1))
    in_columns = (across >= left.unsqueeze(-1)) & (across < (left + width).unsqueeze(-1))
    covered = (in_rows.unsqueeze(-1) & in_columns.unsqueeze(-2)).flatten(2)
    first = torch.where(covered.any(1), covered.to(torch.uint8).argmax(1), NUM_BLOCKS)
    place = torch.arange(num_patches, device=seeds.device)
    place = torch.where(upwards, place.flip(0), place)  # the last block loses its upper or its lower part
    order = torch.argsort(first * num_patches + place, dim=1)  # block after block, row by row
    mask = torch.zeros_like(first, dtype=torch.bool).scatter(1, order[:, : num_patches - num_kept], True)
    return _shuffled(mask, seeds, num_kept)


def grid_masking(seeds: Int[Tensor, " b"], grid: tuple[int, int], side: int) -> Masking:
    """Keep one patch of every `side` x `side` cell, at the same place in all cells of a sample; the place is random
    (MAE's "grid").

    Raises:
        ValueError: `side` doesn't divide the grid.
    """
    if grid[0] % side or grid[1] % side:
        raise ValueError(f"cells of {side}x{side} patches don't fit a grid of {grid[0]}x{grid[1]}")
    draws = (uniform(seeds, "grid_mask", 2) * side).long()
    down, across = (torch.arange(length, device=seeds.device) % side for length in grid)
    in_rows, in_columns = down == draws[:, :1], across == draws[:, 1:]
    mask = ~(in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).flatten(1)
    return _shuffled(mask, seeds, grid[0] * grid[1] // side**2)


def masking_from_noise(noise: Float[Tensor, "b n"], num_kept: int) -> Masking:
    """Masking from noise, as in the official MAE: the `num_kept` patches with the least noise are kept."""
    order = torch.argsort(noise, dim=1, stable=True)
    return Masking(order[:, :num_kept], order[:, num_kept:])


def masking_from_mask(mask: Bool[Tensor, "b n"]) -> Masking:
    """Masking from a mask in image order (True = masked).

    Raises:
        ValueError: samples differ in the number of masked patches, or none or all patches are masked.
    """
    counts = mask.sum(1)
    masked = int(counts[0]) if len(counts) else 0
    if bool((counts != masked).any()) or not 0 < masked < mask.shape[1]:
        raise ValueError(f"every row must mask the same number of patches, between 1 and N - 1, not {counts.tolist()}")
    order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)
    return Masking(order[:, :-masked], order[:, -masked:])


def _shuffled(mask: Bool[Tensor, "b n"], seeds: Int[Tensor, " b"], num_kept: int) -> Masking:
    """Kept and masked patches, each in random order, so that any slice of them is a random subset."""
    return masking_from_noise(uniform(seeds, "mask", mask.shape[1]) + mask, num_kept)


def mask_picture(masking: Masking) -> Bool[Tensor, "b n"]:
    """True where a patch is masked, in image order."""
    num = masking.keep.shape[1] + masking.masked.shape[1]
    mask = torch.zeros(masking.keep.shape[0], num, dtype=torch.bool, device=masking.keep.device)
    return mask.scatter(1, masking.masked, True)


def take(tokens: Float[Tensor, "b n d"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """The tokens at `index`, in its order."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
