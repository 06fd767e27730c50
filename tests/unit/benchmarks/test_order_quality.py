"""What the order benchmark measures of a shuffle: right for the extremes, and how near ours comes to a permutation."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.order import measures
from pipeline.data.order.permutation import Order

COUNT = 200_000


def test_a_permutation_and_no_shuffle_measure_as_they_should() -> None:
    full = measures(np.random.default_rng(0).permutation(COUNT), 200)
    assert full["travel"] == pytest.approx(1 / 3, abs=0.01)
    assert abs(full["neighbour_correlation"]) < 0.01
    assert full["class_excess"] == pytest.approx(1, abs=0.05)
    none = measures(np.arange(COUNT), 200)
    assert none["travel"] == 0
    assert none["same_block"] == 1
    assert none["longest_class_run"] == COUNT // 200
    assert none["classes_in_batch"] < 3


def test_many_lanes_and_wide_windows_come_near_a_permutation_on_sorted_data() -> None:
    ids = Order([10_000] * 20, seed=1, block=64, lanes=64, window=2048).ids(0, np.arange(COUNT))
    found = measures(ids, 200)
    assert found["travel"] == pytest.approx(1 / 3, abs=0.02)
    assert abs(found["neighbour_correlation"]) < 0.02
    assert found["class_excess"] < 1.2
    assert found["longest_class_run"] <= 4
