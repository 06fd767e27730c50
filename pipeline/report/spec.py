"""What a report is to show."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config import Config


class RunFigure(Config):
    """A figure of a run, as its last evaluation gave it."""

    run: str  # a label of ReportSpec.runs
    figure: str  # "<set>/<figure>", such as "heldout/top1"


class ComparedFigure(Config):
    """One line of the headline table: a figure beside what it must be compared with."""

    title: str
    run: str
    figure: str
    baselines: dict[str, RunFigure | float] = {}  # label -> another run's figure, or a number (chance)
    num_samples: int | None = Field(default=None, gt=0)  # measured on; None: taken from the evaluation's data set
    kind: Literal["auto", "proportion", "value"] = "auto"  # auto: a proportion if named like an accuracy or recall
    note: str = ""  # a sentence shown below the title


class Grid(Config):
    """A table of one figure over two settings: rows and columns, each cell the runs under a label."""

    title: str
    figure: str
    cells: dict[str, dict[str, str]] = Field(min_length=1)  # row -> column -> label; rows are compared with the first


class ReportSpec(Config):
    """A report on one run or on many.

    Several run directories under one label are the same run with different seeds: their figures are shown as mean
    and standard deviation.
    """

    title: str = "Training report"
    about: str = ""  # a paragraph below the title
    runs: dict[str, str | tuple[str, ...]] = Field(min_length=1)  # label -> run directory, or those of several seeds
    rows: tuple[ComparedFigure, ...] = ()
    grids: tuple[Grid, ...] = ()
    datasets: dict[str, str] = {}  # label -> data set folder, whose counts are shown
    max_pictures: int = Field(default=6, ge=0)  # per run

    @model_validator(mode="after")
    def _labels_exist(self) -> ReportSpec:
        for number, row in enumerate(self.rows):
            named = [row.run, *(source.run for source in row.baselines.values() if isinstance(source, RunFigure))]
            for label in named:
                if label not in self.runs:
                    raise ValueError(f"rows.{number} names run {label!r}, but `runs` has {', '.join(self.runs)}")
        for number, grid in enumerate(self.grids):
            for label in (label for row in grid.cells.values() for label in row.values()):
                if label not in self.runs:
                    raise ValueError(f"grids.{number} names run {label!r}, but `runs` has {', '.join(self.runs)}")
        if empty := [label for label, urls in self.runs.items() if not urls]:
            raise ValueError(f"runs.{empty[0]} names no run directory")
        return self

    def urls(self, label: str) -> tuple[str, ...]:
        """The run directories under a label."""
        urls = self.runs[label]
        return (urls,) if isinstance(urls, str) else urls
