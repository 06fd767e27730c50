"""Losses of predicted masks.

Legend: M objects, K masks predicted for each, y x pixels.

Pixels that aren't `valid` (padding) are ignored.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

FOCAL_ALPHA = 0.25  # weight of the object's pixels; the others have 1 - alpha


def focal_and_dice(
    logits: Float[Tensor, "m k y x"], truth: Bool[Tensor, "m y x"], valid: Bool[Tensor, "m y x"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "m k"]]:
    """Focal loss and Dice loss of each mask, as SAM 2's training code computes them.

    Focal (Lin et al. 2017, alpha .25, gamma 2): torchvision's `sigmoid_focal_loss`, averaged over the pixels. Dice
    (Milletari et al. 2016): 1 - Dice coefficient of probabilities and truth, with 1 added to numerator and denominator.
    Both are computed from the probability of the wrong class, which takes about half the time of computing them apart.
    """
    inside = valid.unsqueeze(1)
    sign = (1 - 2 * truth.to(logits.dtype)).unsqueeze(1)
    against = logits * sign
    wrong = against.sigmoid()
    weight = torch.where(truth, FOCAL_ALPHA, 1 - FOCAL_ALPHA).to(logits.dtype).unsqueeze(1) * inside
    focal = (wrong.square() * F.softplus(against) * weight).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
    object_, rest = ((part & valid).unsqueeze(1).to(logits.dtype) for part in (truth, ~truth))
    size = object_.sum((2, 3))
    both = size - (wrong * object_).sum((2, 3))
    taken = both + (wrong * rest).sum((2, 3))
    return focal, 1 - (2 * both + 1) / (taken + size + 1)


def mask_iou(
    predicted: Bool[Tensor, "m k y x"], truth: Bool[Tensor, "m y x"], valid: Bool[Tensor, "m y x"]
) -> Float[Tensor, "m k"]:
    """Intersection over union of masks; 0 where both are empty."""
    predicted = predicted & valid.unsqueeze(1)
    target = (truth & valid).unsqueeze(1)
    union = (predicted | target).sum((2, 3), dtype=torch.int32)
    return (predicted & target).sum((2, 3), dtype=torch.int32) / union.clamp(min=1)
