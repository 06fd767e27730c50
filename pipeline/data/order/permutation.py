"""The order of training samples: a function of (shard sizes, seed, epoch) alone.

An epoch is laid out in four moves:

1. each shard is cut into *blocks* of about `block` neighbouring samples;
2. the blocks are permuted by (seed, epoch) and laid end to end;
3. that line is cut into `lanes` pieces of equal length (give or take one; a cut may fall inside a block);
4. each lane is permuted inside *windows* of `window` positions, whose borders are staggered over the lanes so that
   lanes don't all turn to new data in the same step.

Sample k of the epoch's stream is position k // lanes of lane k % lanes, so neighbours of the stream come from far
apart in the data. Epochs follow one another without a gap: a global batch may begin in one and end in the next.
Within a global batch, slots are arranged lane by lane, so a rank's contiguous slots come from few lanes, and it reads
little of what other ranks read.

A *subset* is an even share of every block: its first samples. So it is spread over the whole data set, however that is
sorted, and is still read in runs.

Nothing is stored but the permutation of the blocks, 4 bytes a block, and where every 64th of them comes to lie; a
subset keeps its blocks as well, 12 bytes each.

Permutations are made by sorting raw 64-bit draws of Philox, a stream that numpy fixes for all versions (unlike that of
its `permutation`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from pipeline.data.batch import derive_seed

_KEPT_WINDOWS = 256  # windows at hand; one lane needs one or two at a time
_STRIDE = 64  # blocks of the line between two whose place is stored
_CHUNK = 2**20  # blocks or draws worked on at a time


class Cursor(NamedTuple):
    """Where a run stands in its data; the loader's whole state, for any number of ranks and workers."""

    epoch: int = 0
    offset: int = 0  # samples of the epoch already consumed


def advance(cursor: Cursor, count: int, num_samples: int) -> Cursor:
    """The cursor after `count` more samples of a data set of `num_samples`."""
    epochs, offset = divmod(cursor.offset + count, num_samples)
    return Cursor(cursor.epoch + epochs, offset)


class Window(NamedTuple):
    """Names one window of an epoch: the unit in which data are read."""

    epoch: int
    lane: int
    number: int


class Slots(NamedTuple):
    """A run of slots of a global batch."""

    ids: Int64[np.ndarray, " n"]
    epochs: Int64[np.ndarray, " n"]  # the epoch a sample is drawn in; two values where a batch spans epochs
    windows: tuple[Window, ...]  # those the samples lie in, in the order of their first slot
    window_of: Int64[np.ndarray, " n"]  # index into `windows`


