"""Ranks that slow the others down."""

from __future__ import annotations

from pipeline.train.meter import STRAGGLER_LINES, Stragglers


def test_a_rank_is_named_once_when_it_has_been_slow_for_some_lines() -> None:
    watch = Stragglers(["one", "one", "two", "two"])
    slow = [1.0, 1.1, 0.9, 1.8]
    said = [watch.add_line(slow) for _ in range(STRAGGLER_LINES + 3)]
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0, 0]
    assert "rank 3 on two" in said[2][0]
    assert "1.8 times" in said[2][0]


def test_a_single_slow_line_or_ripples_name_nobody() -> None:
    watch = Stragglers(["one"] * 3)
    for number in range(20):
        assert watch.add_line([1.0, 1.4, 3.0 if number % 3 == 0 else 1.0]) == []
    assert Stragglers(["alone"]).add_line([5.0]) == []
    assert Stragglers(["idle", "idle"]).add_line([0.0, 0.0]) == []
