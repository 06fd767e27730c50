"""Masks: exact counts, the samples' own, of the shape their kind promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.trunk.masking import Masking, block_masking, grid_masking, mask_picture, random_masking

SEEDS = torch.arange(64) * 7919


def check(masking: Masking, num_kept: int, num_patches: int) -> None:
    assert masking.keep.shape[1] == num_kept
    both = torch.cat([masking.keep, masking.masked], 1).sort(1).values
    assert torch.equal(both, torch.arange(num_patches).expand(len(both), -1))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 15), columns=st.integers(1, 15), share=st.floats(0, 1), seed=st.integers(0, 2**62))
def test_block_masks_have_the_size_asked_for(rows: int, columns: int, share: float, seed: int) -> None:
    num_kept = int(rows * columns * share)
    check(block_masking(torch.tensor([seed, 1]), (rows, columns), num_kept), num_kept, rows * columns)


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
def test_masks_belong_to_samples(kind: str) -> None:
    def make(seeds: torch.Tensor) -> Masking:
        if kind == "grid":
            return grid_masking(seeds, (14, 14), 2)
        return block_masking(seeds, (14, 14), 49) if kind == "block" else random_masking(seeds, 196, 49)

    whole, part = make(SEEDS), make(SEEDS[5:9])
    check(whole, 49, 196)
    assert torch.equal(whole.keep[5:9], part.keep)
    assert torch.equal(whole.masked[5:9], part.masked)
    different = len({tuple(row.tolist()) for row in mask_picture(whole)})
    assert different == (4 if kind == "grid" else 64)


def test_block_masks_are_blocks() -> None:
    """Far fewer neighbours differ than in a random mask, and rectangles keep BEiT's least size."""

    def borders(masking: Masking) -> float:
        mask = mask_picture(masking).view(-1, 14, 14)
        return (
            (mask[:, 1:] != mask[:, :-1]).float().mean() + (mask[:, :, 1:] != mask[:, :, :-1]).float().mean()
        ).item()

    assert borders(block_masking(SEEDS, (14, 14), 98)) < 0.5 * borders(random_masking(SEEDS, 196, 98))
    small = mask_picture(block_masking(SEEDS, (14, 14), 188)).view(-1, 14, 14)
    for mask in small:  # 8 masked patches: one rectangle, perhaps cut short in one row
        taken = mask.any(1).nonzero().flatten()
        assert len(taken) == taken[-1] - taken[0] + 1
        assert len({tuple(row.tolist()) for row in mask[taken[1:-1]]}) <= 1


def test_block_masks_reach_every_patch_and_favour_no_side() -> None:
    share = mask_picture(block_masking(torch.arange(2000), (14, 14), 98)).float().mean(0).view(14, 14)
    assert share.min() > 0.02  # a rectangle lies wholly inside, so corners are rarer
    assert abs(share[:, :7].mean() - share[:, 7:].mean()) < 0.03
    assert abs(share[:7].mean() - share[7:].mean()) < 0.03


def test_any_part_of_the_masked_patches_is_a_random_part() -> None:
    masked = block_masking(torch.arange(2000), (8, 8), 32).masked
    rows = (masked // 8).float()
    assert abs(rows[:, :8].mean() - rows[:, -8:].mean()) < 0.1


def test_grid_masks_keep_one_patch_of_every_cell() -> None:
    visible = ~mask_picture(grid_masking(SEEDS, (6, 9), 3)).view(-1, 6, 9)
    cells = visible.view(-1, 2, 3, 3, 3)
    assert (cells.sum((2, 4)) == 1).all()
    assert (cells[:, 0, :, 0] == cells[:, 1, :, 2]).all(), "at the same place in all cells"
    with pytest.raises(ValueError, match="don't fit"):
        grid_masking(SEEDS, (7, 9), 3)
