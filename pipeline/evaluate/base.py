"""The contract of an evaluation: from predictions to figures, independent of any stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from pipeline.data.batch import Batch

Predictions: TypeAlias = Mapping[str, Tensor]  # each with leading dimension B

Predict: TypeAlias = Callable[[Batch], Predictions]
"""Collective: every rank must call it the same number of times, which `Sweep` guarantees."""

Sweep: TypeAlias = Callable[[str], Iterable[Batch]]
"""`sweep(name)` yields this rank's share of the named evaluation set once ("validation", "heldout", or "train" without
augmentation), padded with samples of weight 0 so that all ranks see the same number of batches."""


@runtime_checkable  # tests check annotations at run time
class Evaluation(Protocol):
    """Measures predictions on one or more evaluation sets.

    Gathers over ranks by sample id, so the figures are the same on every rank and for any number of ranks. Returns
    figures by name, plus JSON for the report under `details` (confusion matrices and so on).
    """

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured: ...


class Measured(dict[str, float]):
    """Figures by name; `details` holds JSON-able extras for the report."""

    details: dict[str, Any]

    def __init__(self, figures: Mapping[str, float], details: Mapping[str, Any] | None = None) -> None:
        super().__init__(figures)
        self.details = dict(details or {})
