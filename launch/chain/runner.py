"""Runs a chain: finished steps are skipped, ready ones start as resources allow, anything may be killed at any time.

A step that was interrupted is simply run again, and resumes by its own means (shards that are there, checkpoints).
Training steps run on worker groups, driven by a thread of this process; all others are child processes
(`launch.chain.child`).
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from launch.chain.child import ChildRequest, run_child
from launch.chain.graph import Chain, ChainStep
from launch.chain.kinds import step_kind
from launch.chain.records import ChainStepResult, StepRecord, StepRecords, delete_tree
from launch.display import Display
from launch.progress import AttemptWatcher, StepProgress, headline, training_progress
from launch.stopping import StopRequest
from launch.workers.attempts import JobFailedError, run_training
from launch.workers.group import allocator
from launch.workers.placement import ElasticPlacement, RankPlacement, placement_for
from pipeline import config as configs
from pipeline import ray_cluster, storage
from pipeline.errors import ConfigError, ResourceError, UserError
from pipeline.inspection import figures_of
from pipeline.train.config import TrainConfig

PROGRESS_EVERY_S = 5.0
_COUNTS = {"num_scenes": "scenes", "inputs": "inputs", "written": "written", "step": "steps"}

Ending = tuple[Literal["done", "stopped"], dict[str, Any]]  # how a step ended, and its summary


class ChainRunner:
    """Runs the steps of one chain from one process.

    Args:
        chain: what to run.
        display: shows the person watching what happens.
        ray_address: of an existing Ray; None: RAY_ADDRESS, else embedded, started when a step needs it.
    """

    def __init__(self, chain: Chain, *, stop: StopRequest, display: Display, ray_address: str | None = None) -> None:
        self._chain = chain
        self._stop = stop
        self._display = display
        self._ray_address = ray_address
        self._cluster: ray_cluster.Cluster | None = None
        self._records = StepRecords(chain.folders.work)
        self._results: dict[str, ChainStepResult] = {}
        self._running: dict[str, RankPlacement | None] = {}
        self._ended: queue.Queue[ChainStepResult] = queue.Queue()

    def run(self, redo: Iterable[str] = ()) -> dict[str, ChainStepResult]:
        """Run whatever isn't finished; call it in the main thread, with the chain's lock held.

        Args:
            redo: steps to do over, with all that build on them; their outputs are deleted first.

        Raises:
            ConfigError: a step that was begun or finished has another configuration now, or `redo` names none.
        """
        self._records.folder.mkdir(parents=True, exist_ok=True)
        self._discard(redo)
        for name, step in self._chain.steps.items():
            self._check_unchanged(step)
            record = self._records.read(name)
            if record is not None and record.state == "done":
                self._results[name] = ChainStepResult(name, "skipped", record.output, record.seconds, record.summary)
        if self._results:
            self._display.line(f"finished before: {', '.join(self._results)}")
        while True:
            self._start_ready()
            if not self._running:
                break
            self._collect(self._ended.get())
        for name, step in self._chain.steps.items():
            self._results.setdefault(name, ChainStepResult(name, "not started", step.output))
        return {name: self._results[name] for name in self._chain.steps}

    def _start_ready(self) -> None:
        if self._stop.requested() or any(result.state == "failed" for result in self._results.values()):
            return
        for step in self._chain.steps.values():
            if step.name in self._results or step.name in self._running or not self._is_ready(step):
                continue
            if step_kind(step.kind).needs_ray(step.document) and self._cluster is None:
                try:
                    self._connect()
                except UserError as error:
                    self._results[step.name] = ChainStepResult(step.name, "failed", step.output, error=error)
                    return
            placement = self._placement(step)
            if self._fits(placement):
                self._start(step, placement)

    def _is_ready(self, step: ChainStep) -> bool:
        return all(before in self._results for before in step.after)

    def _connect(self) -> None:
        self._cluster = ray_cluster.connect(self._ray_address)
        self._stop.take_signals()  # Ray put its own handlers in their place
        os.environ["RAY_ADDRESS"] = self._cluster.address  # for children

    def _placement(self, step: ChainStep) -> RankPlacement | None:
        """What a step's ranks take, an elastic one's at most; None for a step without ranks."""
        if not step_kind(step.kind).trained_by_ranks:
            return None
        wanted = placement_for(step.request, ray_cluster.machines(), self._global_batch(step))
        if isinstance(wanted, ElasticPlacement):
            return RankPlacement(1, wanted.maximum, wanted.cpus_per_rank, wanted.gpus_per_rank)
        return wanted

    @staticmethod
    def _global_batch(step: ChainStep) -> int:
        data = step.document.get("data")
        batch = data.get("global_batch") if isinstance(data, dict) else None
        return batch if isinstance(batch, int) and batch > 0 else 1  # what is wrong with it is said by its validation

    def _fits(self, placement: RankPlacement | None) -> bool:
        """Whether the step can run beside those that do; alone it may always try."""
        if not self._running:
            return True
        if placement is None or None in self._running.values() or self._cluster is None:
            return False
        placements = [placement, *(other for other in self._running.values() if other is not None)]
        cores = sum(each.world_size * each.cpus_per_rank for each in placements)
        gpus = sum(each.world_size * each.gpus_per_rank for each in placements)
        return cores <= self._cluster.num_cpus and gpus <= self._cluster.num_gpus

    def _start(self, step: ChainStep, placement: RankPlacement | None) -> None:
        verb = "starting" if self._records.read(step.name) is None else "resuming"
        self._display.line(f"{step.name}: {verb} ({step.kind})")
        self._records.write(step.name, StepRecord("started", step.fingerprint, step.output))
        self._running[step.name] = placement
        threading.Thread(target=self._run_step, args=(step,), name=step.name, daemon=True).start()

    def _run_step(self, step: ChainStep) -> None:
        started = time.monotonic()
        result = ChainStepResult(step.name, "done", step.output)
        try:
            with self._records.log(step.name).open("a", encoding="utf-8") as log:
                ranks = step_kind(step.kind).trained_by_ranks
                state, summary = self._train(step, log) if ranks else self._run_in_child(step, log)
            result = result._replace(state=state, summary=summary)
        except (UserError, JobFailedError) as error:
            result = result._replace(state="failed", error=error)
        except Exception as error:  # a defect of ours must not leave the main thread waiting for ever
            result = result._replace(state="failed", error=JobFailedError(f"{type(error).__name__}: {error}"))
            sys.excepthook(type(error), error, error.__traceback__)
        self._ended.put(result._replace(seconds=time.monotonic() - started))

    def _collect(self, result: ChainStepResult) -> None:
        del self._running[result.name]
        self._results[result.name] = result
        step = self._chain.steps[result.name]
        if result.state == "done":
            record = StepRecord("done", step.fingerprint, step.output, result.seconds, result.summary)
            self._records.write(result.name, record)
            self._display.line(f"{result.name}: done in {result.seconds:.0f} s{_brief(result.summary)}")
        elif result.state == "stopped":
            self._display.line(f"{result.name}: stopped; the same command resumes it")
        else:
            self._display.line(f"{result.name}: failed: {result.error}")
            if others := ", ".join(self._running):
                self._display.line(f"letting {others} finish; nothing else will be started")

    def _train(self, step: ChainStep, log: IO[str]) -> Ending:
        config = configs.validate(TrainConfig, step.document, where=step.where)
        attempts = AttemptWatcher(config.run_url)

        def on_line(rank: int, line: str) -> None:
            log.write(f"{line}\n" if rank < 0 else f"[{rank}] {line}\n")
            log.flush()
            if rank < 0:
                self._display.line(f"{step.name}: {line}")
            elif rank == 0 and (begun := attempts.newly_begun()):
                self._display.line(f"{step.name}: {begun}")

        with self._shown(step.name, lambda: training_progress(config.run_url)):
            result = run_training(
                step.document,
                where=step.where,
                run_url=config.run_url,
                allocate=allocator(step.request, config.data.global_batch),
                stop=self._stop,
                on_line=on_line,
                max_fruitless=config.max_fruitless_attempts,
            )
        summary: dict[str, Any] = {"step": result.step, "samples": result.samples}
        if result.status == "done":
            summary |= {"weights_sha256": result.weights_sha256, "figures": figures_of(config.run_url)}
        return result.status, summary

    def _run_in_child(self, step: ChainStep, log: IO[str]) -> Ending:
        last_line = ""

        def on_line(line: str) -> None:
            nonlocal last_line
            log.write(line)
            log.flush()
            last_line = line.strip() or last_line

        request = ChildRequest(step.kind, step.document, step.where, step.output)
        with self._shown(step.name, lambda: StepProgress(last_line)):
            ended = run_child(request, on_line=on_line, stop=self._stop)
        if ended.stopped:
            return "stopped", {}
        if ended.failure:
            raise JobFailedError(f"its process {ended.failure}; see {log.name}: {last_line}")
        return "done", ended.summary

    @contextmanager
    def _shown(self, name: str, progress: Callable[[], StepProgress]) -> Iterator[None]:
        """Within the block, keep showing how far the step is."""
        ended = threading.Event()

        def show() -> None:
            while not ended.wait(PROGRESS_EVERY_S):
                self._display.progress(name, progress())

        shower = threading.Thread(target=show, daemon=True)
        shower.start()
        try:
            yield
        finally:
            ended.set()
            shower.join(timeout=1)
            self._display.end(name)

    def _check_unchanged(self, step: ChainStep) -> None:
        record = self._records.read(step.name)
        if record is None or record.fingerprint == step.fingerprint:
            return
        if record.state != "done" and not self._has_output(step):  # nothing to resume
            self._records.delete(step.name)
            return
        state = "finished" if record.state == "done" else "begun"
        raise ConfigError(
            f"step {step.name!r} was {state} with another configuration (its own, or that of a step before it)",
            where=f"{self._chain.where} in {self._chain.folders.work}",
            fix=f"undo the change, use another --work folder, or do it over with --redo {step.name}",
        )

    def _has_output(self, step: ChainStep) -> bool:
        places = step.output, storage.join(self._chain.folders.store, "checkpoints", step.name)
        return any(True for place in places for _ in storage.entries(place))

    def _discard(self, redo: Iterable[str]) -> None:
        """Forget the steps named and what builds on them, outputs included."""
        names = list(redo)
        for name in names:
            if name not in self._chain.steps:
                raise ConfigError(
                    f"no step {name!r}", where="--redo", fix=f"name one of {', '.join(self._chain.steps)}"
                )
        folders = self._chain.folders
        for name in sorted(self._chain.downstream(names)) if names else ():
            step = self._chain.steps[name]
            if not step_kind(step.kind).may_delete(name, step.document, folders):
                raise ConfigError(
                    f"step {name!r} writes where its own configuration says",
                    where=step.output,
                    fix="delete that by hand",
                )
            self._display.line(f"{name}: doing it over")
            delete_tree(step.output)
            delete_tree(storage.join(folders.store, "checkpoints", name))
            self._records.delete(name)


@contextmanager
def only_one(work: Path) -> Iterator[None]:
    """Hold the work folder's lock, which ends with the process.

    Raises:
        ResourceError: another process holds it.
    """
    from filelock import FileLock, Timeout

    work.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(work / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise ResourceError(
            "another command is running in this folder",
            where=str(work),
            fix="wait for it, or use another --work folder",
        ) from None
    try:
        yield
    finally:
        lock.release()


def _brief(summary: dict[str, Any]) -> str:
    """What a person wants to see of a step's summary at once."""
    counts = [f"{summary[key]} {noun}" for key, noun in _COUNTS.items() if isinstance(summary.get(key), int)]
    figures = [f"{name} {value:.4g}" for name, value in headline(summary.get("figures", {})).items()]
    return "".join(f", {part}" for part in [*counts, *figures])
