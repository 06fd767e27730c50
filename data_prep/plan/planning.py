"""The plan of a segment: every input gets a split and a place, the same in every run.

Inputs are shuffled over the whole data set and cut into partitions of even size, one per shard. The order is by a
bijective hash of (seed, position), so it needs no permutation in memory: inputs are scattered by the hash's upper bits
into buckets, which go to disk when they outgrow `memory_bytes` (`spill`), and each bucket is sorted separately.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, UInt64

from data_prep.config import SPLIT_NAME
from data_prep.plan.spill import Spill, join, widen
from data_prep.sources.base import SCHEMA
from pipeline.errors import DataError

MAX_SPLITS = 16
_BUCKET_BYTES = 8 * 2**20  # of the listing per bucket; a table is a few times larger in memory than on disk
_MAX_BUCKETS = 512


class Partition(NamedTuple):
    """The inputs of one shard, in the order in which they are stored."""

    split: str
    number: int
    inputs: pa.Table  # of sources.base.SCHEMA


def mix(values: UInt64[np.ndarray, " n"], seed: int) -> UInt64[np.ndarray, " n"]:
    """splitmix64's finaliser (Steele et al. 2014) over values offset by a hash of the seed: a bijection of 64 bits."""
    offset = np.uint64(int.from_bytes(hashlib.sha256(b"order %d" % seed).digest()[:8], "big"))
    with np.errstate(over="ignore"):
        z = values + offset
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def unit_interval(value: bytes, seed: int) -> float:
    """A number in [0, 1) drawn by `value` and the seed, which decides the split of all inputs with that value."""
    digest = hashlib.sha256(b"split %d " % seed + value).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def assign(values: Iterable[bytes], shares: dict[str, float], seed: int) -> pa.Array:
    """The split of each value, in proportion to the shares; equal values share one split."""
    names = list(shares)
    if len(names) == 1:
        return pa.array([names[0].encode()] * sum(1 for _ in values), pa.binary())
    bounds: Float64[np.ndarray, " s"] = np.cumsum(list(shares.values()))[:-1]
    draws = np.array([unit_interval(value, seed) for value in values])
    return pa.array([names[i].encode() for i in np.searchsorted(bounds, draws, side="right")], pa.binary())


