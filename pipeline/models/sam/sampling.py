"""The prompts that Segment Anything trains on: a first point or box, then points where the model is wrong.

Legend: M objects of a micro batch, y x pixels of the model's input.

Functions take random numbers in [0, 1), which the stage draws from the samples' seeds.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.models.sam.prompts import ABSENT, BACKGROUND, FOREGROUND, LOWER_RIGHT, NOT_A_POINT, UPPER_LEFT


def pixel_of(region: Bool[Tensor, "m y x"], draw: Float[Tensor, " m"]) -> Float[Tensor, "m 2"]:
    """A uniformly drawn pixel (x, y) of each region; the image's last pixel where a region is empty."""
    flat = region.flatten(1)
    counted = flat.cumsum(1, dtype=torch.int32)
    number = (draw * counted[:, -1]).floor().to(torch.int32) + 1
    index = torch.searchsorted(counted, number.unsqueeze(1)).squeeze(1).clamp(max=flat.shape[1] - 1)
    width = region.shape[2]
    return torch.stack([index % width, index // width], dim=1).float()


def noisy_boxes(
    boxes: Float[Tensor, "m 4"],
    draws: Float[Tensor, "m 4"],
    *,
    share: float,
    most: float,
    size: tuple[int, int],
) -> Float[Tensor, "m 4"]:
    """Boxes with Gaussian noise on each coordinate, clipped to the image.

    Args:
        share: standard deviation as a share of the box's side.
        most: the most pixels that a coordinate moves.
        size: (height, width) of the image.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    normal = math.sqrt(2) * torch.erfinv(2 * draws.double().clamp(1e-12, 1 - 1e-12) - 1)
    moved = boxes + (normal * share * sides).clamp(-most, most).to(boxes.dtype)
    limit = torch.tensor([size[1], size[0]] * 2, device=boxes.device, dtype=boxes.dtype)
    moved = torch.minimum(moved.clamp(min=0), limit)
    return torch.cat([torch.minimum(moved[:, :2], moved[:, 2:]), torch.maximum(moved[:, :2], moved[:, 2:])], dim=1)


def first_prompts(
    points: Float[Tensor, "m 2"], boxes: Float[Tensor, "m 4"], by_point: Bool[Tensor, " m"]
) -> tuple[Float[Tensor, "m 2 2"], Int[Tensor, "m 2"]]:
    """Points and labels (see `Prompts`) of first prompts: a point for some objects, a box for the others."""
    kinds = torch.tensor([[UPPER_LEFT, LOWER_RIGHT], [FOREGROUND, NOT_A_POINT]], device=points.device)
    as_points = torch.stack([points, torch.zeros_like(points)], dim=1)
    chosen = torch.where(by_point[:, None, None], as_points, boxes.view(-1, 2, 2))
    return chosen, kinds[by_point.long()]


def pauses(draws: Float[Tensor, "m s"], num_pauses: int) -> Bool[Tensor, "m s_plus_1"]:
    """At which of the S + 1 steps after the first an object gets no new point: the last, and others at random.

    Args:
        draws: one number for each step but the last.
        num_pauses: steps without a point, including the last; 0 for none.
    """
    paused = torch.zeros(len(draws), draws.shape[1] + 1, dtype=torch.bool, device=draws.device)
    if num_pauses > 0:
        paused[:, -1] = True
        others = draws.argsort(1)[:, : num_pauses - 1]
        paused.scatter_(1, others, torch.ones_like(others, dtype=torch.bool))
    return paused


def correction(
    predicted: Bool[Tensor, "m y x"],
    truth: Bool[Tensor, "m y x"],
    valid: Bool[Tensor, "m y x"],
    draw: Float[Tensor, " m"],
    pause: Bool[Tensor, " m"],
) -> tuple[Float[Tensor, "m 2"], Int[Tensor, " m"]]:
    """A point where the prediction is wrong, and its label: FOREGROUND where the object was missed.

    Where nothing is wrong, any pixel of the image is drawn, with its true label. Objects that pause get ABSENT.
    """
    wrong = (predicted ^ truth) & valid
    wrong = torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, valid)
    point = pixel_of(wrong, draw)
    column, row = point.long().unbind(1)
    inside = truth[torch.arange(len(truth), device=truth.device), row, column]
    labels = torch.where(inside, FOREGROUND, BACKGROUND)
    return point, torch.where(pause, ABSENT, labels)
