"""Charts as inline SVG: lines, bars with whiskers, confusion matrices.

Drawn by hand rather than with a plotting library, so that they take the page's own colours (light, dark, print), stay
sharp, carry their text as text, and cost no import. Colours and strokes are the classes of `pipeline.report.style`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.pages.numbers import number, size
from pipeline.report.markup import Markup, Node, element

NUM_COLOURS = 6  # .s0 ... .s5 in the style sheet
NAME_LENGTH = 34  # characters of a class name beside a matrix
MAX_POINTS = 300  # of one drawn line; more can't be told apart at this size


class Line(NamedTuple):
    """One series of a line chart: points (x, y), drawn as a line or as dots on a thin line."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dots: bool = False


class Bar(NamedTuple):
    """One bar: a value with an optional whisker, its text, and whether it is the one the chart is about."""

    label: str
    value: float
    text: str
    bounds: tuple[float, float] | None = None
    main: bool = False


class Frame(NamedTuple):
    """The plotting area of a chart, and the data ranges it shows."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    log_y: bool

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixel position of a data point."""
        low, high = (math.log(v) for v in self.y) if self.log_y else self.y
        share_x = (x - self.x[0]) / (self.x[1] - self.x[0])
        share_y = ((math.log(y) if self.log_y else y) - low) / (high - low)
        return self.left + share_x * self.width, self.top + (1 - share_y) * self.height


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    width: int = 500,
    height: int = 260,
    from_zero: bool = False,
    log_y: bool = False,
    percent: bool = False,
) -> Markup:
    """Lines over a common x axis; what isn't finite (or not positive on a log axis) is left out.

    Returns empty markup when no line has a point.
    """
    drawn = [line._replace(points=_drawable(line.points, log_y)) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return Markup("")
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    x_range, y_range = _spread(min(xs), max(xs)), _spread(min(ys), max(ys))
    if log_y:
        y_range = (min(ys) * 0.9, max(ys) * 1.1)
        ticks_y = log_ticks(*y_range)
    else:
        ticks_y = ticks(0.0 if from_zero and y_range[0] >= 0 else y_range[0], y_range[1])
        y_range = (ticks_y[0], ticks_y[-1])
    frame = Frame(68, 14, width - 84, height - 58, x_range, y_range, log_y)
    body: list[Node] = [
        *_grid(frame, [t for t in ticks(*x_range) if x_range[0] <= t <= x_range[1]], ticks_y, percent),
        _text(frame.left + frame.width / 2, height - 8, x_label, "axis middle"),
        element("text", y_label, x=14, y=frame.top + frame.height / 2, class_="axis middle",
                transform=f"rotate(-90 14 {frame.top + frame.height / 2:.1f})"),
        *(mark for line in drawn for mark in _series(frame, line)),
    ]  # fmt: skip
    ends = "; ".join(f"{line.label}: {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in drawn)
    return _svg(width, height, f"{title}. {ends}", body)


def bar_chart(title: str, bars: Sequence[Bar], *, percent: bool, width: int = 460) -> Markup:
    """Horizontal bars from zero, one beneath the other, with their texts; whiskers show the bounds.

    A value that isn't finite keeps its line and text, without a bar.
    """
    longest = max((len(bar.label) for bar in bars), default=0)
    label_width, text_width, step = min(220, 24 + 7 * longest), 96, 24
    bars = [bar if math.isfinite(bar.value) else bar._replace(value=0.0, bounds=None) for bar in bars]
    top = max([bar.value for bar in bars] + [bar.bounds[1] for bar in bars if bar.bounds] + [0.0])
    scale = (width - label_width - text_width) / (top or 1.0)
    height = step * len(bars) + 6
    body: list[Node] = []
    for place, bar in enumerate(bars):
        y = place * step + 4
        middle = y + 8
        kind = "bar main" if bar.main else "bar"
        label = "label strong" if bar.main else "label"
        body += [
            _text(label_width - 8, middle + 4, shorten(bar.label, 30), f"{label} end"),
            element("rect", x=label_width, y=y, width=max(1.0, bar.value * scale), height=16, class_=kind, rx=2),
        ]
        end = bar.value
        if bar.bounds:
            low, high = max(0.0, bar.bounds[0]), bar.bounds[1]
            body.append(_whisker(label_width + low * scale, label_width + high * scale, middle))
            end = max(end, high)
        body.append(_text(label_width + end * scale + 7, middle + 4, bar.text, label))
    body.append(element("line", x1=label_width, y1=0, x2=label_width, y2=height, class_="baseline"))
    told = "; ".join(f"{bar.label}: {bar.text}" for bar in bars)
    return _svg(width, height, f"{title}. {told}", body)


def confusion_matrix(title: str, matrix: Sequence[Sequence[float]], classes: Sequence[str]) -> Markup:
    """Rows are the true classes, columns the predicted ones; the deeper a cell, the larger its share of the row.

    Raises:
        ValueError: the matrix isn't square over the classes.
    """
    num = len(classes)
    if len(matrix) != num or any(len(row) != num for row in matrix):
        raise ValueError(f"a confusion matrix over {num} classes must be {num} by {num}")
    cell = max(7, min(34, 560 // max(num, 1)))
    longest = max((min(len(name), NAME_LENGTH) for name in classes), default=0)
    margin = 16 + 6 * longest
    body: list[Node] = []
    for i, row in enumerate(matrix):
        total = sum(row)
        y = margin + i * cell
        if cell >= 10:
            body.append(_text(margin - 6, y + cell / 2 + 4, shorten(classes[i], NAME_LENGTH), "label end"))
        for j, value in enumerate(row):
            if not value:
                continue
            share = value / total
            square = element("title", f"{classes[i]} taken for {classes[j]}: {number(value)} of {number(total)}")
            x = margin + j * cell
            body.append(element("rect", square, x=x, y=y, width=cell, height=cell, fill_opacity=round(share**0.6, 3),
                                class_="cell right" if i == j else "cell wrong"))  # fmt: skip
            if cell >= 26:
                body.append(_text(x + cell / 2, y + cell / 2 + 4, number(value), "count middle"))
    if cell >= 10:
        body += [
            _column_name(shorten(name, NAME_LENGTH), margin + (j + 0.62) * cell, margin - 6)
            for j, name in enumerate(classes)
        ]
    side = num * cell
    body.append(element("rect", x=margin, y=margin, width=side, height=side, class_="outline"))
    right = sum(matrix[i][i] for i in range(num))
    told = f"{title}: {num} classes, {number(right)} of {number(sum(map(sum, matrix)))} right"
    return _svg(margin + side + 60, margin + side + 4, told, body, fixed=True)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers that cover [low, high]."""
    low, high = _spread(low, high)
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis: powers of ten, with 2 and 5 times them where the range is short."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    inside = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
    return inside or [low, high]


def smooth(points: Sequence[tuple[float, float]], share: float = 0.03) -> list[tuple[float, float]]:
    """Running mean over a window of `share` of the points, centred; short at the ends."""
    half = max(1, round(len(points) * share / 2))
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    ends = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    return [(points[i][0], (sums[b] - sums[a]) / (b - a)) for i, (a, b) in enumerate(ends)]


def shorten(text: str, length: int) -> str:
    """Long names end in an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _drawable(points: Sequence[tuple[float, float]], log_y: bool) -> list[tuple[float, float]]:
    """Finite points, thinned to MAX_POINTS by the mean of equal stretches."""
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]
    if len(kept) <= MAX_POINTS:
        return kept
    cuts = [round(i * len(kept) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    parts = [kept[a:b] for a, b in itertools.pairwise(cuts) if b > a]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _spread(low: float, high: float) -> tuple[float, float]:
    """A range that isn't a single point."""
    if high > low:
        return low, high
    return low - (abs(low) * 0.5 or 0.5), high + (abs(high) * 0.5 or 0.5)


def _grid(frame: Frame, ticks_x: list[float], ticks_y: list[float], percent: bool) -> Iterator[Markup]:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    for tick in ticks_y:
        _, y = frame.at(frame.x[0], tick)
        yield element("line", x1=frame.left, y1=y, x2=right, y2=y, class_="grid")
        yield _text(frame.left - 7, y + 4, _tick(tick, ticks_y[-1], percent), "tick end")
    for tick in ticks_x:
        x, _ = frame.at(tick, frame.y[0])
        yield element("line", x1=x, y1=bottom, x2=x, y2=bottom + 4, class_="grid")
        yield _text(x, bottom + 18, size(tick), "tick middle")


def _tick(value: float, largest: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.3g}%"
    if 0 < largest <= 0.005 and value:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return number(value)


def _series(frame: Frame, line: Line) -> Iterator[Markup]:
    colour = f"s{line.colour % NUM_COLOURS}"
    places = [frame.at(x, y) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    if len(places) > 1:
        yield element("polyline", points=path, class_=f"line {colour}")
    if line.dots or len(places) == 1:
        yield from (element("circle", cx=x, cy=y, r=3.2, class_=f"dot {colour}") for x, y in places)


def _whisker(low: float, high: float, y: float) -> Markup:
    path = f"M{low:.1f} {y - 4:.1f}V{y + 4:.1f}M{low:.1f} {y:.1f}H{high:.1f}M{high:.1f} {y - 4:.1f}V{y + 4:.1f}"
    return element("path", d=path, class_="whisker")


def _column_name(name: str, x: float, y: float) -> Markup:
    return element("text", name, x=x, y=y, class_="label", transform=f"rotate(-60 {x:.1f} {y:.1f})")


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return element("text", text, x=x, y=y, class_=kind)


def _svg(width: float, height: float, told: str, body: Sequence[Node], *, fixed: bool = False) -> Markup:
    """The drawing with what a screen reader says of it; `fixed` keeps its size where the page is wider."""
    style = f"max-width:{width:.0f}px" if fixed else None
    return element(
        "svg", body, viewBox=f"0 0 {width:.0f} {height:.0f}", role="img", style=style,
        aria_label=told, xmlns="http://www.w3.org/2000/svg",
    )  # fmt: skip
