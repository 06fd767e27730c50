"""Curves of training: what runs logged and measured over samples, as charts that `assets/charts.js` draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pipeline.pages.numbers import number
from pipeline.report.estimates import is_proportion
from pipeline.report.runs import Run, RunGroup

SMOOTH_FROM = 80  # points; shorter curves are shown as they are
OPEN_CHARTS = 3  # of evaluation figures; the others are folded away
MAX_POINTS, MAX_POINTS_SMALL = 500, 250  # of a line: enough for zooming in, few enough for a small file
MAX_ROWS = 12  # of the table below a chart

Points = list[tuple[float, float]]


class Line(NamedTuple):
    """One series of a chart, with points (x, y); the place of its label in the legend decides the colour."""

    label: str
    points: Sequence[tuple[float, float]]
    place: int = 0
    dots: bool = False


class Chart(NamedTuple):
    """Lines over a common x axis, each with at least one point, all points finite and in order of x."""

    title: str
    y_label: str
    lines: Sequence[Line]
    small: bool = False
    from_zero: bool = False
    percent: bool = False

    @property
    def description(self) -> str:
        """The chart in words, for those who can't see it."""
        ends = (
            f"{line.label}: {self._text(line.points[0][1])} to {self._text(line.points[-1][1])}" for line in self.lines
        )
        return f"{self.title}. {'; '.join(ends)}"

    @property
    def drawing(self) -> dict[str, Any]:
        """What the script in the page reads."""
        series = [
            {
                "label": line.label,
                "place": line.place,
                "dots": line.dots,
                "x": [int(x) if x == int(x) else x for x, _ in line.points],
                "y": [float(f"{y:.5g}") for _, y in line.points],
            }
            for line in self.lines
        ]
        return {"y": self.y_label, "percent": self.percent, "zero": self.from_zero, "series": series}

    @property
    def rows(self) -> list[tuple[float, list[str]]]:
        """A table of at most MAX_ROWS rows: x, and each line's last value since the row before, as text."""
        xs = sorted({x for line in self.lines for x, _ in line.points})
        num_rows = min(len(xs), MAX_ROWS)
        stops = [xs[round((i + 1) * len(xs) / num_rows) - 1] for i in range(num_rows)]
        rows = []
        for before, stop in itertools.pairwise([-math.inf, *stops]):
            values = [[y for x, y in line.points if before < x <= stop] for line in self.lines]
            rows.append((stop, [self._text(ys[-1]) if ys else "" for ys in values]))
        return rows

    def _text(self, value: float) -> str:
        return number(value, proportion=self.percent)


class StageCurves(NamedTuple):
    """The charts of all runs of one stage, which share a loss."""

    stage: str
    groups: Sequence[RunGroup]
    charts: Sequence[Chart]
    more: Sequence[Chart]  # folded away
    small: Sequence[Chart]


def stage_curves(groups: Sequence[RunGroup]) -> Iterator[StageCurves]:
    """The charts of every stage that has trained."""
    for stage in dict.fromkeys(group.stage for group in groups):
        members = [group for group in groups if group.stage == stage]
        if not any(run.train for group in members for run in group.runs):
            continue
        evaluations = list(_evaluations(members))
        loss = _logged_chart(members, "Training loss", "loss", _logged("loss"))
        small = (
            _logged_chart(members, "Learning rate", "learning rate", _logged("lr"), small=True, smoothed=False),
            _logged_chart(members, "Throughput", "samples per second", _logged("samples_per_s"), small=True),
            _logged_chart(
                members, "Waiting for data (slowest rank)", "share of step time", data_wait, small=True, percent=True
            ),
        )
        yield StageCurves(
            stage,
            members,
            [chart for chart in (loss, *evaluations[:OPEN_CHARTS]) if chart],
            evaluations[OPEN_CHARTS:],
            [chart for chart in small if chart],
        )


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_label: str,
    small: bool = False,
    from_zero: bool = False,
    percent: bool = False,
) -> Chart | None:
    """A chart of the lines' finite points, thinned where there are many; None if no line has any."""
    thinned = [line._replace(points=_thin(line.points, MAX_POINTS_SMALL if small else MAX_POINTS)) for line in lines]
    drawn = [line for line in thinned if line.points]
    return Chart(title, y_label, drawn, small, from_zero, percent) if drawn else None


def data_wait(run: Run) -> Points:
    """Share of the step time that the rank which waited longest waited for data, over samples.

    `data_wait_s` sums over the steps since the line before, `step_s` is their mean.
    """
    points: Points = []
    step_before = 0
    for line in run.train:
        waits, num_steps = line.get("data_wait_s"), line["step"] - step_before
        step_before = line["step"]
        if waits and line.get("step_s") and num_steps > 0:
            points.append((float(line["samples"]), max(waits) / (line["step_s"] * num_steps)))
    return points


def smooth(points: Sequence[tuple[float, float]], share: float = 0.03) -> Points:
    """Running mean over a window of `share` of the points, centred; short at the ends."""
    half = max(1, round(len(points) * share / 2))
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    windows = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    return [(points[i][0], (sums[stop] - sums[start]) / (stop - start)) for i, (start, stop) in enumerate(windows)]


def _thin(points: Sequence[tuple[float, float]], most: int) -> Points:
    """Finite points in order of x, the last of those with an equal x; the mean of equal stretches if over `most`."""
    finite = sorted({x: y for x, y in points if math.isfinite(x) and math.isfinite(y)}.items())
    if len(finite) <= most:
        return finite
    cuts = [round(i * len(finite) / most) for i in range(most + 1)]
    stretches = [finite[start:stop] for start, stop in itertools.pairwise(cuts)]
    return [(stretch[-1][0], sum(y for _, y in stretch) / len(stretch)) for stretch in stretches]


def _logged(key: str) -> Callable[[Run], Points]:
    """What training lines hold under `key`, over samples."""

    def points(run: Run) -> Points:
        return [(float(line["samples"]), float(line[key])) for line in run.train if line.get(key) is not None]

    return points


def _logged_chart(
    groups: Sequence[RunGroup],
    title: str,
    y_label: str,
    points_of: Callable[[Run], Points],
    *,
    small: bool = False,
    smoothed: bool = True,
    percent: bool = False,
) -> Chart | None:
    """Something each run logged while training; None if no run has it. Small charts begin at zero."""
    lines = []
    for place, group in enumerate(groups):
        for label, run in group.labelled():
            points = points_of(run)
            lines.append(Line(label, smooth(points) if smoothed and len(points) >= SMOOTH_FROM else points, place))
    return line_chart(title, lines, y_label=y_label, small=small, from_zero=small, percent=percent)


def _evaluations(groups: Sequence[RunGroup]) -> Iterator[Chart]:
    """A chart for each figure that some run measured more than once."""
    names = dict.fromkeys(
        name for group in groups for run in group.runs if len(run.evaluations) > 1 for name in run.figures
    )
    for name in names:
        lines = []
        for place, group in enumerate(groups):
            for label, run in group.labelled():
                measured = [line for line in run.evaluations if name in line["figures"]]
                points = [(float(line["samples"]), float(line["figures"][name])) for line in measured]
                lines.append(Line(label, points, place, dots=True))
        values = [y for line in lines for _, y in line.points]
        percent = is_proportion(name, values)
        chart = line_chart(name, lines, y_label=name.rpartition("/")[2].replace("_", " "), percent=percent)
        if chart and len(values) > len(lines):
            yield chart
