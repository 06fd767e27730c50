"""What a loader worker does, be it a thread or a process: from tasks to collated examples.

A *task* (`pipeline.data.order.tasks`) is one worker's part of one batch; a *part* is the task done.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from pipeline.data.batch import Batch, Example, RawSample, SeveralTransform, Transform, collate
from pipeline.data.images.decode import UnreadableSample
from pipeline.data.order.tasks import Task
from pipeline.data.reading.cache import RangeCache
from pipeline.data.reading.shards import ReadAhead, ShardReader
from pipeline.data.reading.takedown import Takedown

READ_AHEAD_STEPS = 8  # batches whose data are being read while one is made


class Fault(NamedTuple):
    """A sample that couldn't be used."""

    id: int
    shard: str
    number: int  # within the shard
    key: str  # "" where even the key couldn't be read
    reason: str


class BatchPart(NamedTuple):
    """A task's samples, in its order, the unreadable and withdrawn ones with weight 0."""

    batch: Batch
    faults: tuple[Fault, ...]
    num_withdrawn: int = 0


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """How parts are made, whatever the task: what a loader worker is given once.

    Args:
        transform: makes examples.
        takedown: samples that are left out.
        cache: for remote shards.
    """

    transform: Transform
    takedown: Takedown = dataclasses.field(default_factory=Takedown)
    cache: RangeCache | None = None


@runtime_checkable
class Tasks(Protocol):
    """Where a worker gets its tasks from."""

    def get(self, *, wait: bool) -> Task | None:
        """The next task; None where there is none yet and `wait` is false, or after the last."""
        ...


class Listed:
    """Tasks from an iterator, available at once."""

    def __init__(self, tasks: Iterator[Task]) -> None:
        self._tasks = tasks

    def get(self, *, wait: bool) -> Task | None:
        return next(self._tasks, None)


def produce(tasks: Tasks, setup: WorkerSetup, stop: threading.Event) -> Iterator[BatchPart]:
    """Do tasks in turn, reading ahead.

    Args:
        tasks: what to make.
        setup: how.
        stop: ends the retries against a store that doesn't answer.

    Raises:
        DataError, StorageError: the data set can't be read.
    """
    ahead = ReadAhead(ShardReader(stop, setup.cache))
    blank = setup.transform.blank()
    waiting: deque[Task] = deque()
    try:
        while True:
            while len(waiting) < READ_AHEAD_STEPS and (task := tasks.get(wait=not waiting)) is not None:
                waiting.append(task)
                ahead.open(task.opens)
            if not waiting:
                return
            task = waiting.popleft()
            ahead.forget(task.closes)
            yield _do(task, setup, blank, ahead)
    finally:
        ahead.close()


def _do(task: Task, setup: WorkerSetup, blank: Example, ahead: ReadAhead) -> BatchPart:
    examples: list[Example] = []
    weight: list[float] = []
    faults: list[Fault] = []
    num_withdrawn = 0
    ids = task.ids.tolist()
    for slot in range(0, len(ids), task.copies):
        location, made, key = task.locations[slot], None, ""
        if location is not None:
            try:
                sample = ahead.sample(location, ids[slot])
                key = sample.key
                if key in setup.takedown:
                    num_withdrawn += 1
                else:
                    made = several(setup.transform, sample, task.seeds[slot : slot + task.copies])
            except UnreadableSample as unreadable:
                faults.append(Fault(ids[slot], ahead.shard(location).url, location.number, key, unreadable.reason))
            except Exception as error:
                error.add_note(f"while reading sample {ids[slot]} ({key!r} of {ahead.shard(location).url})")
                raise
        examples += [blank] * task.copies if made is None else made
        weight += [float(made is not None)] * task.copies
    return BatchPart(collate(examples, ids, task.seeds, weight, task.position), tuple(faults), num_withdrawn)


def several(transform: Transform, sample: RawSample, seeds: Sequence[int]) -> Sequence[Example]:
    """An example for each seed; a transform that is a `SeveralTransform` decodes once for all of them."""
    if len(seeds) > 1 and isinstance(transform, SeveralTransform):
        return transform.several(sample, seeds)
    return [transform(sample, seed) for seed in seeds]
