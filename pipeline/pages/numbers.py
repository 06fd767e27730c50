"""Numbers as people read them."""

from __future__ import annotations

import math


def number(value: float, *, proportion: bool = False) -> str:
    """A proportion in per cent with one decimal, any other number with four significant digits."""
    if not math.isfinite(value):
        return "not finite"
    if proportion:
        return f"{100 * value:.1f}%"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"
    return f"{value:.3g}"


def count(value: float) -> str:
    """A whole number with commas between its thousands."""
    return f"{round(value):,}"


def size(value: float, unit: str = "") -> str:
    """A large number in short: 950, 25.6k, 3.2M; with a unit 25.6 kB."""
    space = " " if unit else ""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{space}{prefix}{unit}"
    return f"{value:.3g}{space}{unit}"


def duration(seconds: float) -> str:
    """Seconds as "48 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
