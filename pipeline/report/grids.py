"""A figure over two settings that were varied together, with what each row differs from the first by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from pipeline.pages.numbers import number
from pipeline.report.intervals import Measure, student_95
from pipeline.report.markup import Markup, Node, element
from pipeline.report.runs import Group, measure
from pipeline.report.spec import Grid, ReportSpec, Source


def grids(spec: ReportSpec, groups: Sequence[Group]) -> Iterator[Markup]:
    """Every grid of the report."""
    for grid in spec.grids:
        yield _grid(grid, groups)
    if spec.grids:
        yield element(
            "p",
            "Mean over seeds with its 95% interval (Student's t over the seeds), seeds' own figures below it. ",
            "Below each row but the first: its difference from the first, paired by seed, with its 95% interval. An "
            "interval that holds 0 decides nothing.",
            class_="note",
        )


def _grid(grid: Grid, groups: Sequence[Group]) -> Markup:
    columns = list(dict.fromkeys(column for row in grid.cells.values() for column in row))
    found = {
        (row, column): measure(groups, Source(run=label, figure=grid.figure))
        for row, labels in grid.cells.items()
        for column, label in labels.items()
    }
    first = next(iter(grid.cells))
    body = []
    for row in grid.cells:
        cells = [element("td", _told(found.get((row, column))), class_="num") for column in columns]
        body.append(element("tr", element("th", row, scope="row"), cells))
        if row != first:
            differences = [_difference(found.get((row, column)), found.get((first, column))) for column in columns]
            note = element("td", f"minus {first}", class_="note")
            body.append(element("tr", note, [element("td", text, class_="num note") for text in differences]))
    head = [element("th", "", scope="col"), *(element("th", name, scope="col", class_="num") for name in columns)]
    table = element(
        "table",
        element("caption", grid.title),
        element("thead", element("tr", head)),
        element("tbody", body),
    )
    return element("div", table, class_="scroll")


def _told(found: Measure | None) -> Node:
    if found is None:
        return "not measured"
    if len(found.values) == 1:
        return " ".join(filter(None, (found.text(), found.interval_text())))
    mean, half = (_share(value, found.proportion) for value in (found.mean, half_width(found.values)))
    values = ", ".join(_share(value, found.proportion).removesuffix("%") for value in found.values)
    return (f"{mean} ± {half}", element("span", values, class_="note"))  # on a line of its own: columns stay narrow


def _difference(one: Measure | None, other: Measure | None) -> str:
    if one is None or other is None or len(one.values) != len(other.values):
        return ""
    pairs = [a - b for a, b in zip(one.values, other.values, strict=True)]
    mean = statistics.fmean(pairs)
    text = f"{'+' if mean >= 0 else '−'}{_share(abs(mean), one.proportion)}"
    return text if len(pairs) == 1 else f"{text} ± {_share(half_width(pairs), one.proportion)}"


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean over a few values (Student's t)."""
    return student_95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _share(value: float, proportion: bool) -> str:
    return f"{100 * value:.1f}%" if proportion else number(value)
