"""The training loop. Its unit is the global step; it knows the contracts and no stage, optimizer or store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

from pipeline.data.loader import Loader
from pipeline.train.config import TrainConfig
from pipeline.train.engine import Engine
from pipeline.train.meter import Meter
from pipeline.train.nonfinite import check_finite
from pipeline.train.saving import Checkpoints
from pipeline.train.state import Due, State, StopSignal


@runtime_checkable
class Measure(Protocol):
    """Evaluates and records the figures; collective."""

    def __call__(self, state: State) -> object: ...


def run_loop(
    state: State,
    *,
    config: TrainConfig,
    engine: Engine,
    loader: Loader,
    schedule: Callable[[int], float],
    checkpoints: Checkpoints,
    measure: Measure,
    meter: Meter,
    stop: StopSignal,
) -> tuple[State, Literal["done", "stopped"]]:
    """Train from `state` until the length is reached or a stop is agreed; the last state is saved either way.

    Args:
        schedule: learning rate by samples seen.

    Raises:
        DataError: too many steps in a row weren't finite.
        CheckpointError: a later attempt has taken the run over.
        StorageError: the last checkpoint couldn't be saved.
    """
    due = Due(config)
    steps = loader.steps(state.cursor)
    stopped = False
    while not due.done(state) and not stopped:
        step = next(steps)
        checkpoints.wait_copied()
        rate = schedule(state.samples)
        result = engine.step(step.micro, rate, stop=stop.requested() or checkpoints.superseded)
        state = state.advanced(step.after, result, config.data.global_batch)
        meter.add(step, result, rate)
        check_finite(state, result, config.nonfinite.max_consecutive)
        if due.log(state):
            meter.tell(state)
        if due.evaluate(state):
            measure(state)
            meter.restart()
        stopped = result.stop
        if due.checkpoint(state) and not stopped:
            meter.flush()
            checkpoints.save(state.step, list(engine.snapshot()), engine.facts(), state.document())
    meter.flush()
    checkpoints.finish(last=(state.step, list(engine.snapshot()), engine.facts(), state.document()))
    return state, "done" if due.done(state) else "stopped"
