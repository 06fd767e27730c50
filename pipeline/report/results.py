"""Figures of the last evaluations: beside their baselines, over grids of settings, for retrieval, and all of them."""

from __future__ import annotations

import difflib
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pipeline.pages.bars import Bar, scale_bars
from pipeline.pages.numbers import number
from pipeline.report.estimates import Estimate, is_proportion, student_95
from pipeline.report.runs import RunGroup, estimate
from pipeline.report.spec import ComparedFigure, Grid, ReportSpec, RunFigure

_RETRIEVAL = re.compile(r"(?P<set>.*)/retrieval_(?P<direction>i2t|t2i)_r(?P<rank>\d+)")
_DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}


class FigureCell(NamedTuple):
    """A figure, or why there is none."""

    estimate: Estimate | None
    missing: str = ""


class HeadlineRow(NamedTuple):
    """A figure beside its baselines: a cell for each of the table's labels, None where the row has no such baseline."""

    figure: ComparedFigure
    result: FigureCell
    baselines: Mapping[str, FigureCell | None]

    @property
    def bars(self) -> list[Bar]:
        """The result and its baselines as bars; none without a baseline, since one bar compares nothing."""
        baselines = {label: cell.estimate for label, cell in self.baselines.items() if cell and cell.estimate}
        if self.result.estimate is None or not baselines:
            return []
        values = [(self.figure.run, self.result.estimate), *baselines.items()]
        bars = [Bar(label, value.mean, value.text(), value.bounds) for label, value in values]
        return scale_bars([bars[0]._replace(main=True), *bars[1:]])


class GridCell(NamedTuple):
    """A figure of one row and column: the mean, every seed's value, and what the row differs by from the first one."""

    text: str
    seeds: str
    difference: str


class GridTable(NamedTuple):
    """A figure over two settings."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[GridCell]]


class RetrievalRow(NamedTuple):
    """Recall at each rank, of one run, evaluation set and direction, or by chance."""

    label: str
    data_set: str
    direction: str
    recalls: Sequence[str]
    num_samples: int | None


def headline(spec: ReportSpec, groups: Sequence[RunGroup]) -> list[HeadlineRow]:
    """Every figure that the report compares; all rows have the same labels of baselines, in the same order."""
    labels = dict.fromkeys(label for figure in spec.rows for label in figure.baselines)
    rows = []
    for figure in spec.rows:
        result = _cell(groups, figure, estimate(groups, figure, figure.num_samples))
        baselines = {label: _baseline(groups, figure, result.estimate, label) for label in labels}
        rows.append(HeadlineRow(figure, result, baselines))
    return rows


def all_figures(groups: Sequence[RunGroup]) -> list[tuple[str, str, Estimate]]:
    """Label, name and value of every figure that all runs under a label have."""
    figures = []
    for group in groups:
        for name in sorted({name for run in group.runs for name in run.figures}):
            value = estimate(groups, RunFigure(run=group.label, figure=name))
            if value is not None:
                figures.append((group.label, name, value))
    return figures


def grid_tables(spec: ReportSpec, groups: Sequence[RunGroup]) -> list[GridTable]:
    """Every grid of the report."""
    return [_grid_table(grid, groups) for grid in spec.grids]


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean over a few values (Student's t)."""
    return student_95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def retrieval(groups: Sequence[RunGroup]) -> tuple[list[int], list[RetrievalRow]]:
    """Recall at K of image-text retrieval: the values of K, and the rows.

    Chance is K/n, that of n distinct captions, for each evaluation set.
    """
    recalls: dict[tuple[str, str, str], dict[int, Estimate]] = {}
    for group in groups:
        for name in group.runs[0].figures:
            match = _RETRIEVAL.fullmatch(name)
            value = estimate(groups, RunFigure(run=group.label, figure=name)) if match else None
            if match and value is not None:
                key = (group.label, match["set"], match["direction"])
                recalls.setdefault(key, {})[int(match["rank"])] = value
    ranks = sorted({rank for by_rank in recalls.values() for rank in by_rank})
    rows: list[RetrievalRow] = []
    sizes: dict[tuple[str, int | None], None] = {}  # each set once, in order
    for (label, data_set, direction), by_rank in recalls.items():
        num_samples = next(iter(by_rank.values())).num_samples
        texts = [by_rank[rank].text() if rank in by_rank else "" for rank in ranks]
        rows.append(RetrievalRow(label, data_set, _DIRECTIONS[direction], texts, num_samples))
        sizes[data_set, num_samples] = None
    for data_set, num_samples in sizes:
        if num_samples:
            chances = [number(min(1.0, rank / num_samples), proportion=True) for rank in ranks]
            rows.append(RetrievalRow("chance", data_set, "", chances, num_samples))
    return ranks, rows


