"""Which classes a model takes for which others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.report.estimates import Estimate
from pipeline.report.runs import Run, RunGroup

MAX_MISTAKES = 8  # listed below a matrix
MAX_MATRIX_CLASSES = 80  # with more, only the commonest mistakes and the table of classes are shown
MAX_NAMED_CLASSES, MAX_COUNTED_CLASSES = 56, 21  # of a matrix whose cells have room for names, and for counts


class Mistake(NamedTuple):
    """How many samples of one class were taken for another."""

    num: float
    label: str
    taken_for: str
    total: float  # samples of the class


class ClassAccuracy(NamedTuple):
    """How often a class is recognised, and its commonest mistake; without samples there is no accuracy."""

    label: str
    num_samples: float
    accuracy: Estimate | None
    mistake: Mistake | None


class Confusion(NamedTuple):
    """A confusion matrix, summed over seeds: rows are the true classes, columns the predicted ones."""

    title: str
    zero_shot: bool
    num_seeds: int
    classes: Sequence[str]
    matrix: Sequence[Sequence[float]]

    @property
    def total(self) -> float:
        return sum(map(sum, self.matrix))

    @property
    def right(self) -> float:
        return sum(row[i] for i, row in enumerate(self.matrix))

    @property
    def cell_px(self) -> int:
        """Side of a cell in pixels; 0 if the matrix is too large to show."""
        num_classes = len(self.classes)
        return max(7, min(34, 560 // num_classes)) if num_classes <= MAX_MATRIX_CLASSES else 0

    @property
    def density(self) -> str:
        """What the cells have room for."""
        num_classes = len(self.classes)
        return "counts" if num_classes <= MAX_COUNTED_CLASSES else "names" if num_classes <= MAX_NAMED_CLASSES else ""

    def mistakes(self) -> list[Mistake]:
        """Every pair of classes that were mixed up, the commonest first."""
        pairs = sorted(
            ((num, i, j) for i, row in enumerate(self.matrix) for j, num in enumerate(row) if i != j and num),
            reverse=True,
        )
        return [Mistake(num, self.classes[i], self.classes[j], sum(self.matrix[i])) for num, i, j in pairs]

    def class_accuracies(self) -> list[ClassAccuracy]:
        """Every class, the worst first, those without samples last."""
        rows = []
        for i, (label, row) in enumerate(zip(self.classes, self.matrix, strict=True)):
            total = sum(row)
            num, place = max(((num, j) for j, num in enumerate(row) if j != i), default=(0, 0))
            mistake = Mistake(num, label, self.classes[place], total) if num else None
            accuracy = Estimate((row[i] / total,), int(total), True) if total else None
            rows.append(ClassAccuracy(label, total, accuracy, mistake))
        return sorted(rows, key=lambda row: (row.accuracy.mean if row.accuracy else math.inf, row.label))


def confusions(groups: Sequence[RunGroup]) -> Iterator[Confusion]:
    """The confusion matrices of each label's runs; one that doesn't fit its classes' names is left out."""
    for group in groups:
        for name in group.runs[0].details:
            if not name.endswith("confusion"):
                continue
            matrices = [run.details[name] for run in group.runs if name in run.details]
            total = [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
            classes = _classes(group.runs[0], name)
            if total and all(len(row) == len(classes) for row in (total, *total)):
                title = f"{group.label}: {_title(name)}"
                yield Confusion(title, "zeroshot" in name, len(group.runs), classes, total)


def _classes(run: Run, name: str) -> list[str]:
    prefix = name.rpartition("/")[0]
    labels = run.details.get(f"{prefix}/classes") or run.details.get("classes") or []
    return [str(label) for label in labels]


def _title(name: str) -> str:
    """heldout/zeroshot_confusion as "zero-shot classification, heldout"."""
    data_set, _, kind = name.rpartition("/")
    kind = kind.removesuffix("confusion").rstrip("_").replace("zeroshot", "zero-shot").replace("_", " ")
    return f"{kind} classification, {data_set}".strip()
