"""Several heads over the same features: each one's accuracy, and that of the head a validation set picks."""

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

    The head is chosen by its top-1 on the set named `validation`, or, where there is none, on the training set: never
    on the set it is reported for. The stage predicts `best` [B, heads, K] and `labels`.
    """

    def __init__(self, classes: Sequence[str], heads: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.heads = tuple(heads)

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective."""
        if not names:
            return Measured({})
        selection = SELECTION_SET if SELECTION_SET in names else "train"
        wanted = names if selection in names else (selection, *names)
        found = {name: collect(predict, sweep(name), ("best", "labels")) for name in wanted}
        found = {name: rows for name, rows in found.items() if len(rows.get("labels", ()))}
        if selection not in found:
            return Measured({})
        chosen = choose_head(found[selection]["best"], found[selection]["labels"])
        figures: dict[str, float] = {}
        details: dict[str, Any] = {"chosen_head": self.heads[chosen], "chosen_on": selection}
        for name in names:
            if name not in found:
                continue
            best, labels = found[name]["best"], found[name]["labels"]
            own, own_details = classification_figures(best[:, chosen], labels, self.classes, f"{name}/")
            figures |= own
            details |= own_details
            for i, head in enumerate(self.heads):
                figures[f"{name}/top1_{head}"] = topk_accuracy(best[:, i], labels, 1)
        return Measured(figures, details)


def choose_head(best: Int[Tensor, "b heads k"], labels: Int[Tensor, " b"]) -> int:
    """The head with the highest top-1; the first of equals."""
    accuracies = [topk_accuracy(best[:, i], labels, 1) for i in range(best.shape[1])]
    return accuracies.index(max(accuracies))
