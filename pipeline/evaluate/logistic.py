"""A linear classifier fitted to frozen features: CLIP's linear probe (Radford et al. 2021, section 3.2), in memory.

Stage `probe` trains heads step by step on augmented images; this is a quick figure during pretraining.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import ranks
from pipeline.evaluate.base import Measured, Predict, Sweep
from pipeline.evaluate.classification import best_classes, classification_figures, topk_accuracy
from pipeline.evaluate.collect import collect, labelled

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # inverse L2 regularisation
SELECTION_SET = "validation"
MAX_ITERATIONS = 300


class LogisticEvaluation:
    """`<set>/linear_probe_top1` and so on: multinomial logistic regression on a stage's `features`, fitted to the
    training set by L-BFGS (scikit-learn), on features scaled to unit variance.

    The regularisation is chosen on the set named `validation` or, without one, on a fifth of the training set. Rank 0
    fits; all ranks get its scores.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective."""
        if not names:
            return Measured({})
        all_names = ("train", *names)
        rows_of = {name: labelled(collect(predict, sweep(name), ("features", "labels"))) for name in all_names}
        if not rows_of["train"]:
            return Measured({})
        best, strength = ranks.from_first(lambda: _fit(rows_of, self.classes))
        figures: dict[str, float] = {}
        details: dict[str, Any] = {"linear_probe_strength": strength}
        for name, predicted in best.items():
            set_figures, set_details = classification_figures(
                predicted, rows_of[name]["labels"], self.classes, f"{name}/linear_probe_"
            )
            figures |= set_figures
            details |= set_details
        return Measured(figures, details)


def _fit(rows_of: dict[str, dict[str, Tensor]], classes: Sequence[str]) -> tuple[dict[str, Tensor], float]:
    """Best classes of each set except `train`, and the chosen regularisation."""
    train = rows_of["train"]
    features, labels = train["features"].float(), train["labels"]
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    selection = rows_of.get(SELECTION_SET) or {}
    held_out = torch.arange(len(labels)) % 5 == 0
    if selection:
        held_out[:] = False
        judged, judged_labels = selection["features"].float(), selection["labels"]
    else:
        judged, judged_labels = features[held_out], labels[held_out]
    scores = []
    for strength in STRENGTHS:
        scored = _scores((features[~held_out] - mean) / deviation, labels[~held_out], strength, len(classes))
        scores.append(topk_accuracy(best_classes(scored((judged - mean) / deviation)), judged_labels, 1))
    chosen = STRENGTHS[scores.index(max(scores))]
    final = _scores((features - mean) / deviation, labels, chosen, len(classes))
    return {
        name: best_classes(final((rows["features"].float() - mean) / deviation))
        for name, rows in rows_of.items()
        if name != "train" and rows
    }, chosen


def _scores(features: Tensor, labels: Tensor, strength: float, num_classes: int) -> Any:
    """A function from features [B,D] to scores [B,C]; classes without training samples score -inf."""
    from sklearn.linear_model import LogisticRegression

    if bool((labels == labels[0]).all()):
        return lambda rows: torch.nn.functional.one_hot(labels[:1].expand(len(rows)), num_classes).float()
    model = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)
    with np.errstate(all="ignore"):
        model.fit(features.numpy(), labels.numpy())

    def score(rows: Tensor) -> Tensor:
        decisions = model.decision_function(rows.numpy())
        if decisions.ndim == 1:
            decisions = np.stack([-decisions, decisions], axis=1)
        scores = torch.full((len(rows), num_classes), float("-inf"))
        scores[:, torch.from_numpy(model.classes_)] = torch.from_numpy(decisions).float()
        return scores

    return score
