"""Losses, rates and waits of the steps between two log lines, over all ranks."""

from __future__ import annotations

import time
from typing import Any

from pipeline import ranks
from pipeline.data.loader import Step
from pipeline.train.engine import StepResult
from pipeline.train.state import State
from pipeline.train.track import Tracker


class Meter:
    """Gathers what a step took, and tells the tracker (which only rank 0 has).

    Losses, learning rate and gradient norm are the last step's; times and rates are over all steps since the last
    line.
    """

    def __init__(self, tracker: Tracker | None, global_batch: int) -> None:
        self._tracker = tracker
        self._global_batch = global_batch
        self._last: dict[str, Any] = {}
        self.restart()

    def restart(self) -> None:
        """Forget what was measured: the time since then wasn't training."""
        self._began = time.monotonic()
        self._num_steps = 0
        self._wait_s = 0.0
        self._num_absent = 0

    def add(self, step: Step, result: StepResult, lr: float) -> None:
        """One step is done."""
        self._num_steps += 1
        self._wait_s += step.wait_s
        self._num_absent += sum(int((batch.weight == 0).sum()) for batch in step.micro)
        self._last = {"loss": result.loss, **result.parts, "lr": lr, "grad_norm": result.grad_norm}

    def tell(self, state: State) -> None:
        """Write a line. Collective."""
        spent_s = max(time.monotonic() - self._began, 1e-9)
        gathered = ranks.gather((round(self._wait_s, 4), self._num_absent))
        if self._tracker is not None and self._num_steps:
            values = {
                **self._last,
                "samples_per_s": round(self._num_steps * self._global_batch / spent_s, 2),
                "step_s": round(spent_s / self._num_steps, 4),
                "data_wait_s": [wait_s for wait_s, _ in gathered],
                "num_absent": sum(absent for _, absent in gathered),
                "num_skipped": state.num_skipped,
            }
            self._tracker.step(state.step, state.samples, values)
        self.restart()

    def flush(self) -> None:
        """Make lines durable before a checkpoint makes them final."""
        if self._tracker is not None:
            self._tracker.flush()
