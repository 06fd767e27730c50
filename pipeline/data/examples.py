"""What a loader's worker does, be it a thread or a process: from a plan of sample ids to collated examples.

A *plan* says which samples make which batch; a *task* is one worker's part of one batch; a *part* is the task done.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from pipeline.data.batch import Batch, Example, Transform, collate, derive_seed
from pipeline.data.images import UnreadableSample
from pipeline.data.manifest import Manifest
from pipeline.data.order import Cursor, Order, Window, advance
from pipeline.data.shards import ReadAhead, ShardReader

READ_AHEAD_STEPS = 8  # batches whose data are being read while one is made
_SWEEP_READ = 256  # samples per ranged read of a sweep


class Task(NamedTuple):
    """One worker's part of a batch."""

    ids: Int64[np.ndarray, " n"]  # -1 for padding
    seeds: Sequence[int]
    groups: Sequence[Hashable]  # what is read together
    group_of: Int64[np.ndarray, " n"]  # index into `groups`
    position: int


class Fault(NamedTuple):
    """A sample that couldn't be used."""

    id: int
    shard: str
    key: str  # "" where even the key couldn't be read
    reason: str


class Part(NamedTuple):
    """A task's samples, in its order, the unreadable ones with weight 0."""

    batch: Batch
    faults: tuple[Fault, ...]


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """Slots [slot_start, slot_stop) of every global batch from a cursor on, without end."""

    manifest: Manifest
    seed: int
    global_batch: int
    block: int
    lanes: int
    window: int
    start: Cursor
    slot_start: int
    slot_stop: int

    def open(self) -> OpenTrainPlan:
        return OpenTrainPlan(self)


class OpenTrainPlan:
    """A `TrainPlan` with its order laid out."""

    def __init__(self, plan: TrainPlan) -> None:
        self.plan = plan
        sizes = [shard.num_samples for shard in plan.manifest.shards]
        self.order = Order(sizes, seed=plan.seed, block=plan.block, lanes=plan.lanes, window=plan.window)

    def tasks(self) -> Iterator[Task]:
        """The worker's part of each global batch."""
        plan, cursor = self.plan, self.plan.start
        while True:
            slots = self.order.slots(cursor, plan.global_batch, plan.slot_start, plan.slot_stop)
            pairs = zip(slots.epochs.tolist(), slots.ids.tolist(), strict=True)
            yield Task(
                ids=slots.ids,
                seeds=[derive_seed(plan.seed, epoch, sample_id) for epoch, sample_id in pairs],
                groups=slots.windows,
                group_of=slots.window_of,
                position=cursor.epoch * self.order.num_samples + cursor.offset,
            )
            cursor = advance(cursor, plan.global_batch, self.order.num_samples)

    def ranges(self, group: Hashable) -> Sequence[tuple[int, int]]:
        """Id ranges to read for a window."""
        assert isinstance(group, Window)
        return self.order.ranges(group)


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """Positions [start, stop) of a rank's batches, each sample of the data set once over all ranks, ids rising."""

    manifest: Manifest
    seed: int
    rank: int
    world_size: int
    batch: int  # of one rank
    num_batches: int
    start: int
    stop: int

    def open(self) -> SweepPlan:
        return self

    def tasks(self) -> Iterator[Task]:
        """The worker's part of each batch."""
        for number in range(self.num_batches):
            first = (number * self.world_size + self.rank) * self.batch
            ids = np.arange(first + self.start, first + self.stop, dtype=np.int64)
            ids[ids >= self.manifest.num_samples] = -1
            present = ids[ids >= 0]
            groups = [(int(present[0]), int(present[-1]) + 1)] if len(present) else []
            yield Task(
                ids=ids,
                seeds=[derive_seed(self.seed, 0, sample_id) if sample_id >= 0 else 0 for sample_id in ids.tolist()],
                groups=groups,
                group_of=np.zeros(len(ids), dtype=np.int64),
                position=0,
            )

    def ranges(self, group: Hashable) -> Sequence[tuple[int, int]]:
        """Id ranges to read for a run of samples: cut at the shards' borders and to a moderate length."""
        assert isinstance(group, tuple)
        at, stop = group
        ranges = []
        while at < stop:
            shard, _ = self.manifest.locate(at)
            end = min(stop, at + _SWEEP_READ, int(self.manifest.starts[shard + 1]))
            ranges.append((at, end))
            at = end
        return ranges


Plan = TrainPlan | SweepPlan


def produce(plan: Plan, transform: Transform, stop: threading.Event) -> Iterator[Part]:
    """Do a plan's tasks in turn, reading ahead.

    Args:
        plan: what to make.
        transform: makes an example of a raw sample.
        stop: ends the waiting for a store that doesn't answer.

    Raises:
        DataError, StorageError: the data set can't be read.
    """
    opened = plan.open()
    reader = ShardReader(plan.manifest, stop)
    ahead = ReadAhead[Hashable](reader, opened.ranges)
    blank = transform.blank()
    waiting: deque[Task] = deque()
    tasks = opened.tasks()
    try:
        while True:
            while len(waiting) < READ_AHEAD_STEPS and (task := next(tasks, None)) is not None:
                waiting.append(task)
                ahead.want(task.groups)
            if not waiting:
                return
            yield _do(waiting.popleft(), transform, blank, reader, ahead)
            ahead.keep({group for task in waiting for group in task.groups})
    finally:
        ahead.close()


def _do(task: Task, transform: Transform, blank: Example, reader: ShardReader, ahead: ReadAhead[Hashable]) -> Part:
    examples: list[Example] = []
    weight: list[float] = []
    faults: list[Fault] = []
    ids = task.ids.tolist()
    for sample_id, seed, group in zip(ids, task.seeds, task.group_of.tolist(), strict=True):
        example, key = blank, ""
        if sample_id >= 0:
            try:
                sample = ahead.sample(task.groups[group], sample_id)
                key = sample.key
                example = transform(sample, seed)
            except UnreadableSample as unreadable:
                faults.append(Fault(sample_id, reader.shard_name(sample_id), key, unreadable.reason))
            except Exception as error:
                error.add_note(f"while reading sample {sample_id} ({key!r} of {reader.shard_name(sample_id)})")
                raise
        examples.append(example)
        weight.append(float(example is not blank))
    return Part(collate(examples, ids, task.seeds, weight, task.position), tuple(faults))
