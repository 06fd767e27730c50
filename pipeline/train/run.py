"""One training run from its configuration to its outcome: what `launch.worker` calls on every rank.

prepare   `setup.prepare_run`: check configuration, data and run directory
build     `Training.__init__`: the stage, its initial weights (`initial`), the engine
drive     `Training.run`: resume (`resume`), train (`loop`), go back when a guard asks for it, conclude
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch

from pipeline import ranks
from pipeline.machine import available_cores
from pipeline.run_dir import RunDir
from pipeline.train.checkpoints.commits import Attempt
from pipeline.train.checkpoints.restore import read_weights, weights_digest
from pipeline.train.checkpoints.saving import CheckpointWriter
from pipeline.train.config import TrainConfig
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine
from pipeline.train.engine.deepspeed_setup import join_group
from pipeline.train.engine.ema import decay_after
from pipeline.train.evaluation import Evaluator
from pipeline.train.guards import RollBack
from pipeline.train.initial import initialize_weights
from pipeline.train.loop import run_loop
from pipeline.train.meter import Meter
from pipeline.train.optim import scheduled_rate
from pipeline.train.resume import Resumption, Start
from pipeline.train.setup import RunSetup, prepare_run
from pipeline.train.state import State, StopSignal
from pipeline.train.status import status_at_start
from pipeline.train.track import Tracker
from pipeline.train.watchdog import Watchdog

__all__ = ["StopSignal", "TrainOutcome", "train"]

log = logging.getLogger("vitrail")


class TrainOutcome(NamedTuple):
    """How a run ended; the same on all ranks."""

    status: Literal["done", "stopped"]
    step: int
    samples: int
    weights_sha256: str  # of the consolidated weights, once done


def train(
    config: TrainConfig,
    *,
    stop: StopSignal,
    attempt_hint: str | None = None,
    on_late: Callable[[str], None] = lambda _: os._exit(1),
) -> TrainOutcome:
    """Run one training job, or continue it from its newest valid checkpoint.

    Called on every rank, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.

    Args:
        config: the run.
        stop: this rank's request to stop.
        attempt_hint: the launcher's name for this start; only recorded.
        on_late: ends this process when the watchdog finds it hanging.

    Raises:
        UserError: configuration, data, storage or checkpoints are wrong; on all ranks alike.
    """
    watchdog = Watchdog(config.watchdog, on_late)
    try:
        join_group()
        _set_threads()
        stop.limit(config.time_limit_s)
        setup = prepare_run(config)
        with _failure_recorded(setup.run_dir):
            return Training(setup, watchdog, attempt_hint).run(stop)
    finally:
        watchdog.close()


class Training:
    """A run whose stage and engine are built, on one rank of all that train it. Collective.

    Args:
        setup: what the run is made from.
        watchdog: told of each phase as it begins.
        attempt_hint: see `train`.
    """

    def __init__(self, setup: RunSetup, watchdog: Watchdog, attempt_hint: str | None) -> None:
        config, resolved = setup.config, setup.resolved
        global_batch, ema = config.data.global_batch, config.ema
        self._setup = setup
        self._watchdog = watchdog
        self._attempt_hint = attempt_hint
        self._stage = setup.build_stage()
        initial = initialize_weights(self._stage, config, setup.checkpoints_url)
        self._engine = DeepSpeedEngine(
            self._stage,
            config.optim,
            zero_stage=resolved.zero_stage,
            precision=resolved.precision,
            peak_lr=resolved.peak_lr,
            seed=config.seed,
            ema_decay=None if ema is None else partial(decay_after, ema, global_batch=global_batch),
        )
        self._resumption = Resumption(setup, self._stage, self._engine, initial)

    def run(self, stop: StopSignal) -> TrainOutcome:
        """Resume, train, evaluate and save; go back to an older checkpoint when a guard asks for it."""
        start = self._resumption.begin()
        state = start.state
        status: Literal["done", "stopped"] = "done"
        while start.attempt is not None:
            try:
                state, status = self._attempt(start.attempt, start, stop)
                break
            except RollBack as back:
                self._watchdog.enter("start")
                start = self._resumption.go_back(back)
        self._engine.close()
        return self._conclude(state, status, stop.reason() if status == "stopped" else "")

    def _attempt(self, attempt: Attempt, start: Start, stop: StopSignal) -> tuple[State, Literal["done", "stopped"]]:
        """Train until the length is reached, a stop is agreed on or a guard asks to go back."""
        config, run_dir, resolved = self._setup.config, self._setup.run_dir, self._setup.resolved
        run_dir.attempt = attempt.number
        tracker = None
        if ranks.world().rank == 0:
            tracker = Tracker(run_dir, attempt.number, start.state.step, config.length_samples)
            run_dir.write_status(**status_at_start(self._setup, start, self._engine.facts(), self._attempt_hint))
        checkpoints = CheckpointWriter(
            self._setup.checkpoints_url,
            attempt,
            keep_last=config.checkpoint.keep_last,
            keep_every_samples=config.checkpoint.keep_every_samples,
            info=self._setup.checkpoint_info(self._stage),
        )
        self._watchdog.saving_since = checkpoints.since
        loader = self._setup.data.loader(
            self._stage.transform(train=True), ranks.world(), seed=config.seed, micro_batch=resolved.micro_batch
        )
        try:
            outcome = run_loop(
                start.state,
                config=config,
                engine=self._engine,
                loader=loader,
                schedule=partial(scheduled_rate, config.optim, resolved.peak_lr, length_samples=config.length_samples),
                checkpoints=checkpoints,
                evaluate=Evaluator(self._stage, self._engine, config, self._setup.data, tracker),
                meter=Meter(tracker, config.data.global_batch, checkpoints),
                stop=stop,
                watch=self._watchdog.enter,
            )
        except RollBack:
            checkpoints.close()
            raise
        finally:
            loader.close()
        checkpoints.close()
        return outcome

    def _conclude(self, state: State, status: Literal["done", "stopped"], message: str) -> TrainOutcome:
        """Read the weights back from the last checkpoint, which shows that it is whole, and record their hash."""

        def record() -> str:
            weights = read_weights(self._setup.checkpoints_url, "raw") if status == "done" else None
            digest = "" if weights is None else weights_digest(weights)
            self._setup.run_dir.write_status(
                state=status,
                message=message,
                step=state.step,
                samples=state.samples,
                weights_sha256=digest,
                num_skipped=state.num_skipped,
                num_rollbacks=state.num_rollbacks,
            )
            log.info("%s at step %d, %d samples", status, state.step, state.samples)
            return digest

        return TrainOutcome(status, state.step, state.samples, ranks.from_first(record))


@contextlib.contextmanager
def _failure_recorded(run_dir: RunDir) -> Iterator[None]:
    """Write an exception that ends the run into its status."""
    try:
        yield
    except Exception as error:
        if ranks.world().rank == 0:
            with contextlib.suppress(Exception):
                run_dir.write_status(state="failed", message=str(error))
        raise


def _set_threads() -> None:
    """Share the cores among this machine's ranks, unless OMP_NUM_THREADS is set: results depend on it."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // ranks.local_size()))
