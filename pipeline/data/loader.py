"""The training loader: every global batch is a function of (manifest, seed, cursor) alone.

Ranks take contiguous slots of a global batch and workers contiguous parts of a rank's, so the batch is the same for
any number of either. The state is a `Cursor`, which moves on when the caller takes a step; reading ahead doesn't touch
it. A sample that can't be read keeps its slot with weight 0, is logged by name, and ends the run when there are many.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from pipeline.data.batch import Batch, Transform
from pipeline.data.examples import Fault, Part, Plan, SweepPlan, TrainPlan, produce
from pipeline.data.manifest import Manifest
from pipeline.data.order import Cursor, advance
from pipeline.data.worker import WorkerProcess
from pipeline.errors import ConfigError, DataError

__all__ = ["Cursor", "Loader", "Step", "check_fills", "sweep"]

_READY_STEPS = 2  # batches made and not yet taken
_TALLY_FLOOR = 1000  # samples the share of unreadable ones is counted on at least

logger = logging.getLogger(__name__)
ItemT = TypeVar("ItemT")


class Step(NamedTuple):
    """A rank's share of one global batch."""

    micro: tuple[Batch, ...]
    after: Cursor  # where to go on once the step is done
    wait_s: float  # how long the caller waited for it


class Loader:
    """Endless steps of training data.

    Args:
        manifest: of the data set.
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
        max_unreadable: share of unreadable samples beyond which the run ends.

    Raises:
        ConfigError: numbers that don't divide.
        DataError: the data set has fewer samples than a global batch.
    """

    def __init__(
        self,
        manifest: Manifest,
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
        max_unreadable: float = 0.01,
    ) -> None:
        _check_batch(global_batch, world_size, lanes)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        check_fills(manifest, global_batch)
        self.manifest = manifest
        self.num_samples = manifest.num_samples
        self._transform = transform
        self._seed = seed
        self._global_batch = global_batch
        self._order = (block, lanes, window)
        self._share = global_batch // world_size
        self._first_slot = rank * self._share
        self._micro_batch = min(micro_batch or self._share, self._share)
        self._workers = min(workers, self._share)
        self._max_unreadable = max_unreadable
        self._run: _Run | None = None

    def steps(self, start: Cursor) -> Iterator[Step]:
        """Steps from `start` on, without end. Reading begins at once; steps of an earlier call end.

        Raises (while iterating):
            DataError: too many samples are unreadable, or the data set is damaged.
            StorageError: it can't be read.
        """
        self.close()
        start = advance(start, 0, self.num_samples)
        block, lanes, window = self._order
        plans = [
            TrainPlan(
                self.manifest,
                self._seed,
                self._global_batch,
                block,
                lanes,
                window,
                start,
                self._first_slot + first,
                self._first_slot + stop,
            )
            for first, stop in _parts(self._share, self._workers)
        ]
        self._run = _Run(plans, self._transform, processes=self._workers > 0)
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

    def _take(self, run: _Run, cursor: Cursor) -> Iterator[Step]:
        tally = _Tally(self.manifest, self._max_unreadable)
        try:
            while True:
                asked = time.perf_counter()
                part = run.next()
                if part is None:
                    return
                wait_s = time.perf_counter() - asked
                tally.add(part)
                cursor = advance(cursor, self._global_batch, self.num_samples)
                yield Step(_cut(part.batch, self._micro_batch), cursor, wait_s)
        finally:
            run.close()


def check_fills(manifest: Manifest, global_batch: int) -> None:
    """Refuse a data set that doesn't fill one global batch.

    Raises:
        DataError: naming the batch that it would fill.
    """
    if manifest.num_samples < global_batch:
        raise DataError(
            f"{manifest.num_samples} samples don't fill a global batch of {global_batch}",
            where=manifest.url,
            fix=f"set data.global_batch to at most {manifest.num_samples}, or give more data"
            if manifest.num_samples
            else "give a data set that isn't empty",
        )


