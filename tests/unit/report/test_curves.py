"""Charts: what they draw and leave out, what stands beside them as text."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.curves import MAX_POINTS, MAX_POINTS_SMALL, MAX_ROWS, Chart, Line, line_chart, smooth


def chart(*lines: Line, small: bool = False, percent: bool = False) -> Chart:
    drawn = line_chart("Loss", lines, y_label="loss", small=small, percent=percent)
    assert drawn is not None
    return drawn


def test_what_is_not_finite_is_left_out() -> None:
    (line,) = chart(Line("run", [(0, 4.0), (1, math.nan), (2, math.inf), (3, 1.0)])).lines
    assert line.points == [(0, 4.0), (3, 1.0)]


def test_points_are_drawn_in_order_each_once() -> None:
    (line,) = chart(Line("run", [(5, 1.0), (0, 4.0), (5, 2.0)])).lines
    assert line.points == [(0, 4.0), (5, 2.0)], "uPlot wants every x once, rising"


def test_nothing_to_draw_gives_no_chart() -> None:
    assert line_chart("Loss", [Line("run", [])], y_label="loss") is None
    assert line_chart("Loss", [Line("run", [(0, math.nan)])], y_label="loss") is None
    assert [line.label for line in chart(Line("none", []), Line("some", [(0, 1.0)])).lines] == ["some"]


@pytest.mark.parametrize(("small", "most"), [(False, MAX_POINTS), (True, MAX_POINTS_SMALL)])
def test_long_curves_are_thinned_and_keep_their_level_and_end(small: bool, most: int) -> None:
    (line,) = chart(Line("run", [(i, i % 2) for i in range(10_000)]), small=small).lines
    assert len(line.points) == most
    assert line.points[-1][0] == 9_999
    assert all(0.4 < y < 0.6 for _, y in line.points), "the mean of a stretch, not one of its extremes"


def test_screen_readers_get_what_the_chart_shows() -> None:
    assert chart(Line("my run", [(0, 4.0), (9, 1.5)])).description == "Loss. my run: 4 to 1.5"
    assert chart(Line("a", [(0, 0.25)]), percent=True).description == "Loss. a: 25.0% to 25.0%"


def test_the_drawing_is_json_with_whole_samples_and_short_values() -> None:
    drawing = chart(Line("a", [(0.0, 1 / 3), (256.0, 1.0)], place=7, dots=True)).drawing
    (series,) = json.loads(json.dumps(drawing))["series"]
    assert series == {"label": "a", "place": 7, "dots": True, "x": [0, 256], "y": [0.33333, 1.0]}
    assert json.dumps(series["x"]) == "[0, 256]"


def test_few_points_stand_in_the_table_one_by_one() -> None:
    drawn = chart(Line("a", [(0, 4.0), (2, 3.0)]), Line("b", [(1, 0.5)]))
    assert drawn.rows == [(0, ["4", ""]), (1, ["", "0.5"]), (2, ["3", ""])]


@given(st.lists(st.lists(st.integers(0, 2000), max_size=60), min_size=1, max_size=3).filter(any))
def test_the_table_is_short_and_ends_where_the_lines_end(places: list[list[int]]) -> None:
    drawn = chart(*(Line(str(i), [(x, float(x)) for x in xs]) for i, xs in enumerate(places)))
    stops = [stop for stop, _ in drawn.rows]
    assert len(stops) <= MAX_ROWS
    assert stops == sorted(set(stops))
    assert stops[-1] == max(x for xs in places for x in xs)
    for column, line in enumerate(drawn.lines):
        texts = [values[column] for _, values in drawn.rows if values[column]]
        assert texts[-1].replace(",", "") == f"{line.points[-1][0]:.0f}"


def test_smoothing_keeps_length_ends_and_mean() -> None:
    points = [(float(i), float(i % 2)) for i in range(100)]
    smoothed = smooth(points, share=0.1)
    assert [x for x, _ in smoothed] == [x for x, _ in points]
    assert all(0.3 < y < 0.7 for _, y in smoothed)
    assert smooth([(0.0, 5.0)]) == [(0.0, 5.0)]
