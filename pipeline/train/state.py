"""Where a run is, what is due next, and whether to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.data.order.permutation import Cursor
from pipeline.train.config import TrainConfig
from pipeline.train.engine.base import StepResult

SAVING_RESERVE_S = 60.0  # of a time limit, kept for the last checkpoint


class State(NamedTuple):
    """Where a run is. Saved in every checkpoint; the same on all ranks."""

    step: int = 0
    samples: int = 0
    cursor: Cursor = Cursor()
    num_skipped: int = 0  # steps whose loss or gradient wasn't finite
    num_skipped_in_a_row: int = 0
    num_rollbacks: int = 0
    passed: tuple[tuple[int, int], ...] = ()  # samples [start, stop) that are passed over since a rollback
    losses: tuple[float, ...] = ()  # of the last applied steps, where a rule looks at them

    def advanced(self, cursor: Cursor, result: StepResult, global_batch: int) -> State:
        """The state after one more step."""
        return self._replace(
            step=self.step + 1,
            samples=self.samples + global_batch,
            cursor=cursor,
            num_skipped=self.num_skipped + bool(result.cause),
            num_skipped_in_a_row=self.num_skipped_in_a_row + 1 if result.cause else 0,
        )

    def rolled_back(self, window: tuple[int, int], earlier: State) -> State:
        """From this older state the run goes on past `window`; `earlier` is where it was given up."""
        windows = {*self.passed, *earlier.passed, window}
        return self._replace(
            passed=tuple(sorted(windows)), num_rollbacks=earlier.num_rollbacks + 1, num_skipped=earlier.num_skipped
        )

    def document(self) -> dict[str, Any]:
        """As saved."""
        return {**self._asdict(), "cursor": self.cursor._asdict()}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> State:
        """As read back."""
        windows = tuple((int(start), int(stop)) for start, stop in document.get("passed", ()))
        losses = tuple(document.get("losses", ()))
        return cls(**{**document, "cursor": Cursor(**document["cursor"]), "passed": windows, "losses": losses})


class Due:
    """What is to be done after a step: a function of samples alone, so that a resumed run does the same."""

    def __init__(self, config: TrainConfig) -> None:
        self._batch = config.data.global_batch
        self._length = config.length_samples
        self._log = config.log_every_samples or 1
        self._evaluate = config.evaluate_every_samples
        self._checkpoint = config.checkpoint.every_samples

    def done(self, state: State) -> bool:
        """Whether the length is reached."""
        return state.samples >= self._length

    def log(self, state: State) -> bool:
        """Whether metrics are due; at the end they always are."""
        return self.done(state) or self._passed(state, self._log)

    def evaluate(self, state: State) -> bool:
        """Whether an evaluation is due; at the end it always is."""
        return self.done(state) or self._passed(state, self._evaluate)

    def checkpoint(self, state: State) -> bool:
        """Whether a checkpoint is due, but for the last one.

        None is while steps are being left out: nothing has changed, and it would push out one to go back to.
        """
        return not self.done(state) and not state.num_skipped_in_a_row and self._passed(state, self._checkpoint)

    def _passed(self, state: State, every: int | None) -> bool:
        """Whether the last step crossed a multiple of `every` samples."""
        return every is not None and state.samples // every > (state.samples - self._batch) // every


class StopSignal:
    """A wish to stop: from a signal handler, a drain, or a time limit.

    Each rank has its own; the loop lets all ranks agree within a step.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._deadline: float | None = None

    def request(self) -> None:
        """Ask to stop after the step under way; safe in a signal handler."""
        self._event.set()

    def limit(self, time_limit_s: float | None) -> None:
        """Stop in time to have saved when `time_limit_s` from now is over."""
        if time_limit_s is not None:
            self._deadline = time.monotonic() + max(time_limit_s / 2, time_limit_s - SAVING_RESERVE_S)

    def requested(self) -> bool:
        """Whether to stop."""
        return self._event.is_set() or self._over()

    def reason(self) -> str:
        """Why, in words."""
        return "the time limit was near" if self._over() and not self._event.is_set() else "asked to stop"

    def _over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline
