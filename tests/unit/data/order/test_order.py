"""The order of samples: each once an epoch, the same everywhere, well mixed, and read in long runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import permutation as orders
from pipeline.data.order.permutation import Cursor, Order, advance

SHARDS = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)
SHAPES = {"block": st.integers(1, 40), "lanes": st.integers(1, 9), "window": st.integers(1, 50)}

SEED_WITH_A_PAIR = 6


def epoch_ids(order: Order, epoch: int) -> np.ndarray:
    return order.ids(epoch, np.arange(order.num_samples))


@given(sizes=SHARDS, seed=st.integers(0, 2**62), epoch=st.integers(0, 5), **SHAPES)
@settings(max_examples=150, deadline=None)
def test_each_sample_comes_once_an_epoch(sizes, seed, epoch, block, lanes, window) -> None:
    order = Order(sizes, seed=seed, block=block, lanes=lanes, window=window)
    assert sorted(epoch_ids(order, epoch).tolist()) == list(range(sum(sizes)))


@given(sizes=SHARDS, size=st.integers(1, 60), offset=st.integers(0, 400), parts=st.integers(1, 5), **SHAPES)
@settings(max_examples=150, deadline=None)
def test_batches_are_the_stream_in_turn_however_they_are_cut(sizes, size, offset, parts, block, lanes, window) -> None:
    order = Order(sizes, seed=3, block=block, lanes=lanes, window=window)
    cursor = Cursor(1, offset % order.num_samples)
    whole = order.slots(cursor, size)
    last = advance(cursor, size, order.num_samples).epoch
    stream = [sample for epoch in range(1, last + 1) for sample in epoch_ids(order, epoch).tolist()][cursor.offset :]
    assert sorted(whole.ids.tolist()) == sorted(stream[:size])
    borders = [size * i // parts for i in range(parts + 1)]
    cut = [order.slots(cursor, size, a, b) for a, b in itertools.pairwise(borders)]
    assert np.concatenate([slots.ids for slots in cut]).tolist() == whole.ids.tolist()
    assert np.concatenate([slots.epochs for slots in cut]).tolist() == whole.epochs.tolist()


@given(sizes=SHARDS, size=st.integers(1, 60), offset=st.integers(0, 400), **SHAPES)
@settings(max_examples=100, deadline=None)
def test_a_window_holds_its_samples_in_ranges_within_shards(sizes, size, offset, block, lanes, window) -> None:
    order = Order(sizes, seed=3, block=block, lanes=lanes, window=window)
    slots = order.slots(Cursor(0, offset % order.num_samples), size)
    borders = np.cumsum([0, *sizes])
    for sample, which in zip(slots.ids, slots.window_of, strict=True):
        ranges = order.ranges(slots.windows[which])
        assert any(first <= sample < stop for first, stop in ranges)
        assert sum(stop - first for first, stop in ranges) <= window
        for first, stop in ranges:
            assert np.searchsorted(borders, first, side="right") == np.searchsorted(borders, stop - 1, side="right")


def test_the_order_is_pinned() -> None:
    """A change here silently reorders the data of every run that resumes."""
    order = Order([20, 12], seed=7, block=4, lanes=2, window=6)
    assert epoch_ids(order, 0).tolist() == [
        *(28, 17, 24, 18, 31, 16, 29, 8, 25, 13, 30, 15, 26, 19, 1, 12),
        *(3, 14, 27, 22, 2, 21, 0, 11, 7, 20, 6, 10, 5, 9, 4, 23),
    ]
    assert order.slots(Cursor(0, 30), 4).ids.tolist() == [4, 0, 23, 18]


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 2_000_000])
def test_permutations_are_the_order_of_the_draws(count: int) -> None:
    """Among two million draws a pair is alike in all bits that are sorted by, and told apart by the others."""
    draws = np.atleast_1d(np.random.Philox(key=SEED_WITH_A_PAIR).random_raw(count))
    assert np.array_equal(orders._permutation(count, SEED_WITH_A_PAIR), np.argsort(draws, kind="stable"))
    bits = (count - 1).bit_length()
    assert count < 2_000_000 or not np.diff(np.sort(draws) >> bits).all()


def test_equal_draws_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Few:
        def __init__(self, key: int) -> None:
            self._draws = iter(
                np.random.default_rng(key).integers(0, 2**64, 5, dtype=np.uint64).repeat(100).tolist() * 2
            )

        def random_raw(self, count: int) -> np.ndarray:
            return np.array([next(self._draws) for _ in range(count)], np.uint64)

    monkeypatch.setattr(np.random, "Philox", Few)
    assert np.array_equal(orders._permutation(1000, 4), np.argsort(Few(4).random_raw(1000), kind="stable"))


def test_it_depends_on_seed_and_epoch_alone() -> None:
    def make(seed: int) -> Order:
        return Order([1000, 500], seed=seed, block=32, lanes=4, window=64)

    one, again, other = make(1), make(1), make(2)
    again.ids(3, np.arange(10))  # what was asked before doesn't matter
    assert epoch_ids(one, 0).tolist() == epoch_ids(again, 0).tolist()
    assert epoch_ids(one, 0).tolist() != epoch_ids(one, 1).tolist()
    assert epoch_ids(one, 0).tolist() != epoch_ids(other, 0).tolist()


def test_lanes_are_balanced_and_batches_take_equally_of_each() -> None:
    order = Order([997], seed=0, block=16, lanes=8, window=32)
    for t in range(20):
        slots = order.slots(Cursor(0, 48 * t), 48)
        lanes = [slots.windows[w].lane for w in slots.window_of]
        assert np.bincount(lanes, minlength=8).tolist() == [6] * 8
        assert lanes == sorted(lanes), "a rank's slots come from neighbouring lanes"


def test_the_cursor_carries_an_epochs_tail_over() -> None:
    order = Order([10], seed=0, block=4, lanes=2, window=4)
    assert advance(Cursor(0, 8), 2, 10) == Cursor(1, 0)
    assert advance(Cursor(0, 8), 25, 10) == Cursor(3, 3)
    spanning = order.slots(Cursor(0, 8), 4)
    assert sorted(spanning.epochs.tolist()) == [0, 0, 1, 1]


def test_sorted_data_come_out_mixed() -> None:
    """Ids stand for classes in sorted order: a batch sees most of the data's range, neighbours are unlike."""
    order = Order([1000] * 50, seed=5, block=64, lanes=16, window=512)
    ids = epoch_ids(order, 0)
    batches = ids.reshape(-1, 250)
    assert np.quantile(np.ptp(batches, axis=1), 0.01) > 0.85 * 50_000
    neighbours = np.abs(np.diff(ids))
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.05
    assert (neighbours == 1).mean() < 0.01


def test_windows_of_the_lanes_dont_end_together() -> None:
    order = Order([100_000], seed=0, block=256, lanes=16, window=1024)
    new = []
    seen: set[object] = set()
    for t in range(300):
        windows = set(order.slots(Cursor(0, 256 * t), 256).windows)
        new.append(len(windows - seen))
        seen |= windows
    assert new[0] == 16
    assert max(new[1:]) == 1


@pytest.mark.slow
def test_five_billion_samples() -> None:
    order = Order([10_000] * 500_000, seed=0, block=256, lanes=64, window=4096)
    late = order.slots(Cursor(0, 4_000_000_000), 4096)
    assert len(set(late.ids.tolist())) == 4096
    assert late.ids.max() < 5_000_000_000
    assert order.size_bytes < 100 * 2**20
