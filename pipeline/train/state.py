"""The state of a run, what is due after a step, and whether to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.data.order.permutation import Cursor
from pipeline.train.config import TrainConfig
from pipeline.train.engine.base import StepResult

SAVING_RESERVE_S = 60.0  # of a time limit, for the last checkpoint


class State(NamedTuple):
    """How far a run is. Saved in every checkpoint; the same on all ranks."""

    step: int = 0
    samples: int = 0
    cursor: Cursor = Cursor()
    num_skipped: int = 0  # steps whose loss or gradient wasn't finite
    num_skipped_in_a_row: int = 0
    num_rollbacks: int = 0
    windows_to_skip: tuple[tuple[int, int], ...] = ()  # samples [start, stop) that rollbacks exclude from training
    losses: tuple[float, ...] = ()  # of the last applied steps, if the configuration has `spikes`

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
        """The state to continue from at this older one, without the samples of `window`.

        Args:
            window: samples [start, stop).
            earlier: the state that was given up.
        """
        windows = {*self.windows_to_skip, *earlier.windows_to_skip, window}
        return self._replace(
            windows_to_skip=tuple(sorted(windows)),
            num_rollbacks=earlier.num_rollbacks + 1,
            num_skipped=earlier.num_skipped,
        )

    def document(self) -> dict[str, Any]:
        """As saved, under the names that checkpoints have used from the first."""
        document = {**self._asdict(), "cursor": self.cursor._asdict()}
        document["passed"] = document.pop("windows_to_skip")
        return document

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> State:
        """As read back."""
        fields = {key: value for key, value in document.items() if key != "passed"}
        return cls(
            **{
                **fields,
                "cursor": Cursor(**document["cursor"]),
                "windows_to_skip": tuple((int(start), int(stop)) for start, stop in document.get("passed", ())),
                "losses": tuple(document.get("losses", ())),
            }
        )


class Due:
    """What is to be done after a step. It depends on samples alone, so a resumed run does the same."""

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
        """Whether a checkpoint is due; the last one is saved apart from these.

        Not after a skipped step: nothing has changed, and a checkpoint that a rollback needs would be deleted for it.
        """
        return not self.done(state) and not state.num_skipped_in_a_row and self._passed(state, self._checkpoint)

    def _passed(self, state: State, every: int | None) -> bool:
        """Whether the last step crossed a multiple of `every` samples."""
        return every is not None and state.samples // every > (state.samples - self._batch) // every


class StopSignal:
    """A request to stop: from a signal handler, a machine that is drained, or a time limit.

    Each rank has its own; at every step the loop lets the ranks agree.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._deadline: float | None = None

    def request(self) -> None:
        """Ask to stop after the current step; safe in a signal handler."""
        self._event.set()

    def limit(self, time_limit_s: float | None) -> None:
        """Stop early enough to have saved within `time_limit_s` from now."""
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
