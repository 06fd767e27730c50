"""Tasks on Ray: a bounded number at once, repeated where their process dies, every result returned and checked.

The only file of data_prep that imports Ray.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from data_prep.config import PrepConfig, RayConfig
from data_prep.filters.candidate import Scorers
from data_prep.filters.options import FilterOptions
from pipeline import ray_cluster
from pipeline.config import by_dotted_name
from pipeline.errors import ResourceError, Stopped, UserError

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")

_POLL_S = 0.5
_QUEUED = 2  # tasks submitted beyond those that run, so that no core waits for the driver
_SCORER_START_S = 900  # weights may have to be downloaded


def run(
    function: Callable[[TaskT], ResultT],
    tasks: Iterable[TaskT],
    options: RayConfig,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[ResultT, None, None]:
    """Results of `function` over `tasks`, in the order in which they finish.

    Inputs are taken from the iterable only as cores become free, so neither inputs nor results pile up. A task whose
    process dies is run again, up to `options.task_retries` times, so running `function` twice must do no harm.

    Args:
        function: importable on all machines (a module's function, or a partial of one).
        tasks: the inputs, one for each task.
        stop: called between results; True cancels the running tasks.

    Raises:
        UserError: the first one that a task raised.
        ResourceError: Ray can't be reached, or a task's process died too often.
        Stopped: `stop` returned True.
    """
    if options.tasks == 0:
        for task in tasks:
            if stop():
                raise Stopped("data preparation was stopped; the same command resumes it")
            yield function(task)
        return
    with session(options):
        yield from _run_on_ray(function, tasks, options, stop)


def _run_on_ray(
    function: Callable[[TaskT], ResultT], tasks: Iterable[TaskT], options: RayConfig, stop: Callable[[], bool]
) -> Generator[ResultT, None, None]:
    import ray

    at_once = options.tasks or _num_cpus()
    remote = ray.remote(num_cpus=1, max_retries=options.task_retries, retry_exceptions=False)(_guarded)
    shared = ray.put(function)
    waiting: list[Any] = []
    queue = iter(tasks)
    limit = at_once if options.tasks else at_once + _QUEUED
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
                raise Stopped("data preparation was stopped; the same command resumes it")
            ready, waiting = ray.wait(waiting, timeout=_POLL_S) if waiting else ([], [])
            for reference in ready:
                yield _result(reference)
    finally:
        for reference in waiting:
            with contextlib.suppress(Exception):  # Ray itself may have failed
                ray.cancel(reference, force=True)


def num_tasks(options: RayConfig) -> int:
    """How many tasks run at once."""
    return 1 if options.tasks == 0 else options.tasks or _num_cpus()


@contextlib.contextmanager
def scorers(config: PrepConfig) -> Iterator[Scorers | None]:
    """The models of `config.filters`, until the context ends: in Ray actors, on GPUs where there are some; with
    `ray.tasks` 0 in this process. None where no filter has a model.

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
    on_gpu = [number for number in numbers if config.filters[number].wants_gpu]
    each, share = scorer_share(resources.get("GPU", 0.0), len(on_gpu), config.ray.scorers)
    handles: dict[int, list[Any]] = {}
    try:
        for number in numbers:
            gpu, count = (share, each) if number in on_gpu else (0.0, config.ray.scorers or 1)
            # On CPUs scorers share the cores of the tasks, which wait for them meanwhile.
            actor: Any = ray.remote(num_cpus=0, num_gpus=gpu, max_restarts=3, max_task_retries=3)(_ScorerActor)
            handles[number] = [actor.remote(config.filters[number], number) for _ in range(count)]
        for number, of_filter in handles.items():
            for handle in of_filter:
                try:
                    error = ray.get(handle.ready.remote(), timeout=_SCORER_START_S)
                except ray.exceptions.GetTimeoutError as late:
                    raise ResourceError(
                        f"the model of filter {number} wasn't ready after {_SCORER_START_S} s",
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
    """How many scorers each filter with a model on GPUs gets, and which share of a GPU each scorer takes.

    All run at once: as many per filter as there are GPUs for, or `wanted`; several scorers share a GPU where there are
    too few.
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
        return [score for batch in _batches(pairs, size) for score in self._models[number].scores(batch)]


class _RayScorers:
    """Models in actors. The batches of a call go to all of them at once, starting with a random one."""

    def __init__(self, handles: dict[int, list[Any]], batch_sizes: Sequence[int]) -> None:
        self._handles = handles
        self._batch_sizes = batch_sizes

    def scores(self, number: int, pairs: Sequence[tuple[bytes, str]]) -> list[float]:
        import ray

        handles = self._handles[number]
        first = secrets.randbelow(len(handles))
        pending = [
            handles[(first + place) % len(handles)].scores.remote(list(batch))
            for place, batch in enumerate(_batches(pairs, self._batch_sizes[number]))
        ]
        scores: list[list[float]] = ray.get(pending)
        return list(itertools.chain.from_iterable(scores))


def _batches(pairs: Sequence[tuple[bytes, str]], size: int) -> Iterator[Sequence[tuple[bytes, str]]]:
    """Batches of the filter's size, the same ones wherever they are scored."""
    return (pairs[start : start + size] for start in range(0, len(pairs), size))


class _ScorerActor:
    """A filter's model in a process of its own."""

    def __init__(self, option: FilterOptions, number: int) -> None:
        self._error: UserError | None = None
        try:
            self._scorer = load_scorer(option, number)
        except UserError as error:  # returned by `ready`, since Ray would wrap it
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
    """Calls `function`; returns a user's mistake as a value, since Ray would wrap it into another exception."""
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
            f"a task's process died again and again ({type(died).__name__})",
            where="data preparation",
            fix="give the machine more memory, or lower shard.samples, fetch.concurrency or ray.tasks",
        ) from died
    if error is not None:
        raise error
    return value


@contextlib.contextmanager
def session(options: RayConfig) -> Iterator[None]:
    """A connection to Ray: this process's, a new one to `address`, or else to a Ray that is started and ends with it.

    Nothing happens with `ray.tasks` 0 and inside another session.

    Raises:
        ResourceError: nothing answers at the address, or Ray doesn't start.
    """
    if options.tasks == 0:
        yield
        return
    ray = sys.modules.get("ray")  # imported by `connect`, after what Ray reads then has been set
    if ray is not None and ray.is_initialized():
        yield
        return
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main_thread else None
    ray_cluster.connect(options.address, num_cpus=options.tasks)
    if in_main_thread:
        signal.signal(signal.SIGTERM, handler)  # ray.init installs a handler that exits at once
    try:
        yield
    finally:
        ray_cluster.disconnect()
