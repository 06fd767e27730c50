"""The training loader: every global batch is a function of (data sets, seed, cursor) alone.

Ranks take contiguous slots of a global batch and workers contiguous parts of a rank's, so the batch is the same for
any number of either. The state is a `Cursor`, which moves on when the caller takes a step; reading ahead doesn't touch
it. A sample that can't be read keeps its slot with weight 0, is logged by name, and ends the run when there are many.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from torch import Tensor

from pipeline.data.batch import Batch, Transform
from pipeline.data.order.capacity import check_batch, check_data
from pipeline.data.order.mixture import Data, sources_of
from pipeline.data.order.permutation import Cursor, advance
from pipeline.data.order.tasks import SweepPlan, TrainPlan
from pipeline.data.reading.background import Background
from pipeline.data.reading.cache import RangeCache
from pipeline.data.reading.examples import Workshop
from pipeline.data.reading.faults import Tally
from pipeline.data.reading.takedown import Takedown
from pipeline.errors import DataError

__all__ = ["Cursor", "Loader", "Step", "sweep"]


class Step(NamedTuple):
    """A rank's share of one global batch."""

    micro: tuple[Batch, ...]
    after: Cursor  # where to go on once the step is done
    wait_s: float  # how long the caller waited for it


class Loader:
    """Endless steps of training data.

    Args:
        data: a data set, or several with their shares.
        transform: makes examples; runs in the workers.
        seed: of the run; with the epoch it fixes the order, with the epoch and the id a sample's own seed.
        global_batch: samples per step over all ranks.
        rank: this process's number.
        world_size: number of ranks; must divide `global_batch`.
        micro_batch: samples per batch of a step; the last may be smaller. None: the whole share in one.
        workers: processes that read and decode; 0 does it in a thread of this process.
        block: neighbouring samples kept together by the shuffle, and read as one range.
        lanes: streams a global batch is taken from; must divide `global_batch`.
        window: samples shuffled among each other within a lane; a lane's current window is held in memory, encoded.
        copies: how often each drawn sample stands in the batch, with a seed of its own each time; decoded once.
        max_unreadable: share of unreadable samples beyond which the run ends.
        takedown: samples that are left out, at weight 0.
        cache: for remote shards.

    Raises:
        ConfigError: numbers that don't divide, more workers than there is work for.
        DataError: a data set has fewer samples than a global batch takes of it.
    """

    def __init__(
        self,
        data: Data,
        transform: Transform,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world_size: int,
        micro_batch: int | None = None,
        workers: int = 0,
        block: int = 256,
        lanes: int = 16,
        window: int = 1024,
        copies: int = 1,
        max_unreadable: float = 0.01,
        takedown: Takedown | None = None,
        cache: RangeCache | None = None,
    ) -> None:
        check_batch(global_batch, world_size=world_size, workers=workers, lanes=lanes, copies=copies)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        check_data(data, global_batch, copies)
        sources = sources_of(data)
        self._share = global_batch // world_size
        self._plan = TrainPlan(
            sources,
            seed,
            global_batch,
            block,
            lanes,
            window,
            copies,
            Cursor(),
            rank * self._share,
            (rank + 1) * self._share,
        )
        self.epoch_length = copies * sum(source.num_samples for source in sources)  # what a cursor's epoch counts
        self._workshop = Workshop(transform, takedown or Takedown(), cache)
        self._micro_batch = min(micro_batch or self._share, self._share)
        self._workers = workers
        self._max_unreadable = max_unreadable
        self._where = ", ".join(source.manifest.url for source in sources)
        self._run: Background | None = None

    def steps(self, start: Cursor) -> Iterator[Step]:
        """Steps from `start` on, without end. Reading begins at once; steps of an earlier call end.

        Raises (while iterating):
            DataError: too many samples are unreadable, or the data set is damaged.
            StorageError: it can't be read.
        """
        self.close()
        start = advance(start, 0, self.epoch_length)
        plan = dataclasses.replace(self._plan, start=start)
        self._run = Background(plan, self._share, self._workers, self._workshop, unit=plan.copies)
        return self._take(self._run, start)

    def close(self) -> None:
        """End the workers; steps that are being iterated end too."""
        if self._run is not None:
            self._run.close()
            self._run = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, run: Background, cursor: Cursor) -> Iterator[Step]:
        tally = Tally(self._where, self._max_unreadable)
        try:
            while True:
                asked = time.perf_counter()
                part = run.next()
                if part is None:
                    return
                wait_s = time.perf_counter() - asked
                tally.add(part)
                cursor = advance(cursor, self._plan.global_batch, self.epoch_length)
                yield Step(_cut(part.batch, self._micro_batch), cursor, wait_s)
        finally:
            run.close()


def sweep(
    data: Data,
    transform: Transform,
    *,
    rank: int,
    world_size: int,
    batch: int,
    workers: int = 0,
    seed: int = 0,
    block: int = 256,
    takedown: Takedown | None = None,
    cache: RangeCache | None = None,
) -> Iterator[Batch]:
    """Each sample of a data set, or of several, once over all ranks, ids rising.

    All ranks get equally many batches of equal size, at most `batch`; what is left over is padding with id -1 and
    weight 0. Unreadable samples have weight 0 and are logged. `block` decides what a subset consists of, as in
    training.

    Raises:
        DataError: the data set is empty or damaged.
        StorageError: it can't be read.
    """
    sources = sources_of(data)
    num_samples = sum(source.num_samples for source in sources)
    where = ", ".join(source.manifest.url for source in sources)
    if num_samples == 0:
        raise DataError("no samples", where=where, fix="give a data set that isn't empty")
    if batch < 1 or not 0 <= rank < world_size:
        raise ValueError(f"batch {batch}, rank {rank} of {world_size}")
    num_batches = -(-num_samples // (batch * world_size))
    size = -(-num_samples // (num_batches * world_size))  # the least padding that many batches allow
    plan = SweepPlan(sources, seed, block, rank, world_size, size, num_batches)
    workshop = Workshop(transform, takedown or Takedown(), cache)
    return _swept(plan, size, min(workers, size), workshop, where)


def _swept(plan: SweepPlan, size: int, workers: int, workshop: Workshop, where: str) -> Iterator[Batch]:
    run = Background(plan, size, workers, workshop)  # here, not above: a sweep never begun leaves nothing to end
    tally = Tally(where, 1.0)
    try:
        while (part := run.next()) is not None:
            tally.add(part)
            yield part.batch
    finally:
        run.close()


def _cut(batch: Batch, size: int) -> tuple[Batch, ...]:
    """Micro batches of `size`, the last perhaps smaller; views of the whole."""

    def part(tensor: Tensor | None, at: slice) -> Tensor | None:
        return None if tensor is None else tensor[at]

    slices = [slice(i, i + size) for i in range(0, len(batch), size)]
    return tuple(
        Batch(
            ids=batch.ids[at],
            seeds=batch.seeds[at],
            weight=batch.weight[at],
            position=batch.position,
            images=part(batch.images, at),
            text=part(batch.text, at),
            labels=part(batch.labels, at),
            instances=None if batch.instances is None else batch.instances[at],
        )
        for at in slices
    )
