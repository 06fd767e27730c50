"""Semantic segmentation: mean intersection over union, in pixels of the stored images.

Legend: B images, H W pixels of the image in the batch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from pipeline import ranks
from pipeline.data.batch import Instances
from pipeline.data.images.views import View
from pipeline.data.instances import decode_masks
from pipeline.evaluate.base import Measured, Predict, Sweep


class SegmentationEvaluation:
    """`<set>/miou` over the classes that are annotated or predicted anywhere in the set, `<set>/pixel_accuracy`, and
    each class's IoU under details.

    Prediction needed: `map` [B,H,W], the class of each pixel of the image in the batch. Objects come from the batch's
    instances, in pixels of the stored image, to which the map is resized by nearest neighbour.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective: counts are summed over ranks, so the figures are the same for any number of ranks."""
        figures: dict[str, float] = {}
        details: dict[str, Any] = {}
        for name in names:
            counts = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
            for batch in sweep(name):
                maps = predict(batch)["map"].cpu()
                assert batch.instances is not None
                for i in (batch.weight > 0).nonzero().flatten().tolist():
                    instances = batch.instances[i]
                    size = instances.view.source if instances.view is not None else (maps.shape[1], maps.shape[2])
                    predicted = maps[i] if instances.view is None else stored_map(maps[i], instances.view)
                    counts += confusion_of(class_map(instances, size), predicted, len(self.classes))
            counts = ranks.sum_over_ranks(counts.double()).round().long()
            union = counts.sum(0) + counts.sum(1) - counts.diagonal()
            shares = counts.diagonal().double() / union
            if counts.sum() == 0:
                continue
            figures[f"{name}/miou"] = shares[union > 0].mean().item()
            figures[f"{name}/pixel_accuracy"] = int(counts.diagonal().sum()) / int(counts.sum())
            ious = [share if seen else None for share, seen in zip(shares.tolist(), (union > 0).tolist(), strict=True)]
            details[f"{name}/iou"] = {"classes": list(self.classes), "iou": ious}
        return Measured(figures, details)


def class_map(instances: Instances, size: tuple[int, int]) -> Int64[Tensor, "h w"]:
    """Each pixel's class: 0 for background, 1 + label for an object, crowds included; smaller objects cover larger."""
    masks = decode_masks(instances.masks, size)
    out = torch.zeros(size, dtype=torch.int64)
    for i in masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist():
        out[masks[i]] = 1 + int(instances.labels[i])
    return out


def stored_map(shown_map: Int[Tensor, "h w"], view: View) -> Int[Tensor, "h2 w2"]:
    """A map of the image in the batch, resized to the stored image; the view must show all of it, unmirrored."""
    (h, w), (height, width) = view.size, view.source
    rows = ((torch.arange(height) + 0.5) * (h / height)).long().clamp(max=h - 1)
    columns = ((torch.arange(width) + 0.5) * (w / width)).long().clamp(max=w - 1)
    return shown_map[rows][:, columns]


def confusion_of(truth: Int[Tensor, "h w"], predicted: Int[Tensor, "h w"], num: int) -> Int64[Tensor, "k k"]:
    """Counts of pixels: row = true class, column = predicted class."""
    return torch.bincount(truth.flatten() * num + predicted.flatten().long(), minlength=num**2).view(num, num)
