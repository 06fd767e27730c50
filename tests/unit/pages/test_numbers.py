"""How numbers are written for people."""

from __future__ import annotations

import math

import pytest

from pipeline.pages.numbers import duration, number, size


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.43211, "0.4321"), (0, "0"), (12345.0, "12,345"), (1.5e-7, "1.5e-07"), (math.nan, "not finite")],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_counts_and_durations_for_people() -> None:
    assert [size(950), size(25_600), size(5_530_000), size(2e9, "B")] == ["950", "25.6k", "5.53M", "2 GB"]
    assert [duration(4.2), duration(59.4), duration(200), duration(7500)] == [
        "4.2 s",
        "59 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