class Order:
    """The endless stream of samples.

    Args:
        shard_sizes: samples of each shard; ids number them through all shards.
        seed: of the run.
        block: samples per block, about; every shard has at least one block.
        lanes: number of lanes.
        window: positions permuted among each other.
        subset: how many of the samples are drawn at all; None: all of them.
    """

    def __init__(
        self, shard_sizes: Sequence[int], *, seed: int, block: int, lanes: int, window: int, subset: int | None = None
    ) -> None:
        if block < 1 or lanes < 1 or window < 1:
            raise ValueError(f"block, lanes and window must be positive: {block}, {lanes}, {window}")
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        num_all = int(sizes.sum())
        if subset is not None and not 0 < subset <= num_all:
            raise ValueError(f"a subset of {subset} of {num_all} samples")
        self.num_samples = num_all if subset is None else subset
        self.seed = seed
        self.lanes = lanes
        self.window = window
        self._blocks = _Blocks(sizes, block) if subset is None else _Subset(_Blocks(sizes, block), num_all, subset)
        self._epoch = functools.lru_cache(maxsize=2)(self._lay_out)
        self._window_ids = functools.lru_cache(maxsize=_KEPT_WINDOWS)(self._permuted)

    @property
    def size_bytes(self) -> int:
        """Memory of the blocks and of one epoch's line of them."""
        line_bytes = (4 if self._blocks.count < 2**31 else 8) * self._blocks.count + 8 * self._blocks.count // _STRIDE
        return self._blocks.size_bytes + line_bytes

    def drawn(self) -> list[tuple[int, int]]:
        """The samples that are drawn at all, as rising ranges [first id, last id + 1)."""
        starts, sizes = self._blocks.spans(np.arange(self._blocks.count))
        ends = starts + sizes
        first = np.append(True, starts[1:] != ends[:-1])
        last = np.append(first[1:], True)
        return list(zip(starts[first].tolist(), ends[last].tolist(), strict=True))

    def ids(self, epoch: int, stream: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Sample ids at indices of an epoch's stream."""
        return self._located(epoch, stream)[0]

    def slots(self, cursor: Cursor, size: int, start: int = 0, stop: int | None = None) -> Slots:
        """Slots [start, stop) of the global batch of `size` samples that begins at `cursor`."""
        epochs, stream = self._stream(cursor, size)
        arranged = np.argsort(stream % self.lanes, kind="stable")[start:stop]
        epochs, stream = epochs[arranged], stream[arranged]
        ids = np.empty(len(stream), dtype=np.int64)
        window_of = np.empty(len(stream), dtype=np.int64)
        windows: list[Window] = []
        for epoch in np.unique(epochs).tolist():
            of_epoch = np.flatnonzero(epochs == epoch)
            ids[of_epoch], groups = self._located(epoch, stream[of_epoch])
            for window, members in groups:
                window_of[of_epoch[members]] = len(windows)
                windows.append(window)
        return Slots(ids, epochs, tuple(windows), window_of)

    def ranges(self, window: Window) -> list[tuple[int, int]]:
        """The samples of a window as ranges [first id, last id + 1), each within one block; each is one read."""
        start, stop = self._span(window)
        line = self._epoch(window.epoch)
        ranges = []
        for first, place, size in line.blocks_from(start):
            begin, end = max(start - place, 0), min(stop - place, size)
            ranges.append((first + begin, first + end))
            if place + end == stop:
                return ranges
        raise AssertionError("the line ends within a window")

    def _stream(self, cursor: Cursor, size: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Epoch and stream index of the `size` samples from `cursor` on."""
        index = cursor.offset + np.arange(size, dtype=np.int64)
        epochs, stream = np.divmod(index, self.num_samples)
        return cursor.epoch + epochs, stream

    def _located(
        self, epoch: int, stream: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], list[tuple[Window, Int64[np.ndarray, " m"]]]]:
        """Ids at stream indices, and which of them lie in which window."""
        positions, lanes = np.divmod(stream, self.lanes)
        numbers = (positions + self._shift(lanes)) // self.window
        ids = np.empty(len(stream), dtype=np.int64)
        groups = _groups(epoch, lanes, numbers)
        for window, members in groups:
            ids[members] = self._window_ids(window)[positions[members] - self._first_position(window)]
        return ids, groups

    def _permuted(self, window: Window) -> Int64[np.ndarray, " n"]:
        """The window's samples in their order."""
        ids = np.concatenate([np.arange(first, stop, dtype=np.int64) for first, stop in self.ranges(window)])
        permuted: Int64[np.ndarray, " n"] = ids[_permutation(len(ids), derive_seed("window", self.seed, *window))]
        return permuted

    def _lay_out(self, epoch: int) -> _Line:
        return _Line(self._blocks, _permutation(self._blocks.count, derive_seed("blocks", self.seed, epoch)))

    def _shift(self, lanes: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """How far a lane's window borders are moved, evenly spread over the lanes."""
        return lanes * self.window // self.lanes

    def _first_position(self, window: Window) -> int:
        return max(0, window.number * self.window - window.lane * self.window // self.lanes)

    def _span(self, window: Window) -> tuple[int, int]:
        """[start, stop) of a window in the epoch's line."""
        short, longer = divmod(self.num_samples, self.lanes)
        lane_start = window.lane * short + min(window.lane, longer)
        lane_size = short + (window.lane < longer)
        end = (window.number + 1) * self.window - window.lane * self.window // self.lanes
        return lane_start + self._first_position(window), lane_start + min(end, lane_size)


class _Blocks:
    """All blocks, worked out from the shards' sizes whenever they are asked for; those of a shard differ in size by one
    at most.
    """

    def __init__(self, shard_sizes: Int64[np.ndarray, " shards"], block: int) -> None:
        self._sizes = shard_sizes[shard_sizes > 0]
        self._counts = np.maximum(1, (self._sizes + block // 2) // block)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._first = np.cumsum(self._counts) - self._counts  # number of each shard's first block
        self.count = int(self._counts.sum())
        self.size_bytes = 4 * self._sizes.nbytes

    def spans(self, numbers: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """First ids and sizes of blocks."""
        shard = np.searchsorted(self._first, numbers, side="right") - 1
        within, sizes, counts = numbers - self._first[shard], self._sizes[shard], self._counts[shard]
        starts = within * sizes // counts
        return self._starts[shard] + starts, (within + 1) * sizes // counts - starts


class _Subset:
    """The first samples of every block, an even share of each; blocks of which none is drawn are left out."""

    def __init__(self, blocks: _Blocks, num_all: int, num_drawn: int) -> None:
        starts, sizes = blocks.spans(np.arange(blocks.count))
        drawn = np.floor((starts + sizes) * (num_drawn / num_all)).astype(np.int64)  # up to and with each block
        drawn[-1] = num_drawn
        taken = np.minimum(np.diff(drawn, prepend=0), sizes)
        missing = num_drawn - int(taken.sum())  # rounding, at most a few
        if missing:
            taken[np.flatnonzero(taken < sizes)[:missing]] += 1
        present = taken > 0
        self._starts, self._sizes = starts[present], taken[present].astype(np.int32)
        self.count = len(self._starts)
        self.size_bytes = self._starts.nbytes + self._sizes.nbytes

    def spans(self, numbers: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """First ids and sizes of blocks."""
        return self._starts[numbers], self._sizes[numbers].astype(np.int64)


class _Line:
    """An epoch's blocks end to end, in their permuted order."""

    def __init__(self, blocks: _Blocks | _Subset, permutation: Int64[np.ndarray, " n"]) -> None:
        self._blocks = blocks
        self._permutation = permutation.astype(np.int32) if blocks.count < 2**31 else permutation
        sizes = np.empty(blocks.count, np.int32)
        for first in range(0, blocks.count, _CHUNK):
            stop = min(first + _CHUNK, blocks.count)
            sizes[first:stop] = blocks.spans(np.arange(first, stop))[1]
        strides = range(0, blocks.count, _STRIDE)
        totals = np.empty(len(strides), np.int64)
        per_chunk = _CHUNK // _STRIDE
        for first in range(0, len(strides), per_chunk):
            span = sizes[self._permutation[first * _STRIDE : (first + per_chunk) * _STRIDE]]
            totals[first : first + per_chunk] = np.add.reduceat(span, np.arange(0, len(span), _STRIDE), dtype=np.int64)
        self._places = np.cumsum(totals) - totals  # of every _STRIDE-th block

    def blocks_from(self, position: int) -> Iterator[tuple[int, int, int]]:
        """(first id, place in the line, size) of the block that holds a position, and of those that follow it."""
        stride = int(np.searchsorted(self._places, position, side="right")) - 1
        place = int(self._places[stride])
        for first in range(stride * _STRIDE, self._blocks.count, _STRIDE):
            starts, sizes = self._blocks.spans(self._permutation[first : first + _STRIDE].astype(np.int64))
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
                if place + size > position:
                    yield start, place, size
                place += size


def _permutation(count: int, seed: int) -> Int64[np.ndarray, " n"]:
    """0 .. count-1 in the order of `count` draws; of equal draws the earlier comes first.

    numpy sorts numbers several times as fast as it finds their order. So each draw's low bits are exchanged for its
    index, the numbers sorted, and those few put right that are alike in what remains.
    """
    bits = max(count - 1, 1).bit_length()
    keys = np.atleast_1d(np.random.Philox(key=seed).random_raw(count))
    for first in range(0, count, _CHUNK):  # in place, as billions of samples have many blocks
        chunk = keys[first : first + _CHUNK]
        chunk >>= bits
        chunk <<= bits
        chunk |= np.arange(first, first + len(chunk), dtype=np.uint64)
    keys.sort()
    alike = []
    for first in range(0, count, _CHUNK):
        rest = keys[first : first + _CHUNK + 1] >> bits
        alike.append(first + np.flatnonzero(rest[1:] == rest[:-1]))
    before = np.concatenate(alike)
    places = np.unique(np.concatenate([before, before + 1]))
    groups = keys[places] >> bits
    keys &= np.uint64(2**bits - 1)
    permutation = keys.view(np.int64)
    if len(places):
        draws = _draws_at(permutation[places], count, seed)
        permutation[places] = permutation[places[np.lexsort((draws, groups))]]
    return permutation


def _draws_at(indices: Int64[np.ndarray, " n"], count: int, seed: int) -> np.ndarray:
    """Some of `count` draws."""
    stream, drawn = np.random.Philox(key=seed), np.empty(len(indices), np.uint64)
    for first in range(0, count, _CHUNK):
        chunk = np.atleast_1d(stream.random_raw(min(_CHUNK, count - first)))
        in_chunk = (indices >= first) & (indices < first + len(chunk))
        drawn[in_chunk] = chunk[indices[in_chunk] - first]
    return drawn


def _groups(
    epoch: int, lanes: Int64[np.ndarray, " n"], numbers: Int64[np.ndarray, " n"]
) -> list[tuple[Window, Int64[np.ndarray, " m"]]]:
    """Members of each window, windows in the order of their first member."""
    groups: dict[Window, list[int]] = {}
    for i, (lane, number) in enumerate(zip(lanes.tolist(), numbers.tolist(), strict=True)):
        groups.setdefault(Window(epoch, lane, number), []).append(i)
    return [(window, np.asarray(members, dtype=np.int64)) for window, members in groups.items()]
