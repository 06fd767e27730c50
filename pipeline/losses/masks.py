"""Losses of predicted masks.

Legend: M objects, K masks predicted of each, y x pixels.

Pixels that aren't `valid` (padding) count nowhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss


def focal_loss(
    logits: Float[Tensor, "m k y x"],
    truth: Bool[Tensor, "m y x"],
    valid: Bool[Tensor, "m y x"],
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, "m k"]:
    """Focal loss (Lin et al. 2017) of each mask, averaged over its pixels, as SAM 2's training code has it."""
    target = truth.unsqueeze(1).to(logits.dtype).expand_as(logits)
    each: Tensor = sigmoid_focal_loss(logits, target, alpha=alpha, gamma=gamma, reduction="none")
    inside = valid.unsqueeze(1)
    return (each * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)


def dice_loss(
    logits: Float[Tensor, "m k y x"], truth: Bool[Tensor, "m y x"], valid: Bool[Tensor, "m y x"]
) -> Float[Tensor, "m k"]:
    """1 - Dice coefficient (Milletari et al. 2016) of probabilities and truth, 1 added above and below the line."""
    share = logits.sigmoid() * valid.unsqueeze(1)
    target = (truth & valid).unsqueeze(1)
    both = (share * target).sum((2, 3))
    return 1 - (2 * both + 1) / (share.sum((2, 3)) + target.sum((2, 3)) + 1)


def mask_iou(
    predicted: Bool[Tensor, "m k y x"], truth: Bool[Tensor, "m y x"], valid: Bool[Tensor, "m y x"]
) -> Float[Tensor, "m k"]:
    """Intersection over union of masks; 0 where both are empty."""
    predicted = predicted & valid.unsqueeze(1)
    target = (truth & valid).unsqueeze(1)
    union = (predicted | target).sum((2, 3), dtype=torch.int32)
    return (predicted & target).sum((2, 3), dtype=torch.int32) / union.clamp(min=1)
