"""The mean of a number that a stage predicts for each sample."""

from __future__ import annotations

from pipeline.evaluate.base import Measured, Predict, Sweep
from pipeline.evaluate.collect import collect


class MeanEvaluation:
    """`<set>/<figure>`: the prediction `figure` [B], averaged over the set's samples."""

    def __init__(self, figure: str) -> None:
        self.figure = figure

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective."""
        figures = {}
        for name in names:
            values = collect(predict, sweep(name), (self.figure,)).get(self.figure)
            if values is not None and len(values):
                figures[f"{name}/{self.figure}"] = values.double().mean().item()
        return Measured(figures)
