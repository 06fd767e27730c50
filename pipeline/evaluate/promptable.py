"""How well masks come of clicks and boxes: the paper's click rule, and intersection over union after so many clicks.

Legend: B images, Q objects of an image at most, K clicks, y x pixels of the stored image.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import distance_transform_edt  # type: ignore[import-untyped]

from pipeline.evaluate.base import Measured, Predict, Sweep
from pipeline.evaluate.collect import collect

NUM_CLICKS = 9
TOLD_CLICKS = (1, 2, 3, 5, 9)
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, math.inf)}
"""COCO's: areas in pixels of the stored image."""


class Click(NamedTuple):
    """A point of the stored image."""

    x: int
    y: int
    foreground: bool


def next_click(truth: Bool[np.ndarray, "y x"], predicted: Bool[np.ndarray, "y x"] | None = None) -> Click:
    """Where a careful person would click: in the middle of what is most wrong.

    The first click is the object's pixel farthest from its boundary, later ones the pixel farthest from the boundary of
    what was missed or of what was wrongly taken, whichever lies deeper; the image's border bounds too. Of equals the
    first in reading order is taken, and what was missed before what was wrongly taken. Where nothing is wrong the first
    click's place serves again.
    """
    missed = truth if predicted is None else truth & ~predicted
    place, depth = _deepest(missed)
    if predicted is not None:
        other, other_depth = _deepest(predicted & ~truth)
        if other_depth > depth:
            return Click(*other, foreground=False)
        if depth == 0:
            place, _ = _deepest(truth)
    return Click(*place, foreground=True)


def _deepest(region: Bool[np.ndarray, "y x"]) -> tuple[tuple[int, int], float]:
    """The pixel (x, y) of a region farthest from what isn't in it, and how far that is."""
    if not region.any():
        return (0, 0), 0.0
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    top, left = int(rows[0]), int(columns[0])
    cut = np.pad(region[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    depths = distance_transform_edt(cut)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depths.argmax()), depths.shape)
    return (int(x) + left, int(y) + top), float(depths[y, x])


def iou(a: Bool[np.ndarray, "y x"], b: Bool[np.ndarray, "y x"]) -> float:
    """Intersection over union of two masks; 0 where both are empty."""
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 0.0


class PromptableEvaluation:
    """Mean IoU over a set's objects, after clicks and from boxes.

    `<set>/iou_clicks_{1,2,3,5,9}`: of the mask the model itself ranks highest; `<set>/iou_oracle_1`: of the best of the
    three after one click; `<set>/iou_box`: from a true box; those of small, medium and large objects with `_small` and
    so on, where there are any. `<set>/num_objects` counts.

    From a stage's `clicks` [B,Q,K], `oracle`, `box` and `area` [B,Q]; absent objects are NaN.
    """

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective."""
        figures: dict[str, float] = {}
        details: dict[str, Any] = {}
        for name in names:
            found = collect(predict, sweep(name), ("clicks", "oracle", "box", "area"))
            if not found:
                continue
            area = found["area"].flatten()
            there = ~area.isnan()
            if not there.any():
                continue
            clicks = found["clicks"].flatten(0, 1)[there].double()
            columns = {f"iou_clicks_{k}": clicks[:, k - 1] for k in TOLD_CLICKS}
            columns["iou_oracle_1"] = found["oracle"].flatten()[there].double()
            columns["iou_box"] = found["box"].flatten()[there].double()
            area = area[there]
            figures[f"{name}/num_objects"] = float(len(area))
            for title, values in columns.items():
                figures[f"{name}/{title}"] = values.mean().item()
                for size, (low, high) in SIZES.items():
                    own = (area >= low) & (area < high)
                    if own.any():
                        figures[f"{name}/{title}_{size}"] = values[own].mean().item()
            details[f"{name}/iou_by_clicks"] = clicks.mean(0).tolist()
        return Measured(figures, details)


def padded_rows(rows: list[list[float]], width: int) -> Float[torch.Tensor, "b width"]:
    """Rows of unequal length as a tensor, NaN where there is nothing."""
    return torch.tensor([row + [math.nan] * (width - len(row)) for row in rows])
