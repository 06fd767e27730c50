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

from pipeline.data.batch import Batch, Transform
from pipeline.data.order.capacity import check_batch, check_data
from pipeline.data.order.mixture import Data, sources_of
from pipeline.data.order.permutation import Cursor, advance
from pipeline.data.order.tasks import OrderOptions, Share, SweepPlan, TrainPlan
from pipeline.data.reading.background import Background
from pipeline.data.reading.cache import RangeCache
from pipeline.data.reading.examples import WorkerSetup
from pipeline.data.reading.faults import FaultTally
from pipeline.data.reading.takedown import Takedown
from pipeline.errors import DataError

__all__ = ["Cursor", "Loader", "OrderOptions", "ReadingOptions", "Share", "Step", "sweep"]


class Step(NamedTuple):
    """A rank's share of one global batch."""

    micro: tuple[Batch, ...]
    after: Cursor  # where to go on once the step is done
    wait_s: float  # how long the caller waited for it


@dataclasses.dataclass(frozen=True)
class ReadingOptions:
    """How samples are read; nothing here changes which ones, or in which order.

    Args:
        workers: processes that read and decode; 0 does it in a thread of this process.
        takedown: samples that are left out, at weight 0.
        cache: for remote shards.
        max_unreadable: share of unreadable samples beyond which a run ends.
    """

    workers: int = 0
    takedown: Takedown = dataclasses.field(default_factory=Takedown)
    cache: RangeCache | None = None
    max_unreadable: float = 0.01


ALL = Share()  # of a world of one rank
READ_HERE = ReadingOptions()  # in a thread of this process


class Loader:
    """Endless steps of training data.

    Args:
        data: a data set, or several with their shares.
        transform: makes examples; runs in the loader workers.
        order: which samples make which batch.
        share: this rank's; the number of ranks must divide the global batch.
        micro_batch: samples per batch of a step; the last may be smaller. None: the whole share in one.

    Raises:
        ConfigError: numbers that don't divide, more workers than there is work for.
        DataError: a data set has fewer samples than a global batch takes of it.
    """

    def __init__(
        self,
        data: Data,
        transform: Transform,
        order: OrderOptions,
        share: Share = ALL,
        *,
        reading: ReadingOptions = READ_HERE,
        micro_batch: int | None = None,
    ) -> None:
        check_batch(
            order.global_batch,
            world_size=share.world_size,
            workers=reading.workers,
            lanes=order.lanes,
            copies=order.copies,
        )
        check_data(data, order.global_batch, order.copies)
        sources = sources_of(data)
        self._share = order.global_batch // share.world_size
        first_slot = share.rank * self._share
        self._plan = TrainPlan(sources, order, Cursor(), first_slot, first_slot + self._share)
        self.epoch_length = order.copies * sum(source.num_samples for source in sources)  # what a cursor's epoch counts
        self._setup = WorkerSetup(transform, reading.takedown, reading.cache)
        self._micro_batch = min(micro_batch or self._share, self._share)
        self._workers = reading.workers
        self._max_unreadable = reading.max_unreadable
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
        self._run = Background(plan, self._share, self._workers, self._setup, unit=plan.order.copies)
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
        tally = FaultTally(self._where, self._max_unreadable)
        try:
            while True:
                asked = time.perf_counter()
                part = run.next()
                if part is None:
                    return
                wait_s = time.perf_counter() - asked
                tally.add(part)
                cursor = advance(cursor, self._plan.order.global_batch, self.epoch_length)
                yield Step(part.batch.cut(self._micro_batch), cursor, wait_s)
        finally:
            run.close()


def sweep(
    data: Data,
    transform: Transform,
    share: Share = ALL,
    *,
    batch: int,
    seed: int = 0,
    block: int = 256,
    reading: ReadingOptions = READ_HERE,
) -> Iterator[Batch]:
    """Each sample of a data set, or of several, once over all ranks, ids rising.

    All ranks get equally many batches of equal size, at most `batch`; what is left over is padding with id -1 and
    weight 0. Unreadable samples have weight 0 and are logged, however many. `block` decides what a subset consists of,
    as in training.

    Raises:
        DataError: the data set is empty or damaged.
        StorageError: it can't be read.
    """
    sources = sources_of(data)
    num_samples = sum(source.num_samples for source in sources)
    where = ", ".join(source.manifest.url for source in sources)
    if num_samples == 0:
        raise DataError("no samples", where=where, fix="give a data set that isn't empty")
    if batch < 1:
        raise ValueError(f"batch {batch}")
    num_batches = -(-num_samples // (batch * share.world_size))
    size = -(-num_samples // (num_batches * share.world_size))  # the least padding that many batches allow
    plan = SweepPlan(sources, seed, block, share, size, num_batches)
    setup = WorkerSetup(transform, reading.takedown, reading.cache)
    return _swept(plan, size, min(reading.workers, size), setup, where)


def _swept(plan: SweepPlan, size: int, workers: int, setup: WorkerSetup, where: str) -> Iterator[Batch]:
    run = Background(plan, size, workers, setup)  # here, not above: a sweep never begun leaves nothing to end
    tally = FaultTally(where, 1.0)
    try:
        while (part := run.next()) is not None:
            tally.add(part)
            yield part.batch
    finally:
        run.close()
