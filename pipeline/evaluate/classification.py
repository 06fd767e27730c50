"""Classification accuracy, from scores over classes or from nearest neighbours of features.

Legend: B samples, C classes, K best classes of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.evaluate.base import Measured, Predict, Sweep
from pipeline.evaluate.collect import collect

NUM_BEST = 5


def best_classes(scores: Float[Tensor, "b c"]) -> Int[Tensor, "b k"]:
    """The five classes with the highest scores, best first (fewer when there are fewer classes)."""
    return scores.topk(min(NUM_BEST, scores.shape[1]), dim=1).indices


def topk_accuracy(best: Int[Tensor, "b k"], labels: Int[Tensor, " b"], k: int) -> float:
    """Share of samples whose label is among the first `k` of `best`."""
    return (best[:, :k] == labels.unsqueeze(1)).any(1).double().mean().item()


def confusion(predicted: Int[Tensor, " b"], labels: Int[Tensor, " b"], num_classes: int) -> list[list[int]]:
    """Counts: row = true class, column = predicted class."""
    counts = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    matrix: list[list[int]] = counts.view(num_classes, num_classes).tolist()
    return matrix


def classification_figures(
    best: Int[Tensor, "b k"], labels: Int[Tensor, " b"], classes: Sequence[str], prefix: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures `<prefix>top1`, `<prefix>top5` (with more than 5 classes) and `<prefix>mean_per_class` (the mean of each
    class's accuracy), and details with the confusion matrix under `<prefix>confusion`.
    """
    figures = {f"{prefix}top1": topk_accuracy(best, labels, 1)}
    if len(classes) > NUM_BEST:
        figures[f"{prefix}top5"] = topk_accuracy(best, labels, NUM_BEST)
    right, total = torch.zeros(len(classes)).double(), torch.zeros(len(classes)).double()
    right.index_add_(0, labels, (best[:, 0] == labels).double())
    total.index_add_(0, labels, torch.ones(len(labels)).double())
    figures[f"{prefix}mean_per_class"] = (right[total > 0] / total[total > 0]).mean().item()
    return figures, {f"{prefix}confusion": confusion(best[:, 0], labels, len(classes)), "classes": list(classes)}


class ClassificationEvaluation:
    """`<set>/top1`, `<set>/top5`, `<set>/loss` and the confusion matrix from a stage's `best`, `labels`, `loss`."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective."""
        figures: dict[str, float] = {}
        details: dict[str, Any] = {}
        for name in names:
            rows = collect(predict, sweep(name), ("best", "labels", "loss"))
            if "labels" not in rows or not len(rows["labels"]):
                continue
            set_figures, set_details = classification_figures(rows["best"], rows["labels"], self.classes, f"{name}/")
            figures |= set_figures | {f"{name}/loss": rows["loss"].double().mean().item()}
            details |= set_details
        return Measured(figures, details)
