"""Parts made in the background: by a thread of this process, or by worker processes whose parts a thread joins."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.data.order.tasks import Plan
from pipeline.data.reading.examples import READ_AHEAD_STEPS, BatchPart, Listed, WorkerSetup, produce
from pipeline.data.reading.worker import Received, WorkerProcess

READY_STEPS = 2  # batches made and not yet taken

ItemT = TypeVar("ItemT")


class Background:
    """A plan being carried out.

    Args:
        plan: what to make.
        share: slots of this rank in each batch.
        workers: processes among which they are divided; 0 does the work in a thread of this process.
        setup: how to make them.
        unit: slots that must stay together.
    """

    def __init__(self, plan: Plan, share: int, workers: int, setup: WorkerSetup, unit: int = 1) -> None:
        self._stop = threading.Event()
        self._ready: _Channel[BatchPart] = _Channel(READY_STEPS)
        self._parts = [(a * unit, b * unit) for a, b in even_parts(share // unit, max(1, workers))]
        self.workers = [WorkerProcess(setup) for _ in range(workers)]
        source = self._gathered(plan) if workers else self._made_here(plan, setup)
        self._thread = threading.Thread(target=self._fill, args=(source,), name="loader", daemon=True)
        self._thread.start()

    def next(self) -> BatchPart | None:
        """The next part, None after the last or when closed."""
        return self._ready.get()

    def close(self) -> None:
        """End thread and processes; waits for a read under way."""
        self._stop.set()
        self._ready.close()
        for worker in self.workers:
            worker.kill()
        if self._thread is not threading.current_thread():
            self._thread.join()
        for worker in self.workers:
            worker.close()

    def _fill(self, source: Iterator[BatchPart]) -> None:
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

    def _made_here(self, plan: Plan, setup: WorkerSetup) -> Iterator[BatchPart]:
        return produce(Listed(task for (task,) in plan.tasks(self._parts)), setup, self._stop)

    def _gathered(self, plan: Plan) -> Iterator[BatchPart]:
        steps = plan.tasks(self._parts)
        num_handed_out, num_done, more = 0, 0, True
        while True:
            # Workers read ahead as many tasks as they hold; one more is on its way.
            while more and num_handed_out <= num_done + READ_AHEAD_STEPS:
                tasks = next(steps, None)
                more = tasks is not None
                for number, worker in enumerate(self.workers):
                    worker.send(tasks[number] if tasks is not None else None)
                num_handed_out += more
            if num_done == num_handed_out:
                return
            yield self._receive()
            num_done += 1

    def _receive(self) -> BatchPart:
        """One part of each worker, each array received in its place of the whole."""
        total = self._parts[-1][1]
        whole: dict[str, Tensor] = {}
        received: list[Received] = []
        for worker, (start, stop) in zip(self.workers, self._parts, strict=True):

            def allocate(
                name: str, shape: tuple[int, ...], dtype: torch.dtype, at: slice = slice(start, stop)
            ) -> Tensor:
                if name not in whole and not received:
                    whole[name] = torch.empty((total, *shape[1:]), dtype=dtype, pin_memory=torch.cuda.is_available())
                if name not in whole or whole[name].shape[1:] != shape[1:] or at.stop - at.start != shape[0]:
                    raise ValueError(f"workers' parts of one batch differ in {name}: {list(shape)}")
                return whole[name][at]

            part = worker.receive(allocate)
            if part is None or len(part.fields) != len(whole):
                raise ValueError("workers' parts of one batch differ")
            received.append(part)
        instances = [part.instances for part in received if part.instances is not None]
        batch = Batch(
            position=received[0].position,
            instances=tuple(item for items in instances for item in items) if instances else None,
            **whole,
        )
        faults = tuple(fault for part in received for fault in part.faults)
        return BatchPart(batch, faults, sum(part.num_withdrawn for part in received))


def even_parts(size: int, count: int) -> list[tuple[int, int]]:
    """[start, stop) of `count` parts of `size` slots, as equal as they can be."""
    return [(size * i // count, size * (i + 1) // count) for i in range(count)]


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
        """Drop all items, and wake whoever waits on either side."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
