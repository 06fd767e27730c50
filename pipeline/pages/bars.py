"""Horizontal bars, as a table that a style sheet draws (the macro `bars` of parts.html.jinja)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Bar(NamedTuple):
    """A labelled value; `bounds` are drawn as a whisker, `main` marks the bar that the others are compared with."""

    label: str
    value: float
    text: str  # the value as people read it
    bounds: tuple[float, float] | None = None
    main: bool = False


def scale_bars(bars: Sequence[Bar]) -> list[Bar]:
    """The same bars with values and bounds as shares, in [0, 1], of the largest of them.

    A value that isn't finite becomes a bar of no length, which keeps its label and text.
    """
    bars = [bar if math.isfinite(bar.value) else bar._replace(value=0.0, bounds=None) for bar in bars]
    top = max((max(bar.value, bar.bounds[1] if bar.bounds else 0.0) for bar in bars), default=0.0)

    def share(value: float) -> float:
        return round(max(0.0, value) / top, 4) if top > 0 else 0.0

    return [
        bar._replace(value=share(bar.value), bounds=bar.bounds and (share(bar.bounds[0]), share(bar.bounds[1])))
        for bar in bars
    ]
