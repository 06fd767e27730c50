"""What a loader worker has to do: which samples make which batch, and which runs of bytes hold them.

A *task* is one worker's part of one batch. It is all a worker knows: manifests and orders, which may be large, stay in
the rank's own process. What a task reads is grouped (the windows of the order, a run of a sweep); a group is opened by
the first task that uses it and closed by the first that doesn't any more, and is read as a whole in between.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from pipeline.data.batch import derive_seed
from pipeline.data.manifest import Manifest
from pipeline.data.order.mixture import Stream, TrainingSource, first_ids
from pipeline.data.order.permutation import Cursor, Order, Window, advance

SWEEP_READ = 256  # samples per ranged read of a sweep


class ShardPlace(NamedTuple):
    """Where a shard lies."""

    url: str
    sha256: str
    index_url: str
    index_sha256: str
    num_samples: int
    size_bytes: int


class Read(NamedTuple):
    """Samples [first, stop) of a shard: one ranged read."""

    shard: ShardPlace
    first: int
    stop: int


class SampleLocation(NamedTuple):
    """Where a slot's sample lies: number `number` of its shard, which read `read` of the open group `group` covers."""

    group: int
    read: int
    number: int


class Task(NamedTuple):
    """One worker's part of a batch. A sample's copies stand side by side, as do their seeds."""

    ids: Int64[np.ndarray, " n"]  # -1 for padding
    seeds: Sequence[int]
    locations: Sequence[SampleLocation | None]  # None for padding
    copies: int  # slots of one sample
    position: int
    opens: dict[int, tuple[Read, ...]]
    closes: tuple[int, ...]  # not used by this task nor by later ones


class ManifestReads:
    """Ids of a data set to reads of its shards."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._places: dict[int, ShardPlace] = {}

    def read(self, first: int, stop: int) -> Read:
        """Samples [first, stop), which must lie in one shard."""
        number, at = self._manifest.locate(first)
        if at + stop - first > self._manifest.shards[number].num_samples:
            raise ValueError(f"samples [{first}, {stop}) lie in several shards")
        return Read(self._place(number), at, at + stop - first)

    def within(self, first: int, stop: int, longest: int) -> list[tuple[int, int]]:
        """[first, stop) cut at the shards' borders and to at most `longest`."""
        ranges = []
        while first < stop:
            shard, _ = self._manifest.locate(first)
            end = min(stop, first + longest, int(self._manifest.starts[shard + 1]))
            ranges.append((first, end))
            first = end
        return ranges

    def _place(self, number: int) -> ShardPlace:
        if number not in self._places:
            if len(self._places) > 4096:
                self._places.clear()
            shard = self._manifest.shards[number]
            self._places[number] = ShardPlace(
                self._manifest.tar_url(shard),
                shard.sha256,
                self._manifest.index_url(shard),
                shard.index_sha256,
                shard.num_samples,
                shard.size_bytes,
            )
        return self._places[number]


_OpenGroup = Callable[[Hashable], tuple[Sequence[tuple[int, int]], tuple[Read, ...]]]
"""Ranges of samples that belong to a group, and where each of them is read."""


class _Group(NamedTuple):
    number: int
    ranges: Sequence[tuple[int, int]]
    reads: tuple[Read, ...]


class _Groups:
    """The groups that one worker has open."""

    def __init__(self) -> None:
        self._open: dict[Hashable, _Group] = {}
        self._count = 0

    def task(
        self,
        ids: Int64[np.ndarray, " n"],
        seeds: Sequence[int],
        located: Sequence[tuple[Hashable, int] | None],
        group: _OpenGroup,
        copies: int,
        position: int,
    ) -> Task:
        """A task of slots located by (key of their group, sample as the group's ranges number it)."""
        opens: dict[int, tuple[Read, ...]] = {}
        locations: list[SampleLocation | None] = []
        used: set[Hashable] = set()
        for at in located:
            if at is None:
                locations.append(None)
                continue
            key, sample = at
            if key not in self._open:
                ranges, reads = group(key)
                self._open[key] = _Group(self._count, ranges, reads)
                opens[self._count] = reads
                self._count += 1
            used.add(key)
            opened = self._open[key]
            read = next(i for i, (first, stop) in enumerate(opened.ranges) if first <= sample < stop)
            number = opened.reads[read].first + sample - opened.ranges[read][0]
            locations.append(SampleLocation(opened.number, read, number))
        closes = tuple(self._open.pop(key).number for key in [key for key in self._open if key not in used])
        return Task(ids, seeds, locations, copies, position, opens, closes)


@dataclasses.dataclass(frozen=True)
class OrderOptions:
    """What fixes the order of samples, with the data sets: the same for any number of ranks and loader workers.

    Args:
        seed: of the run; with the epoch it fixes the order, with the epoch and the id a sample's own seed.
        global_batch: samples (slots) per step over all ranks.
        block: neighbouring samples kept together by the shuffle, and read as one range.
        lanes: streams a global batch is taken from; must divide `global_batch`.
        window: samples shuffled among each other within a lane; a lane's current window is held in memory, encoded.
        copies: how often each drawn sample stands in the batch, with a seed of its own each time; decoded once.
    """

    seed: int
    global_batch: int
    block: int = 256
    lanes: int = 16
    window: int = 1024
    copies: int = 1


