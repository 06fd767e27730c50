"""Intervals of figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.estimates import Estimate, is_proportion, wilson


@pytest.mark.parametrize(
    ("right", "num", "low", "high"),
    [
        # Newcombe (1998), table I, method 3: Wilson's score without continuity correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_the_published_intervals(right: int, num: int, low: float, high: float) -> None:
    assert wilson(right / num, num) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_an_interval_holds_its_share_and_stays_a_proportion(num: int, share: float) -> None:
    low, high = wilson(share, num)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1


@pytest.mark.parametrize(("share", "num"), [(0.5, 0), (1.5, 10), (-0.1, 10)])
def test_what_is_no_proportion_is_refused(share: float, num: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(share, num)


@pytest.mark.parametrize(
    ("figure", "values", "expected"),
    [
        ("heldout/top1", [0.5], True),
        ("heldout/zeroshot_top5", [0.0, 1.0], True),
        ("heldout/retrieval_i2t_r10", [0.2], True),
        ("heldout/knn_top1", [0.2], True),
        ("heldout/top1_x0.3", [0.2], True),
        ("heldout/top1", [56.0], False),
        ("heldout/top1", [float("nan")], False),
        ("heldout/reconstruction_mse", [0.4], False),
        ("heldout/loss", [0.4], False),
    ],
)
def test_shares_of_samples_are_told_from_other_figures(figure: str, values: list[float], expected: bool) -> None:
    assert is_proportion(figure, values) is expected


def test_one_run_has_a_binomial_interval() -> None:
    figure = Estimate((0.5,), 400, proportion=True)
    assert figure.text() == "50.0%"
    assert figure.interval_text() == "45.1 to 54.9%"
    assert figure.bounds == figure.interval


def test_several_seeds_have_mean_and_deviation_instead() -> None:
    figure = Estimate((0.60, 0.64, 0.68), 400, proportion=True)
    assert figure.text() == "64.0 ± 4.0%"
    assert figure.interval_text() is None
    assert figure.bounds == pytest.approx((0.60, 0.68))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.1185, 0.1111, 0.1171), "0.1156 ± 0.0039"),
        ((0.0874, 0.0174, 0.0865), "0.064 ± 0.040"),
        ((1200.0, 1300.0, 1400.0), "1,300 ± 100"),
        ((0.5, 0.5, 0.5), "0.5 ± 0"),
    ],
)
def test_a_mean_has_no_more_digits_than_its_deviation_allows(values: tuple[float, ...], expected: str) -> None:
    assert Estimate(values, None, proportion=False).text() == expected


def test_without_a_sample_count_there_is_no_interval() -> None:
    assert Estimate((0.5,), None, proportion=True).interval is None
    assert Estimate((0.5,), 400, proportion=False).interval is None
