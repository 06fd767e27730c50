"""Losses, rates and waiting times of the steps between two metric lines, over all ranks."""

from __future__ import annotations

import logging
import socket
import statistics
import time
from typing import Any, Protocol, runtime_checkable

from pipeline import ranks
from pipeline.data.loader import Step
from pipeline.train.engine.base import StepResult
from pipeline.train.state import State
from pipeline.train.track import Tracker

STRAGGLER_RATIO = 1.5  # of a rank's forward passes to the median rank's
STRAGGLER_LINES = 3  # metric lines in a row that make a rank a straggler

log = logging.getLogger("vitrail")


@runtime_checkable
class Saves(Protocol):
    """Counts of checkpoints that weren't written."""

    num_failed: int
    num_skipped: int


class Meter:
    """Measures the steps since the last metric line, and writes the next one.

    Losses, learning rate and gradient norm are the last step's; times and rates are over all steps since the last line.

    Args:
        tracker: writes the lines; rank 0's, None on other ranks.
        global_batch: samples of a step.
        saves: counts failed saves.
    """

    def __init__(self, tracker: Tracker | None, global_batch: int, saves: Saves) -> None:
        self._tracker = tracker
        self._saves = saves
        self._stragglers = Stragglers(ranks.gather(socket.gethostname()))
        self._global_batch = global_batch
        self._last: dict[str, Any] = {}
        self.restart()

    def restart(self) -> None:
        """Start over: the time so far wasn't spent on training."""
        self._began = time.monotonic()
        self._num_steps = 0
        self._wait_s = 0.0
        self._busy_s = 0.0
        self._num_absent = 0

    def add(self, step: Step, result: StepResult, lr: float, busy_s: float) -> None:
        """Count a step; `busy_s` as in `Engine`."""
        self._num_steps += 1
        self._busy_s += busy_s
        self._wait_s += step.wait_s
        self._num_absent += sum(int((batch.weight == 0).sum()) for batch in step.micro)
        self._last = {"loss": result.loss, **result.parts, "lr": lr, "grad_norm": result.grad_norm}

    def write_line(self, state: State) -> None:
        """Write a metric line and start over. Collective."""
        spent_s = max(time.monotonic() - self._began, 1e-9)
        gathered = ranks.gather((round(self._wait_s, 4), self._num_absent, round(self._busy_s, 4)))
        if self._tracker is not None and self._num_steps:
            values = {
                **self._last,
                "samples_per_s": round(self._num_steps * self._global_batch / spent_s, 2),
                "step_s": round(spent_s / self._num_steps, 4),
                "data_wait_s": [wait_s for wait_s, _, _ in gathered],
                "forward_s": [busy_s for _, _, busy_s in gathered],
                "num_absent": sum(absent for _, absent, _ in gathered),
                "num_skipped": state.num_skipped,
                "num_rollbacks": state.num_rollbacks,
                "num_failed_saves": self._saves.num_failed + self._saves.num_skipped,
            }
            for line in self._stragglers.add_line(values["forward_s"]):
                log.warning("%s", line)
            self._tracker.step(state.step, state.samples, values)
        self.restart()

    def flush(self) -> None:
        """Make all lines durable; called before a checkpoint, which makes their steps final."""
        if self._tracker is not None:
            self._tracker.flush()


class Stragglers:
    """Finds ranks whose forward passes take much longer than the others', several metric lines in a row.

    Args:
        hosts: the machine of each rank.
    """

    def __init__(self, hosts: list[str]) -> None:
        self._hosts = hosts
        self._slow_lines = [0] * len(hosts)

    def add_line(self, forward_s: list[float]) -> list[str]:
        """Take the ranks' forward times of one more metric line; a message for each rank that is a straggler now."""
        usual = statistics.median_low(forward_s)
        messages = []
        for rank, seconds in enumerate(forward_s):
            self._slow_lines[rank] = self._slow_lines[rank] + 1 if seconds > STRAGGLER_RATIO * usual > 0 else 0
            if self._slow_lines[rank] == STRAGGLER_LINES:
                messages.append(
                    f"rank {rank} on {self._hosts[rank]} slows the others down: its forward passes take "
                    f"{seconds / usual:.1f} times the median rank's"
                )
        return messages