@dataclasses.dataclass(frozen=True)
class Share:
    """Which rank's share of each global batch: contiguous slots."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size}")


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """A rank's slots [first_slot, stop_slot) of every global batch from a cursor on, without end.

    Args:
        sources: what the stream is mixed from.
        start: where to begin; counts slots.
    """

    sources: tuple[TrainingSource, ...]
    order: OrderOptions
    start: Cursor
    first_slot: int
    stop_slot: int

    def tasks(self, parts: Sequence[tuple[int, int]]) -> Iterator[list[Task]]:
        """For each step, the tasks of its parts, which are [start, stop) of the rank's own slots."""
        order = self.order
        stream = Stream(self.sources, seed=order.seed, block=order.block, lanes=order.lanes, window=order.window)
        opener = _Windows(stream)
        workers = [_Groups() for _ in parts]
        epoch_length, copies = stream.num_samples * order.copies, order.copies
        cursor = self.start
        while True:
            position = cursor.epoch * epoch_length + cursor.offset
            slots = stream.slots(
                position // copies, order.global_batch // copies, self.first_slot // copies, self.stop_slot // copies
            )
            pairs = list(zip(slots.epochs.tolist(), slots.ids.tolist(), strict=True))
            located = [
                (slots.windows[which], sample - stream.first_ids[slots.windows[which][0]])
                for which, (_, sample) in zip(slots.window_of.tolist(), pairs, strict=True)
            ]
            yield [
                groups.task(
                    np.repeat(slots.ids[start // copies : stop // copies], copies),
                    [
                        seed
                        for epoch, sample in pairs[start // copies : stop // copies]
                        for seed in sample_seeds(order.seed, epoch, sample, copies)
                    ],
                    [at for at in located[start // copies : stop // copies] for _ in range(copies)],
                    opener,
                    copies,
                    position,
                )
                for (start, stop), groups in zip(parts, workers, strict=True)
            ]
            cursor = advance(cursor, order.global_batch, epoch_length)


def sample_seeds(seed: int, epoch: int, sample_id: int, copies: int = 1) -> list[int]:
    """The seeds of a sample's copies in an epoch; the first is that of a sample drawn once."""
    return [derive_seed(seed, epoch, sample_id, *([copy] if copy else [])) for copy in range(copies)]


class _Windows:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._reads = [ManifestReads(source.manifest) for source in stream.sources]

    def __call__(self, key: Hashable) -> tuple[Sequence[tuple[int, int]], tuple[Read, ...]]:
        assert isinstance(key, tuple)
        source, window = key
        assert isinstance(window, Window)
        ranges = self._stream.ranges(source, window)
        return ranges, tuple(self._reads[source].read(first, stop) for first, stop in ranges)


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """A rank's batches, each sample once over all ranks, ids rising.

    Args:
        sources: what is swept; shares don't matter.
        seed: of the samples' own seeds.
        block: of subsets, see `pipeline.data.order.permutation.Order`.
        batch: samples per batch of one rank.
    """

    sources: tuple[TrainingSource, ...]
    seed: int
    block: int
    share: Share
    batch: int
    num_batches: int

    def tasks(self, parts: Sequence[tuple[int, int]]) -> Iterator[list[Task]]:
        """For each batch, the tasks of its parts, which are [start, stop) of the rank's own batch."""
        opener = _Runs(self.sources, self.block)
        workers = [_Groups() for _ in parts]
        for number in range(self.num_batches):
            first = (number * self.share.world_size + self.share.rank) * self.batch
            tasks = []
            for (start, stop), groups in zip(parts, workers, strict=True):
                key = (first + start, min(first + stop, opener.num_samples))
                listed = [sample for begin, end in opener.ranges(*key) for sample in range(begin, end)]
                located: list[tuple[Hashable, int] | None] = [(key, sample) for sample in listed]
                num_padding = stop - start - len(listed)
                tasks.append(
                    groups.task(
                        np.asarray([*listed, *([-1] * num_padding)], dtype=np.int64),
                        [*(derive_seed(self.seed, 0, sample) for sample in listed), *([0] * num_padding)],
                        [*located, *([None] * num_padding)],
                        opener,
                        1,
                        0,
                    )
                )
            yield tasks


class _Runs:
    """Runs of the samples that are swept, numbered through all sources."""

    def __init__(self, sources: Sequence[TrainingSource], block: int) -> None:
        self._sources = sources
        self._reads = [ManifestReads(source.manifest) for source in sources]
        self._first_ids = first_ids(sources)
        ranges = [
            (source_first + first, source_first + stop)
            for source, source_first in zip(sources, self._first_ids, strict=True)
            for first, stop in _drawn(source, block)
        ]
        self._starts = np.asarray([first for first, _ in ranges], dtype=np.int64)
        self._places = np.cumsum([0, *(stop - first for first, stop in ranges)])
        self.num_samples = int(self._places[-1])

    def ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Ids of the samples [start, stop) of the sweep, as ranges within one source each."""
        ranges = []
        while start < stop:
            at = int(np.searchsorted(self._places, start, side="right")) - 1
            end = min(stop, int(self._places[at + 1]))
            first = int(self._starts[at]) + start - int(self._places[at])
            ranges.append((first, first + end - start))
            start = end
        return ranges

    def __call__(self, key: Hashable) -> tuple[Sequence[tuple[int, int]], tuple[Read, ...]]:
        assert isinstance(key, tuple)
        ranges, reads = [], []
        for first, stop in self.ranges(*key):
            source = bisect.bisect_right(self._first_ids, first) - 1
            shift = self._first_ids[source]
            for begin, end in self._reads[source].within(first - shift, stop - shift, SWEEP_READ):
                ranges.append((begin + shift, end + shift))
                reads.append(self._reads[source].read(begin, end))
        return ranges, tuple(reads)


def _drawn(source: TrainingSource, block: int) -> list[tuple[int, int]]:
    if source.subset is None:
        return [(0, source.manifest.num_samples)] if source.manifest.num_samples else []
    sizes = [shard.num_samples for shard in source.manifest.shards]
    return Order(sizes, seed=0, block=block, lanes=1, window=1, subset=source.subset).drawn()


Plan = TrainPlan | SweepPlan