def sweep(
    manifest: Manifest,
    transform: Transform,
    *,
    rank: int,
    world_size: int,
    batch: int,
    workers: int = 0,
    seed: int = 0,
) -> Iterator[Batch]:
    """Each sample of a data set once over all ranks, ids rising.

    All ranks get equally many batches of equal size, at most `batch`; what is left over is padding with id -1 and
    weight 0. Unreadable samples have weight 0 and are logged.

    Raises:
        DataError: the data set is empty or damaged.
        StorageError: it can't be read.
    """
    if manifest.num_samples == 0:
        raise DataError("no samples", where=manifest.url, fix="give a data set that isn't empty")
    if batch < 1 or not 0 <= rank < world_size:
        raise ValueError(f"batch {batch}, rank {rank} of {world_size}")
    num_batches = -(-manifest.num_samples // (batch * world_size))
    size = -(-manifest.num_samples // (num_batches * world_size))  # the least padding that many batches allow
    workers = min(workers, size)
    plans = [
        SweepPlan(manifest, seed, rank, world_size, size, num_batches, first, stop)
        for first, stop in _parts(size, workers)
    ]
    return _swept(plans, transform, manifest, processes=workers > 0)


def _swept(plans: Sequence[Plan], transform: Transform, manifest: Manifest, *, processes: bool) -> Iterator[Batch]:
    run = _Run(plans, transform, processes=processes)  # here, not above: a sweep never begun leaves nothing to end
    tally = _Tally(manifest, 1.0)
    try:
        while (part := run.next()) is not None:
            tally.add(part)
            yield part.batch
    finally:
        run.close()


class _Run:
    """Parts made in the background by one thread here, or by processes whose parts a thread puts together."""

    def __init__(self, plans: Sequence[Plan], transform: Transform, *, processes: bool) -> None:
        self._stop = threading.Event()
        self._ready: _Channel[Part] = _Channel(_READY_STEPS)
        self._workers = [WorkerProcess(plan, transform) for plan in plans] if processes else []
        source = self._gathered() if processes else produce(plans[0], transform, self._stop)
        self._thread = threading.Thread(target=self._fill, args=(source,), name="loader", daemon=True)
        self._thread.start()

    def next(self) -> Part | None:
        """The next part, None after the last or when closed."""
        return self._ready.get()

    def close(self) -> None:
        """End thread and processes; waits for a read under way."""
        self._stop.set()
        self._ready.close()
        for worker in self._workers:
            worker.kill()
        if self._thread is not threading.current_thread():
            self._thread.join()
        for worker in self._workers:
            worker.close()

    def _fill(self, source: Iterator[Part]) -> None:
        try:
            for part in source:
                if not self._ready.put(part):
                    break
            else:
                self._ready.end(None)
        except BaseException as error:
            self._ready.end(error)
        finally:
            source.close()  # type: ignore[attr-defined]  # a generator: its reads end here, in their thread

    def _gathered(self) -> Iterator[Part]:
        for worker in self._workers:
            worker.start()
        while True:
            parts = [worker.receive() for worker in self._workers]
            present = [part for part in parts if part is not None]
            if not present:
                return
            yield _join(present)


class _Channel(Generic[ItemT]):
    """A bounded queue between two threads that either side can end."""

    def __init__(self, size: int) -> None:
        self._items: deque[ItemT] = deque()
        self._size = size
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None

    def put(self, item: ItemT) -> bool:
        """Wait for room and add the item; False when nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._size or self._closed)
            if not self._closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._closed

    def end(self, error: BaseException | None) -> None:
        """No more items come; `error` is raised to the taker once it has taken the others."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def get(self) -> ItemT | None:
        """The next item, None after the last or when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended or self._closed)
            if self._closed:
                return None
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            return None

    def close(self) -> None:
        """Nothing is wanted any more."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


class _Tally:
    """Counts and names unreadable samples."""

    def __init__(self, manifest: Manifest, limit: float) -> None:
        self._manifest = manifest
        self._limit = limit
        self._num_seen = 0
        self._num_faults = 0
        self._named: set[int] = set()

    def add(self, part: Part) -> None:
        """Count a part's samples; DataError when too many were unreadable."""
        self._num_seen += len(part.batch)
        for fault in part.faults:
            self._num_faults += 1
            if fault.id not in self._named:
                self._named.add(fault.id)
                logger.warning("unreadable sample %s; its slot counts nothing", _name(fault, self._manifest))
        if part.faults and self._num_faults > self._limit * max(self._num_seen, _TALLY_FLOOR):
            raise DataError(
                f"{self._num_faults} of {self._num_seen} samples are unreadable, over the limit of {self._limit:.2%}; "
                f"the last: {_name(part.faults[-1], self._manifest)}",
                where=self._manifest.url,
                fix="find the damage with `vitrail verify`, rebuild, or raise data.max_unreadable",
            )


def _name(fault: Fault, manifest: Manifest) -> str:
    key = repr(fault.key) if fault.key else f"number {manifest.locate(fault.id)[1]}"
    return f"{key} of {fault.shard} (id {fault.id}): {fault.reason}"


def _parts(size: int, workers: int) -> list[tuple[int, int]]:
    """[start, stop) of each worker's part of `size` slots."""
    count = max(1, workers)
    return [(size * i // count, size * (i + 1) // count) for i in range(count)]


def _join(parts: Sequence[Part]) -> Part:
    """Parts of one batch, one after the other."""
    if len(parts) == 1:
        return parts[0]
    batches = [part.batch for part in parts]

    def cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    joined = Batch(
        ids=torch.cat([b.ids for b in batches]),
        seeds=torch.cat([b.seeds for b in batches]),
        weight=torch.cat([b.weight for b in batches]),
        position=batches[0].position,
        images=cat([b.images for b in batches]),
        text=cat([b.text for b in batches]),
        labels=cat([b.labels for b in batches]),
        instances=None
        if batches[0].instances is None
        else tuple(instances for b in batches for instances in b.instances or ()),
    )
    return Part(joined, tuple(fault for part in parts for fault in part.faults))


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


def _check_batch(global_batch: int, world_size: int, lanes: int) -> None:
    """ConfigError unless ranks and lanes divide the global batch."""
    divisors = [n for n in range(1, global_batch + 1) if global_batch % n == 0]

    def near(n: int) -> str:
        below, above = [d for d in divisors if d < n][-3:], [d for d in divisors if d > n][:3]
        return ", ".join(map(str, below + above))

    if global_batch % world_size:
        raise ConfigError(
            f"{world_size} ranks don't divide a global batch of {global_batch}",
            where="data.global_batch",
            fix=f"run on {near(world_size)} ranks, or change the global batch",
        )
    if global_batch % lanes:
        raise ConfigError(
            f"{lanes} lanes don't divide a global batch of {global_batch}",
            where="data.lanes",
            fix=f"set data.lanes to {near(lanes)}",
        )
