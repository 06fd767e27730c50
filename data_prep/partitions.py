"""Tasks on Ray: as many under way as there are workers, dead workers replaced, every result handed back and checked.

The only file of data_prep that knows Ray.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from data_prep.config import PrepConfig, RayConfig
from data_prep.filters.candidate import Scorers
from data_prep.filters.options import FilterOptions
from pipeline.config import by_dotted_name
from pipeline.errors import ResourceError, Stopped, UserError

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")

_POLL_S = 0.5
_QUEUED = 2  # tasks handed over beyond those that run, so that no worker waits for the driver
_OBJECT_STORE_BYTES = 512 * 2**20
_SCORER_START_S = 900  # weights may have to be downloaded
_START_FIX = "check ray.address, or leave it out to use this machine alone"


def run(
    function: Callable[[TaskT], ResultT],
    tasks: Iterable[TaskT],
    options: RayConfig,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[ResultT, None, None]:
    """Results of `function` over `tasks`, in the order in which they finish.

    Tasks are taken from the iterable only as workers become free, so neither tasks nor results pile up. A task whose
    worker dies is run again, up to `options.task_retries` times; so `function` must bear being run twice.

    Args:
        function: importable on the workers (a module's function, or a partial of one).
        stop: asked between results; once it says yes, tasks under way are given up.

    Raises:
        UserError: the first one a task raised.
        ResourceError: no Ray there, or a task's workers died again and again.
        Stopped: `stop` said so.
    """
    if options.tasks == 0:
        for task in tasks:
            if stop():
                raise Stopped("data preparation was stopped; the same command goes on")
            yield function(task)
        return
    with session(options):
        yield from _run_on_ray(function, tasks, options, stop)


def _run_on_ray(
    function: Callable[[TaskT], ResultT], tasks: Iterable[TaskT], options: RayConfig, stop: Callable[[], bool]
) -> Generator[ResultT, None, None]:
    import ray

    num_tasks_at_once = options.tasks or _num_cpus()
    remote = ray.remote(num_cpus=1, max_retries=options.task_retries, retry_exceptions=False)(_guarded)
    shared = ray.put(function)
    waiting: list[Any] = []
    queue = iter(tasks)
    limit = num_tasks_at_once if options.tasks else num_tasks_at_once + _QUEUED
    more = True
    try:
        while more or waiting:
            while more and len(waiting) < limit:
                task = next(queue, None)
                if task is None:
                    more = False
                else:
                    waiting.append(remote.remote(shared, task))
            if stop():
                raise Stopped("data preparation was stopped; the same command goes on")
            ready, waiting = ray.wait(waiting, timeout=_POLL_S) if waiting else ([], [])
            for reference in ready:
                yield _result(reference)
    finally:
        for reference in waiting:
            with contextlib.suppress(Exception):  # Ray itself may be what failed
                ray.cancel(reference, force=True)


def num_tasks(options: RayConfig) -> int:
    """How many tasks run at once."""
    return 1 if options.tasks == 0 else options.tasks or _num_cpus()


@contextlib.contextmanager
def scorers(config: PrepConfig) -> Iterator[Scorers | None]:
    """Processes that hold the models of `config.filters` for a while: Ray actors, on GPUs where there are some; with
    `ray.tasks` 0 this process. None where no filter has a model.

    Raises:
        UserError: a model can't be loaded.
    """
    numbers = [number for number, option in enumerate(config.filters) if option.scorer is not None]
    if not numbers:
        yield None
        return
    if config.ray.tasks == 0:
        yield _LocalScorers(config.filters)
        return
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    places = [number for number in numbers if config.filters[number].wants_gpu]
    each, share = scorer_share(resources.get("GPU", 0.0), len(places), config.ray.scorers)
    handles: dict[int, list[Any]] = {}
    try:
        for number in numbers:
            gpu, count = (share, each) if number in places else (0.0, config.ray.scorers or 1)
            # On CPUs a scorer shares the tasks' cores, which wait for it meanwhile.
            actor: Any = ray.remote(num_cpus=0, num_gpus=gpu, max_restarts=3, max_task_retries=3)(_ScorerActor)
            handles[number] = [actor.remote(config.filters[number], number) for _ in range(count)]
        for number, of_filter in handles.items():
            for handle in of_filter:
                try:
                    error = ray.get(handle.ready.remote(), timeout=_SCORER_START_S)
                except ray.exceptions.GetTimeoutError as late:
                    raise ResourceError(
                        f"the model of filter {number} wasn't there after {_SCORER_START_S} s",
                        where="data preparation",
                        fix="lower ray.scorers, free GPUs, or download the model's weights first",
                    ) from late
                if error is not None:
                    raise error
        yield _RayScorers(handles, [option.batch_size for option in config.filters])
    finally:
        for handle in itertools.chain.from_iterable(handles.values()):
            with contextlib.suppress(Exception):
                ray.kill(handle)


def scorer_share(num_gpus: float, num_filters: int, wanted: int | None) -> tuple[int, float]:
    """How many scorers each of the filters that may use a GPU gets, and which share of a GPU each of those takes.

    All of them run at once: as many per filter as there are GPUs for, unless `wanted` says how many, and where GPUs
    don't suffice for that several share one.
    """
    if num_gpus < 1 or not num_filters:
        return wanted or 1, 0.0
    each = wanted or max(1, int(num_gpus) // num_filters)
    per_gpu = -(-each * num_filters // int(num_gpus))
    return each, 1.0 if per_gpu == 1 else math.floor(1e4 / per_gpu) / 1e4


class _LocalScorers:
    """Models in this process."""

    def __init__(self, options: Sequence[FilterOptions]) -> None:
        self._options = options
        self._models = {n: load_scorer(o, n) for n, o in enumerate(options) if o.scorer is not None}

    def scores(self, number: int, pairs: Sequence[tuple[bytes, str]]) -> list[float]:
        size = self._options[number].batch_size
        return [score for some in _cut(pairs, size) for score in self._models[number].scores(some)]


class _RayScorers:
    """Models in actors. The batches of a call go to all of them at once, beginning with one by chance."""

    def __init__(self, handles: dict[int, list[Any]], batches: Sequence[int]) -> None:
        self._handles = handles
        self._batches = batches

    def scores(self, number: int, pairs: Sequence[tuple[bytes, str]]) -> list[float]:
        import ray

        handles = self._handles[number]
        first = secrets.randbelow(len(handles))
        pending = [
            handles[(first + place) % len(handles)].scores.remote(list(some))
            for place, some in enumerate(_cut(pairs, self._batches[number]))
        ]
        scores: list[list[float]] = ray.get(pending)
        return list(itertools.chain.from_iterable(scores))


def _cut(pairs: Sequence[tuple[bytes, str]], size: int) -> Iterator[Sequence[tuple[bytes, str]]]:
    """Batches of the filter's size, the same ones wherever they are scored."""
    return (pairs[start : start + size] for start in range(0, len(pairs), size))


class _ScorerActor:
    def __init__(self, option: FilterOptions, number: int) -> None:
        self._error: UserError | None = None
        try:
            self._scorer = load_scorer(option, number)
        except UserError as error:  # told by `ready`: Ray would wrap it
            self._error = error

    def ready(self) -> UserError | None:
        return self._error

    def scores(self, pairs: list[tuple[bytes, str]]) -> list[float]:
        return list(self._scorer.scores(pairs))


def load_scorer(option: FilterOptions, number: int) -> Any:
    """The model of a filter, imported only where it runs."""
    assert option.scorer is not None
    where = f"filters.{number}"
    return by_dotted_name(option.scorer, where=where)(option, where=where)


def _num_cpus() -> int:
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(1, int(resources.get("CPU", 1)))


def _guarded(function: Callable[[Any], Any], task: Any) -> tuple[Any, UserError | None]:
    """A user's mistake comes back as a value: Ray would wrap it into an exception of another class."""
    try:
        return function(task), None
    except UserError as error:
        return None, error


def _result(reference: Any) -> Any:
    import ray

    try:
        value, error = ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as died:
        raise ResourceError(
            f"the workers of a task died again and again ({type(died).__name__})",
            where="data preparation",
            fix="give the machine more memory, or lower shard.samples, fetch.concurrency or ray.tasks",
        ) from died
    if error is not None:
        raise error
    return value


@contextlib.contextmanager
def session(options: RayConfig) -> Iterator[None]:
    """A Ray to run on: the one this process is connected to, the one at `address`, or one of its own for a while.

    Nothing happens where no Ray is wanted, or inside another session.

    Raises:
        ResourceError: there is none at the address, or it doesn't start.
    """
    if options.tasks == 0:
        yield
        return
    if options.address is None and "ray" not in sys.modules:
        # A lock for what listens, of this Ray alone; Ray reads it when it is imported, and its processes inherit it.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        yield
        return
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main_thread else None
    start = functools.partial(ray.init, log_to_driver=False, logging_level=logging.ERROR)
    try:
        if options.address is not None:
            start(address=options.address)
        else:
            start(
                address="local",  # never another user's Ray on this machine
                num_cpus=options.tasks or os.cpu_count(),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
            )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        what = f"no Ray to run on ({' '.join(str(error).split())[:200]})"
        raise ResourceError(what, where=f"ray.address {options.address}", fix=_START_FIX) from error
    if in_main_thread:
        signal.signal(signal.SIGTERM, handler)  # ray.init puts its own in place, which exits at once
    try:
        yield
    finally:
        ray.shutdown()