def worst_retrievals(groups: Sequence[RunGroup]) -> Iterator[tuple[str, list[Mapping[str, object]]]]:
    """A title, and the captions whose own image ranks last with the image that ranks first instead."""
    for group in groups:
        for name, pairs in group.runs[0].details.items():
            if name.endswith("retrieval_worst") and isinstance(pairs, list) and pairs:
                yield f"{group.label}: the worst pairs of {name.rpartition('/')[0]}", pairs


def _cell(groups: Sequence[RunGroup], figure: ComparedFigure | RunFigure, value: Estimate | None) -> FigureCell:
    return FigureCell(value) if value else FigureCell(None, _missing(groups, figure.run, figure.figure))


def _missing(groups: Sequence[RunGroup], label: str, figure: str) -> str:
    """Why a figure can't be shown, with the name nearest to it."""
    group = next(group for group in groups if group.label == label)
    lacking = next(run for run in group.runs if figure not in run.figures)
    if not lacking.figures:
        return "not measured yet"
    close = difflib.get_close_matches(figure, lacking.figures, n=1)
    return f"not measured: {label} has no {figure}" + (f" (nearest: {close[0]})" if close else "")


def _baseline(
    groups: Sequence[RunGroup], figure: ComparedFigure, result: Estimate | None, label: str
) -> FigureCell | None:
    baseline = figure.baselines.get(label)
    if baseline is None:
        return None
    if isinstance(baseline, RunFigure):
        value = estimate(groups, baseline, figure.num_samples)
        return _cell(groups, baseline, value._replace(proportion=result.proportion) if value and result else value)
    proportion = result.proportion if result else is_proportion(figure.figure, (baseline,))
    return FigureCell(Estimate((float(baseline),), None, proportion))


def _grid_table(grid: Grid, groups: Sequence[RunGroup]) -> GridTable:
    columns = list(dict.fromkeys(column for row in grid.cells.values() for column in row))
    values = {
        row: {column: estimate(groups, RunFigure(run=label, figure=grid.figure)) for column, label in labels.items()}
        for row, labels in grid.cells.items()
    }
    first = next(iter(values.values()))
    return GridTable(
        grid.title,
        columns,
        {
            name: [_grid_cell(row.get(column), None if row is first else first.get(column)) for column in columns]
            for name, row in values.items()
        },
    )


def _grid_cell(value: Estimate | None, first: Estimate | None) -> GridCell:
    if value is None:
        return GridCell("not measured", "", "")
    difference = _difference(value, first) if first else ""
    if len(value.values) == 1:
        return GridCell(" ".join(filter(None, (value.text(), value.interval_text()))), "", difference)
    mean, half = (_share(part, value.proportion) for part in (value.mean, half_width(value.values)))
    seeds = ", ".join(_share(part, value.proportion).removesuffix("%") for part in value.values)
    return GridCell(f"{mean} ± {half}", seeds, difference)


def _difference(value: Estimate, first: Estimate) -> str:
    """Value minus first, paired by seed, with its 95% interval; empty if they have unlike numbers of seeds."""
    if len(value.values) != len(first.values):
        return ""
    pairs = [a - b for a, b in zip(value.values, first.values, strict=True)]
    mean = statistics.fmean(pairs)
    text = f"{'+' if mean >= 0 else '−'}{_share(abs(mean), value.proportion)}"
    return text if len(pairs) == 1 else f"{text} ± {_share(half_width(pairs), value.proportion)}"


def _share(value: float, proportion: bool) -> str:
    return f"{100 * value:.1f}%" if proportion else number(value)
