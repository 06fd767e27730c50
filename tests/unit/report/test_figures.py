"""Charts: where marks lie, what is left out, what a screen reader is told."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.figures import (
    MAX_POINTS,
    Bar,
    Line,
    bar_chart,
    confusion_matrix,
    line_chart,
    log_ticks,
    smooth,
    ticks,
)

SVG = "{http://www.w3.org/2000/svg}"


def marks(markup: str, name: str) -> list[dict[str, str]]:
    return [dict(found.attrib) for found in ElementTree.fromstring(markup).iter(f"{SVG}{name}")]


def texts(markup: str) -> list[str]:
    return ["".join(found.itertext()) for found in ElementTree.fromstring(markup).iter(f"{SVG}text")]


def chart(*lines: Line, **more: bool) -> str:
    return line_chart("Loss", lines, x_label="samples", y_label="loss", **more)


def places(polyline: dict[str, str]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in polyline["points"].split())]


def test_a_falling_loss_is_drawn_downwards_from_left_to_right() -> None:
    (line,) = marks(chart(Line("run", [(0, 4.0), (100, 2.0), (200, 1.0)])), "polyline")
    xs, ys = zip(*places(line), strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # SVG's y grows downwards
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.1)
    assert ys[1] - ys[0] == pytest.approx(2 * (ys[2] - ys[1]), abs=0.2)


def test_what_is_not_finite_is_left_out() -> None:
    (line,) = marks(chart(Line("run", [(0, 4.0), (1, math.nan), (2, math.inf), (3, 1.0)])), "polyline")
    assert len(places(line)) == 2


def test_a_logarithmic_axis_gives_equal_ratios_equal_heights() -> None:
    (line,) = marks(chart(Line("run", [(0, 100.0), (1, 10.0), (2, 1.0), (3, 0.0)]), log_y=True), "polyline")
    ys = [y for _, y in places(line)]
    assert len(ys) == 3
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)


def test_nothing_to_draw_gives_no_chart() -> None:
    assert chart(Line("run", [])) == ""
    assert chart(Line("run", [(0, math.nan)])) == ""


def test_one_point_is_a_dot() -> None:
    drawn = chart(Line("run", [(5, 1.0)]))
    assert len(marks(drawn, "circle")) == 1
    assert not marks(drawn, "polyline")


def test_long_curves_are_thinned_and_keep_their_level_and_end() -> None:
    (line,) = marks(chart(Line("run", [(i, i % 2) for i in range(10_000)])), "polyline")
    drawn = places(line)
    assert len(drawn) == MAX_POINTS
    assert len({y for _, y in drawn}) < 5  # the mean of a stretch, not one of its extremes


def test_charts_tell_screen_readers_what_they_show() -> None:
    label = ElementTree.fromstring(chart(Line("my run", [(0, 4.0), (9, 1.5)]))).attrib
    assert label["role"] == "img"
    assert label["aria-label"] == "Loss. my run: 4 to 1.5"


def test_text_from_outside_stays_text() -> None:
    drawn = bar_chart("x", [Bar("<script>alert(1)</script>", 1.0, '"><b>')], percent=False)
    assert "<script>" not in drawn
    assert "<script>alert(1)</script>" in texts(drawn)


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("ours", 0.8, "80%", (0.7, 0.9), main=True), Bar("chance", 0.2, "20%"), Bar("lost", math.nan, "?")]
    widths = [float(mark["width"]) for mark in marks(bar_chart("x", bars, percent=True), "rect")]
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.01)
    assert widths[2] <= 1


def test_a_confusion_matrix_shows_counts_names_and_shares() -> None:
    drawn = confusion_matrix("zero-shot", [[3, 1], [0, 4]], ["red ring", "blue star"])
    cells = {mark["class"]: [] for mark in marks(drawn, "rect")}
    for mark in marks(drawn, "rect"):
        cells[mark["class"]].append(mark)
    assert len(cells["cell right"]) == 2
    assert len(cells["cell wrong"]) == 1
    assert float(cells["cell right"][1]["fill-opacity"]) == 1
    assert float(cells["cell wrong"][0]["fill-opacity"]) < float(cells["cell right"][0]["fill-opacity"]) < 1
    assert "red ring taken for blue star: 1 of 4" in drawn
    assert {"red ring", "blue star", "3", "1", "4"} <= set(texts(drawn))
    assert ElementTree.fromstring(drawn).attrib["aria-label"] == "zero-shot: 2 classes, 7 of 8 right"


def test_a_class_without_samples_is_an_empty_row() -> None:
    drawn = confusion_matrix("x", [[0, 0], [1, 1]], ["a", "b"])
    assert len([mark for mark in marks(drawn, "rect") if "cell" in mark["class"]]) == 2


def test_a_matrix_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="2 by 2"):
        confusion_matrix("x", [[1, 2]], ["a", "b"])


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_even_and_cover_the_range(low: float, width: float) -> None:
    high = low + width
    found = ticks(low, high)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert 2 <= len(found) <= 12
    tolerance = 1e-6 * max(abs(low), abs(high), 1e-6)
    assert found[0] <= low + tolerance
    assert found[-1] >= high - tolerance
    assert max(gaps) - min(gaps) <= 1e-6 * max(gaps) + tolerance


def test_round_ticks() -> None:
    assert ticks(0.0, 1.0) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(3.0, 3.0) == [1, 2, 3, 4, 5]
    assert log_ticks(0.9, 110) == [1, 2, 5, 10, 20, 50, 100]


def test_smoothing_keeps_length_ends_and_mean() -> None:
    points = [(float(i), float(i % 2)) for i in range(100)]
    smoothed = smooth(points, share=0.1)
    assert [x for x, _ in smoothed] == [x for x, _ in points]
    assert all(0.3 < y < 0.7 for _, y in smoothed)
    assert smooth([(0.0, 5.0)]) == [(0.0, 5.0)]
