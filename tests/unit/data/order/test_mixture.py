"""Mixtures: exact shares, every sample in its turn, subsets spread over the data, impossible numbers refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.images.transforms import EvalImage, ImageExample
from pipeline.data.manifest import Manifest
from pipeline.data.order.capacity import advice, check_batch, check_data, held_bytes
from pipeline.data.order.mixture import Shares, Stream, TrainingSource, shares_of
from pipeline.data.order.permutation import Order
from pipeline.errors import ConfigError, DataError
from tests.support.loaders import swept

SHARES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@given(shares=SHARES, start=st.integers(0, 300), size=st.integers(1, 80))
@settings(deadline=None, max_examples=60)
def test_every_stretch_holds_each_source_in_its_share(shares: list[int], start: int, size: int) -> None:
    """Against the definition: occurrence i of a source of share m is due at (i + 1/2) / m of a cycle."""
    mixed = Shares(shares)
    due = sorted((Fraction(2 * i + 1, 2 * m), j) for j, m in enumerate(mixed.shares) for i in range(m))
    drawn = [j for _, j in due] * (2 + (start + size) // mixed.cycle)
    assert mixed.counts(start) == tuple(drawn[:start].count(j) for j in range(len(shares)))
    found = np.subtract(mixed.counts(start + size), mixed.counts(start))
    assert sum(found) == size
    assert all(0 <= n <= most for n, most in zip(found, mixed.most(size), strict=True))
    assert all(abs(n - size * m / mixed.cycle) < len(shares) for n, m in zip(found, mixed.shares, strict=True))


def test_counts_far_out_are_found_at_once() -> None:
    mixed = Shares([3_000_000_001, 2_000_000_003, 17])
    position = 10**15 + 12345
    assert sum(mixed.counts(position)) == position
    assert mixed.counts(position + 1) >= mixed.counts(position)


def test_weights_are_the_decimals_they_are_written_as() -> None:
    assert shares_of([0.8, 0.2]) == (4, 1)
    assert shares_of([1, 2.5]) == (2, 5)
    assert shares_of([0.1, 0.2, 0.7]) == (1, 2, 7)
    with pytest.raises(ValueError, match="positive"):
        shares_of([1.0, 0.0])
    with pytest.raises(ValueError, match="fewer digits"):
        shares_of([1.0, 0.333333333333331])


def test_by_size_an_epoch_has_each_sample_once(ninety: Manifest, forty: Manifest) -> None:
    stream = Stream([TrainingSource(ninety, 90), TrainingSource(forty, 40)], seed=1, block=8, lanes=4, window=16)
    ids = np.concatenate([stream.slots(at, 13, 0, 13).ids for at in range(0, 260, 13)])
    assert sorted(ids[:130].tolist()) == sorted(ids[130:].tolist()) == list(range(130))


def test_repeats_come_more_often(ninety: Manifest, forty: Manifest) -> None:
    stream = Stream([TrainingSource(ninety, 90), TrainingSource(forty, 120)], seed=1, block=8, lanes=4, window=16)
    ids = stream.slots(0, 210, 0, 210).ids
    assert np.bincount(ids, minlength=130).tolist() == [1] * 90 + [3] * 40


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    share=st.floats(0.01, 1.0),
    block=st.integers(1, 20),
)
@settings(deadline=None, max_examples=80)
def test_a_subset_is_an_even_part_of_every_block(sizes: list[int], share: float, block: int) -> None:
    count = max(1, round(share * sum(sizes)))
    order = Order(sizes, seed=2, block=block, lanes=3, window=10, subset=count)
    ids = order.ids(0, np.arange(count))
    assert len(set(ids.tolist())) == count == order.num_samples
    assert sorted(ids.tolist()) == sorted(order.ids(4, np.arange(count)).tolist()), "always the same samples"
    assert sorted(ids.tolist()) == [i for first, stop in order.drawn() for i in range(first, stop)]
    before = np.searchsorted(np.sort(ids), np.arange(0, sum(sizes), max(block, 1)))
    even = np.arange(0, sum(sizes), max(block, 1)) * count / sum(sizes)
    assert np.abs(before - even).max() <= block + 2, "spread over the data"


def test_a_sweep_over_a_subset_sees_its_samples(ninety: Manifest, forty: Manifest) -> None:
    sources = (TrainingSource(ninety, 1, subset=30), TrainingSource(forty, 1))
    seen = [
        int(i)
        for rank in range(2)
        for batch in swept(sources, ImageExample(EvalImage((8, 8))), rank=rank, world_size=2, batch=16, block=8)
        for i in batch.ids
        if i >= 0
    ]
    sizes = [shard.num_samples for shard in ninety.shards]
    drawn = Order(sizes, seed=9, block=8, lanes=2, window=4, subset=30).drawn()
    assert sorted(seen) == [i for first, stop in drawn for i in range(first, stop)] + list(range(90, 130))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"workers": 9},
            r"2 ranks x 9 loader workers need 18 images a step, a global batch has 12.*set data.loader_workers=6",
        ),
        ({"copies": 4}, r"4 crops of each image don't divide the 6 samples.*set data.crops_per_image to 1, 2, 3, 6"),
        ({"copies": 3, "workers": 3}, r"has 4 of 3 crops each.*set data.loader_workers=2, or data.global_batch=18"),
    ],
)
def test_numbers_that_cant_be_served_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_batch(12, **{"world_size": 2, "workers": 0, "lanes": 4, "copies": 1, **changes})


def test_a_source_too_small_for_its_share_is_refused(ninety: Manifest, forty: Manifest) -> None:
    check_data((TrainingSource(ninety, 1), TrainingSource(forty, 1)), 64)
    with pytest.raises(DataError, match=r"takes up to \d+ of its 40 samples, some of them twice"):
        check_data((TrainingSource(ninety, 1), TrainingSource(forty, 3)), 64)


def test_crowded_lanes_are_advised_of(ninety: Manifest) -> None:
    assert advice(4096, world_size=2, workers=4, lanes=16) == []
    (line,) = advice(4096, world_size=64, workers=8, lanes=16)
    assert "512 readers" in line
    assert "data.lanes=512" in line
    assert held_bytes((TrainingSource(ninety, 1),), world_size=1, workers=1, lanes=4, window=16) > 0
