import resource
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.plan.planning import Fingerprint, SegmentPlan, assign, mix
from data_prep.sources.base import SCHEMA
from pipeline.errors import DataError, StorageError


def batch(start: int, count: int, split: str | None = "train") -> pa.RecordBatch:
    rows = range(start, start + count)
    columns = {
        "position": pa.array(rows, pa.int64()),
        "url": pa.array([f"{i}.jpg".encode() for i in rows], pa.binary()),
        "caption": pa.array([b"c%d" % i if i % 3 else None for i in rows], pa.binary()),
        "split": pa.array([split.encode() if split else None] * count, pa.binary()),
    }
    return pa.RecordBatch.from_arrays(
        [columns.get(field.name, pa.nulls(count, field.type)) for field in SCHEMA], schema=SCHEMA
    )


def order(plan: SegmentPlan) -> list[tuple[str, int, list[int]]]:
    return [(p.split, p.number, p.inputs.column("position").to_pylist()) for p in plan.partitions()]


def planned(
    cuts: list[int], *, seed: int = 0, samples: int = 7, size_bytes: int = 0, memory_bytes: int = 1 << 20
) -> SegmentPlan:
    plan = SegmentPlan(seed, samples, size_bytes=size_bytes, memory_bytes=memory_bytes)
    start = 0
    for count in cuts:
        plan.add(batch(start, count))
        start += count
    return plan


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 3))
def test_every_input_is_in_one_partition_and_sizes_are_even(cuts: list[int], samples: int, seed: int) -> None:
    with planned(cuts, samples=samples, seed=seed) as plan:
        parts = order(plan)
        total = sum(cuts)
        assert sorted(i for _, _, rows in parts for i in rows) == list(range(total))
        assert [number for _, number, _ in parts] == list(range(plan.num_partitions("train")))
        sizes = [len(rows) for _, _, rows in parts]
        assert max(sizes) <= samples
        assert max(sizes) - min(sizes) <= 1


def test_the_order_depends_on_the_seed_alone() -> None:
    with planned([100]) as plan:
        reference = order(plan)
    with planned([1, 59, 40]) as plan:
        assert order(plan) == reference
    # Many buckets, on disk instead of in memory.
    with planned([30, 70], size_bytes=1 << 32, memory_bytes=1000) as plan:
        assert order(plan) == reference
    with planned([100], seed=1) as plan:
        assert order(plan) != reference


def test_the_order_is_a_shuffle() -> None:
    with planned([10_000], samples=10_000) as plan:
        rows = np.array(order(plan)[0][2])
    assert abs(np.corrcoef(rows, np.arange(10_000))[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(rows)) < 10) < 0.01


def test_the_hash_is_a_bijection() -> None:
    assert len(np.unique(mix(np.arange(100_000, dtype=np.uint64), 3))) == 100_000


@pytest.mark.parametrize("memory_bytes", [1, 1 << 20])
def test_values_come_back_whichever_inputs_have_them(memory_bytes: int) -> None:
    columns = {"caption": b"c", "captions": b"[]", "start": 3}  # each in one batch only, "extra" in none
    batches = []
    for number, (name, value) in enumerate(columns.items()):
        field = SCHEMA.field(name)
        without = batch(10 * number, 10).set_column(
            SCHEMA.get_field_index("caption"), "caption", pa.nulls(10, pa.binary())
        )
        batches.append(without.set_column(SCHEMA.get_field_index(name), field, pa.array([value] * 10, field.type)))
    with SegmentPlan(0, 4, size_bytes=1 << 30, memory_bytes=memory_bytes) as plan:
        for item in batches:
            plan.add(item)
        result = pa.concat_tables([part.inputs for part in plan.partitions()])
    assert result.schema == SCHEMA
    assert result.sort_by("position") == pa.Table.from_batches(batches)


def test_a_disk_without_room_for_the_plan_is_told() -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageError, match="can't be written to disk") as error:
            planned([3000, 3000], memory_bytes=10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "TMPDIR" in str(error.value)


def test_spilled_inputs_are_removed_in_the_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with planned([300], memory_bytes=10) as plan:
        assert list(tmp_path.iterdir())
        assert len(order(plan)) == plan.num_partitions("train")
    assert not list(tmp_path.iterdir())


def test_splits_have_their_shares_and_equal_values_share_one() -> None:
    shares = {"train": 0.8, "validation": 0.15, "heldout": 0.05}
    values = [b"%d" % i for i in range(20_000)]
    result = assign(values, shares, 0).to_pylist()
    counts = Counter(result)
    for name, share in shares.items():
        assert counts[name.encode()] / len(values) == pytest.approx(share, rel=0.1)
    assert assign(list(reversed(values)), shares, 0).to_pylist() == result[::-1]
    assert assign(values, shares, 1).to_pylist() != result


def test_the_fingerprint_knows_values_not_batches() -> None:
    def digest(*batches: pa.RecordBatch) -> str:
        fingerprint = Fingerprint()
        for item in batches:
            fingerprint.update(item)
        return fingerprint.hexdigest()

    whole = digest(batch(0, 30))
    assert digest(batch(0, 30).slice(0, 11), batch(0, 30).slice(11)) == whole
    assert digest(batch(0, 29)) != whole
    assert digest(batch(1, 30)) != whole
    urls = [b"ab", b"c", *[b""] * 28]
    moved = [b"a", b"bc", *[b""] * 28]
    column = SCHEMA.get_field_index("url")
    first, second = (
        digest(batch(0, 30).set_column(column, "url", pa.array(values, pa.binary()))) for values in (urls, moved)
    )
    assert first != second


@pytest.mark.parametrize(
    ("split", "message"), [("../etc", r"'\.\./etc' is not a split name"), (None, "'' is not a split name")]
)
def test_a_split_must_have_a_folders_name(split: str | None, message: str) -> None:
    with SegmentPlan(0, 10, size_bytes=0) as plan, pytest.raises(DataError, match=message):
        plan.add(batch(0, 3, split))


def test_a_column_of_many_values_is_no_split_column() -> None:
    with SegmentPlan(0, 10, size_bytes=0) as plan:
        for i in range(16):
            plan.add(batch(i, 1, f"value-{i}"))
        with pytest.raises(DataError, match="more than 16 different splits"):
            plan.add(batch(16, 1, "value-16"))