class Fingerprint:
    """A digest of inputs, independent of how they were cut into batches.

    Args:
        marks: numbers of rows after which the digest so far is noted in `at`.
    """

    def __init__(self, marks: Sequence[int] = ()) -> None:
        self._digests = {name: (hashlib.sha256(), hashlib.sha256()) for name in SCHEMA.names[1:]}
        self._marks = deque(sorted(set(marks)))
        self.rows = 0
        self.at: dict[int, str] = {}  # number of rows -> digest of these rows

    def update(self, batch: pa.RecordBatch) -> None:
        """Add the next rows."""
        while self._marks and self._marks[0] <= self.rows + batch.num_rows:
            mark = self._marks.popleft()
            self._take(batch.slice(0, mark - self.rows))
            batch = batch.slice(mark - self.rows)
            self.rows = mark
            self.at[mark] = self.hexdigest()
        self._take(batch)
        self.rows += batch.num_rows

    def _take(self, batch: pa.RecordBatch) -> None:
        for name, (lengths, data) in self._digests.items():
            column = batch.column(name)
            if column.null_count == len(column):
                lengths.update(b"\xff" * (8 * len(column)))  # as -1 below
            elif pa.types.is_integer(column.type):
                lengths.update(pc.fill_null(column, -1).to_numpy().astype("<i8").tobytes())
            else:
                sizes = pc.fill_null(pc.binary_length(column), -1)
                lengths.update(sizes.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
                data.update(_joined(column.drop_null()))

    def hexdigest(self) -> str:
        """The digest of all rows so far."""
        whole = hashlib.sha256(b"%d" % self.rows)
        for lengths, data in self._digests.values():
            whole.update(lengths.digest() + data.digest())
        return whole.hexdigest()


class SegmentPlan:
    """All inputs of a segment, shuffled and cut into partitions. Use it as a context, which deletes its spill files.

    Args:
        seed: of the shuffle.
        samples: inputs per partition, at most.
        size_bytes: of the listing, from which the number of buckets follows (the order doesn't depend on it).
        memory_bytes: of inputs in memory before they go to disk.
    """

    def __init__(self, seed: int, samples: int, *, size_bytes: int, memory_bytes: int = 16 * 2**20) -> None:
        self.counts: Counter[str] = Counter()
        self._seed = seed
        self._samples = samples
        self._bits = min(max(0, (size_bytes // _BUCKET_BYTES).bit_length()), _MAX_BUCKETS.bit_length() - 1)
        self._spill = Spill(SCHEMA, 2**self._bits, memory_bytes)

    def __enter__(self) -> SegmentPlan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spill.close()

    def add(self, batch: pa.RecordBatch) -> None:
        """Add inputs; their `split` must be set.

        Raises:
            DataError: a split's name isn't valid, or there are implausibly many splits.
        """
        self._count(batch)
        order = self._order(batch)
        buckets = (
            (order >> np.uint64(64 - self._bits)).astype(np.uint16) if self._bits else np.zeros(len(order), np.uint16)
        )
        self._spill.put(batch, buckets)

    def splits(self) -> list[str]:
        """Names of the splits, in order."""
        return sorted(self.counts)

    def num_partitions(self, split: str) -> int:
        """How many partitions a split is cut into."""
        return -(-self.counts[split] // self._samples)

    def partitions(self) -> Iterator[Partition]:
        """The partitions in order; those of different splits may alternate."""
        pending: dict[str, list[pa.Table]] = {split: [] for split in self.splits()}
        numbers: Counter[str] = Counter()
        for bucket in self._spill.tables():
            rows = np.argsort(self._order(bucket))
            for split, held in pending.items():
                chosen = rows
                if len(pending) > 1:
                    chosen = rows[pc.equal(bucket.column("split"), split.encode()).to_numpy()[rows]]
                while 0 < (missing := self._size(split, numbers[split]) - sum(map(len, held))) <= len(chosen):
                    inputs = join([*held, bucket.take(pa.array(chosen[:missing]))])
                    yield Partition(split, numbers[split], widen(inputs, SCHEMA))
                    numbers[split] += 1
                    held.clear()
                    chosen = chosen[missing:]
                held.append(bucket.take(pa.array(chosen)))

    def _order(self, rows: pa.RecordBatch | pa.Table) -> UInt64[np.ndarray, " n"]:
        """The keys that the rows are sorted by."""
        return mix(rows.column("position").to_numpy().astype(np.uint64), self._seed)

    def _size(self, split: str, number: int) -> int:
        """Inputs of a partition: sizes within a split differ by one at most; 0 beyond the last."""
        count, cuts = self.counts[split], self.num_partitions(split)
        return (number + 1) * count // cuts - number * count // cuts if number < cuts else 0

    def _count(self, batch: pa.RecordBatch) -> None:
        for entry in pc.value_counts(batch.column("split")).to_pylist():
            name = (entry["values"] or b"").decode("utf-8", "replace")
            if name not in self.counts and not SPLIT_NAME.fullmatch(name):
                row = pc.index(batch.column("split"), entry["values"]).as_py() if entry["values"] is not None else None
                at = batch.column("position")[row].as_py() if row is not None and row >= 0 else "?"
                raise DataError(
                    f"{name!r} is not a split name",
                    where=f"source, input {at}, split column",
                    fix="use names of a-z, 0-9, '-' and '_', or unset source.split_column",
                )
            self.counts[name] += entry["counts"]
        if len(self.counts) > MAX_SPLITS:
            raise DataError(
                f"more than {MAX_SPLITS} different splits ({', '.join(sorted(self.counts)[:5])}, ...)",
                where="source, split column",
                fix="set source.split_column to the column that says train, validation, ...",
            )


def by_url(batch: pa.RecordBatch, shares: dict[str, float], seed: int) -> pa.RecordBatch:
    """The batch with splits that are drawn by its URLs."""
    if len(shares) == 1:
        return _with(batch, "split", pa.repeat(next(iter(shares)).encode(), batch.num_rows).cast(pa.binary()))
    urls = (value or b"" for value in batch.column("url").to_pylist())
    return _with(batch, "split", assign(urls, shares, seed))


def _with(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    return batch.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), column)


def _joined(column: pa.Array) -> bytes:
    """All values of a binary column without nulls, concatenated."""
    if len(column) == 0:
        return b""
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int32, count=len(column) + 1, offset=4 * column.offset)
    return bytes(memoryview(data)[bounds[0] : bounds[-1]]) if data is not None else b""
