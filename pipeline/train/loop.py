"""The training loop. Its unit is the global step; it knows the contracts, but no stage, optimizer or storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pipeline.data.loader import Loader
from pipeline.train.checkpoints.saving import CheckpointWriter
from pipeline.train.config import TrainConfig
from pipeline.train.engine.base import Engine
from pipeline.train.guards import Guards
from pipeline.train.meter import Meter
from pipeline.train.state import Due, State, StopSignal
from pipeline.train.watchdog import Phase


def run_loop(
    state: State,
    *,
    config: TrainConfig,
    engine: Engine,
    loader: Loader,
    schedule: Callable[[int], float],
    checkpoints: CheckpointWriter,
    evaluate: Callable[[State], object],
    meter: Meter,
    stop: StopSignal,
    watch: Callable[[Phase], None],
) -> tuple[State, Literal["done", "stopped"]]:
    """Train from `state` until the length is reached or the ranks agree to stop; the last state is saved either way.

    Args:
        schedule: learning rate by samples seen.
        evaluate: measures the stage and records the figures; collective.
        watch: called with each phase as it begins.

    Raises:
        RollBack: too many steps in a row were skipped, and an older checkpoint is to be resumed.
        DataError: the same, but the run has gone back too often already.
        CheckpointError: a later attempt has taken the run over.
        StorageError: the last checkpoint couldn't be saved.
    """
    due, guards = Due(config), Guards(config)
    steps = loader.steps(state.cursor)
    stopped = False
    while not due.done(state) and not stopped:
        step = next(steps)
        checkpoints.wait_copied()
        rate = schedule(state.samples)
        stopping = stop.requested() or checkpoints.superseded
        if guards.skips(state):
            result = engine.skip(stop=stopping)
        else:
            result = engine.step(step.micro, rate, stop=stopping, loss_limit=guards.loss_limit(state))
            meter.add(step, result, rate, engine.busy_s)
        state = guards.advance(state, state.advanced(step.after, result, config.data.global_batch), result)
        watch("step")
        if due.log(state):
            meter.write_line(state)
        if due.evaluate(state):
            watch("evaluate")
            evaluate(state)
            meter.restart()
            watch("step")
        stopped = result.stop
        if due.checkpoint(state) and not stopped:
            meter.flush()
            checkpoints.save(state.step, list(engine.snapshot()), engine.facts(), state.document())
    watch("save")
    meter.flush()
    checkpoints.finish(state.step, list(engine.snapshot()), engine.facts(), state.document())
    return state, "done" if due.done(state) else "stopped"
