"""Losses of masks against torchvision's and transformers'."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss
from transformers.loss.loss_for_object_detection import dice_loss

from pipeline.losses.masks import focal_and_dice, mask_iou

M, K, SIDE = 4, 3, 9


def given(scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits; objects, one of them empty; pixels that count, all but the last rows of two images."""
    draw = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(M, K, SIDE, SIDE, generator=draw)
    truth = torch.rand(M, SIDE, SIDE, generator=draw) > 0.7
    truth[3] = False
    valid = torch.ones(M, SIDE, SIDE, dtype=torch.bool)
    valid[1:3, 6:] = False
    return logits.requires_grad_(), truth, valid


@pytest.mark.parametrize("scale", [0.5, 3.0, 60.0])
def test_values_and_gradients_are_those_of_torchvision_and_transformers(scale: float) -> None:
    logits, truth, valid = given(scale)
    focal, dice = focal_and_dice(logits, truth, valid)
    for i in range(M):
        rows = int(valid[i].any(1).sum())
        for k in range(K):
            x, t = logits[i, k, :rows], truth[i, :rows].float()
            wanted = sigmoid_focal_loss(x, t, alpha=0.25, gamma=2.0, reduction="mean")
            torch.testing.assert_close(focal[i, k], wanted, rtol=1e-5, atol=1e-8)
            wanted_dice = dice_loss(x.reshape(1, -1), t.reshape(1, -1), 1)
            torch.testing.assert_close(dice[i, k], wanted_dice, rtol=1e-5, atol=1e-6)
            (ours,) = torch.autograd.grad(focal[i, k] + dice[i, k], logits, retain_graph=True)
            (theirs,) = torch.autograd.grad(wanted + wanted_dice, logits, retain_graph=True)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_pixels_that_are_not_valid_count_nowhere() -> None:
    logits, truth, valid = given()
    before = (*focal_and_dice(logits, truth, valid), mask_iou(logits > 0, truth, valid))
    other = torch.where(valid.unsqueeze(1), logits, -logits)
    after = (*focal_and_dice(other, truth ^ ~valid, valid), mask_iou(other > 0, truth ^ ~valid, valid))
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first, second)
