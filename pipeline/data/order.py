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

Nothing is stored but the blocks' starts and sizes and their permutation: about 24 bytes a block.

Permutations are made by sorting raw 64-bit draws of Philox, a stream that numpy fixes for all versions (unlike that of
its `permutation`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from pipeline.data.batch import derive_seed

_KEPT_WINDOWS = 256  # permutations at hand; one lane needs one or two at a time


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
        self._blocks = _blocks(sizes, block, self.num_samples)
        self._epoch = functools.lru_cache(maxsize=2)(self._lay_out)
        self._permutation = functools.lru_cache(maxsize=_KEPT_WINDOWS)(self._permute_window)

    @property
    def size_bytes(self) -> int:
        """Memory of the blocks and of one epoch's permutation of them."""
        starts, sizes = self._blocks
        return starts.nbytes + sizes.nbytes + len(starts) * (4 if len(starts) < 2**31 else 8) + 8 * (len(starts) + 1)

    def drawn(self) -> list[tuple[int, int]]:
        """The samples that are drawn at all, as rising ranges [first id, last id + 1)."""
        starts, sizes = self._blocks
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
            here = np.flatnonzero(epochs == epoch)
            ids[here], groups = self._located(epoch, stream[here])
            for window, members in groups:
                window_of[here[members]] = len(windows)
                windows.append(window)
        return Slots(ids, epochs, tuple(windows), window_of)

    def ranges(self, window: Window) -> list[tuple[int, int]]:
        """The samples of a window as ranges [first id, last id + 1), each within one block; each is one read."""
        start, stop = self._span(window)
        starts, permutation, line = self._epoch(window.epoch)
        ranges = []
        place = int(np.searchsorted(line, start, side="right")) - 1
        while start < stop:
            end = min(int(line[place + 1]), stop)
            first = int(starts[permutation[place]]) + start - int(line[place])
            ranges.append((first, first + end - start))
            start, place = end, place + 1
        return ranges

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
        line = np.empty(len(stream), dtype=np.int64)
        groups = _groups(epoch, lanes, numbers)
        for window, members in groups:
            start, _ = self._span(window)
            line[members] = start + self._permutation(window)[positions[members] - self._first_position(window)]
        return self._ids_at(epoch, line), groups

    def _ids_at(self, epoch: int, line: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Ids at places of the line that the epoch's permuted blocks make."""
        starts, permutation, line_starts = self._epoch(epoch)
        place = np.searchsorted(line_starts, line, side="right") - 1
        ids: Int64[np.ndarray, " n"] = starts[permutation[place]] + line - line_starts[place]
        return ids

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(block starts by number, permutation, place of each permuted block's first sample in the line)."""
        starts, sizes = self._blocks
        permutation = _permutation(len(starts), derive_seed("blocks", self.seed, epoch))
        if len(starts) < 2**31:
            permutation = permutation.astype(np.int32)
        line = np.zeros(len(starts) + 1, dtype=np.int64)
        np.cumsum(sizes[permutation], out=line[1:])
        return starts, permutation, line

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

    def _permute_window(self, window: Window) -> np.ndarray:
        start, stop = self._span(window)
        return _permutation(stop - start, derive_seed("window", self.seed, *window))


def _blocks(sizes: Int64[np.ndarray, " shards"], block: int, num_drawn: int) -> tuple[np.ndarray, np.ndarray]:
    """First id of every block and how many of its samples are drawn; a shard's blocks differ in size by one at most."""
    sizes = sizes[sizes > 0]
    counts = np.maximum(1, (sizes + block // 2) // block)
    shard_starts = np.cumsum(sizes) - sizes
    shard = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the block within its shard
    starts = (shard_starts[shard] + number * sizes[shard] // counts[shard]).astype(np.int64)
    num_all = int(sizes.sum())
    ends = np.append(starts[1:], num_all)
    if num_drawn == num_all:
        return starts, (ends - starts).astype(np.int32)
    drawn = np.floor(ends * (num_drawn / num_all)).astype(np.int64)  # up to and with each block
    drawn[-1] = num_drawn
    taken = np.minimum(np.diff(drawn, prepend=0), ends - starts)
    missing = num_drawn - int(taken.sum())  # rounding, at most a few
    if missing:
        taken[np.flatnonzero(taken < ends - starts)[:missing]] += 1
    present = taken > 0
    return starts[present], taken[present].astype(np.int32)


def _permutation(count: int, seed: int) -> np.ndarray:
    draws = np.atleast_1d(np.random.Philox(key=seed).random_raw(count))
    return np.argsort(draws, kind="stable")


def _groups(
    epoch: int, lanes: Int64[np.ndarray, " n"], numbers: Int64[np.ndarray, " n"]
) -> list[tuple[Window, Int64[np.ndarray, " m"]]]:
    """Members of each window, windows in the order of their first member."""
    groups: dict[Window, list[int]] = {}
    for i, (lane, number) in enumerate(zip(lanes.tolist(), numbers.tolist(), strict=True)):
        groups.setdefault(Window(epoch, lane, number), []).append(i)
    return [(window, np.asarray(members, dtype=np.int64)) for window, members in groups.items()]
