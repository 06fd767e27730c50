"""Accuracy of several heads over the same features, and of the head that a validation set selects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from pipeline.evaluate.base import Measured, Predict, Sweep
from pipeline.evaluate.classification import classification_figures, topk_accuracy
from pipeline.evaluate.collect import collect

SELECTION_SET = "validation"


class ProbeEvaluation:
    """`<set>/top1` of the chosen head, `<set>/top1_<head>` of every head.

    The head is chosen by its top-1 on the set named `validation` or, without one, on the training set: never on
    another set that is reported. The stage predicts `best` [B, heads, K] and `labels`.
    """

    def __init__(self, classes: Sequence[str], heads: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.heads = tuple(heads)

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective."""
        if not names:
            return Measured({})
        selection = SELECTION_SET if SELECTION_SET in names else "train"
        all_names = names if selection in names else (selection, *names)
        rows_of = {name: collect(predict, sweep(name), ("best", "labels")) for name in all_names}
        rows_of = {name: rows for name, rows in rows_of.items() if len(rows.get("labels", ()))}
        if selection not in rows_of:
            return Measured({})
        chosen = choose_head(rows_of[selection]["best"], rows_of[selection]["labels"])
        figures: dict[str, float] = {}
        details: dict[str, Any] = {"chosen_head": self.heads[chosen], "chosen_on": selection}
        for name in names:
            if name not in rows_of:
                continue
            best, labels = rows_of[name]["best"], rows_of[name]["labels"]
            set_figures, set_details = classification_figures(best[:, chosen], labels, self.classes, f"{name}/")
            figures |= set_figures
            details |= set_details
            for i, head in enumerate(self.heads):
                figures[f"{name}/top1_{head}"] = topk_accuracy(best[:, i], labels, 1)
        return Measured(figures, details)


def choose_head(best: Int[Tensor, "b heads k"], labels: Int[Tensor, " b"]) -> int:
    """The head with the highest top-1; of equals, the first."""
    accuracies = [topk_accuracy(best[:, i], labels, 1) for i in range(best.shape[1])]
    return accuracies.index(max(accuracies))
