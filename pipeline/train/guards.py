"""Steps that would do harm: with a loss or gradient that isn't finite, or a loss far above the last ones.

The engine skips such a step on all ranks, and nothing changes. After too many in a row, the run goes back to a
checkpoint from before them and skips the samples around them, as PaLM did by hand (Chowdhery et al. 2022, section 5.1);
after too many of these rollbacks it stops. Every decision depends on the saved state alone, so a resumed run takes the
same ones.
"""

from __future__ import annotations

import logging
import math
import statistics

from pipeline.errors import DataError
from pipeline.train.config import TrainConfig
from pipeline.train.engine.base import StepResult
from pipeline.train.state import State

NUM_NAMED = 16  # sample ids in a message
MAD_TO_DEVIATION = 1.4826  # of a normal distribution

log = logging.getLogger("vitrail")


class RollBack(Exception):  # noqa: N818 -- not an error: the run continues from an older checkpoint
    """The run is to go back.

    Args:
        state: the state that is given up.
        before_steps: resume the newest checkpoint at or before the first of these steps, else the second.
        window: samples [start, stop) of the run that are skipped from then on.
        reason: the error to raise if there is no such checkpoint.
    """

    def __init__(self, state: State, before_steps: tuple[int, int], window: tuple[int, int], reason: DataError) -> None:
        super().__init__(str(reason))
        self.state = state
        self.before_steps = before_steps
        self.window = window
        self.reason = reason


class Guards:
    """Decides, by a run's configuration, which steps are skipped and when to go back."""

    def __init__(self, config: TrainConfig) -> None:
        self._batch = config.data.global_batch
        self._max_consecutive = config.nonfinite.max_consecutive
        self._max_rollbacks = config.nonfinite.max_rollbacks
        self._spikes = config.spikes

    def loss_limit(self, state: State) -> float:
        """The loss above which the next step is skipped: median and scaled median deviation of the last losses."""
        if self._spikes is None or len(state.losses) < self._spikes.window:
            return math.inf
        median = statistics.median(state.losses)
        deviation = statistics.median(abs(loss - median) for loss in state.losses) * MAD_TO_DEVIATION
        return median + self._spikes.deviations * max(deviation, self._spikes.floor * abs(median))

    def skips(self, state: State) -> bool:
        """Whether the next global batch is skipped, since a rollback excluded it."""
        return any(start <= state.samples < stop for start, stop in state.windows_to_skip)

    def advance(self, state: State, after: State, result: StepResult) -> State:
        """Judge the step that led from `state` to `after`, and remember its loss.

        Raises:
            RollBack: too many steps in a row were skipped.
            DataError: the same, and the run has gone back too often already.
        """
        if result.applied and self._spikes is not None:
            after = after._replace(losses=(*state.losses, result.loss)[-self._spikes.window :])
        if result.applied or not result.cause:
            return after
        named = ", ".join(map(str, result.suspects[:NUM_NAMED])) + (", ..." if len(result.suspects) > NUM_NAMED else "")
        log.warning(
            "step %d skipped on all ranks (%s): loss %g, gradient norm %g; sample ids %s",
            after.step,
            result.cause,
            result.loss,
            result.grad_norm,
            named,
        )
        if after.num_skipped_in_a_row < self._max_consecutive:
            return after
        reason = DataError(
            f"{after.num_skipped_in_a_row} steps in a row had a loss or gradient that isn't finite or a loss beyond "
            f"the limit, after {after.num_rollbacks} rollback(s)",
            where=f"step {after.step}, sample ids {named}",
            fix="lower optim.lr, set optim.clip_grad, try engine.precision=fp32, or look at these samples",
        )
        if after.num_rollbacks >= self._max_rollbacks:
            raise reason
        num_bad = after.num_skipped_in_a_row
        # The cause may lie before the bad steps: as many steps before them are skipped too.
        steps = (after.step - 2 * num_bad, after.step - num_bad)
        raise RollBack(after, steps, (max(0, after.samples - 2 * num_bad * self._batch), after.samples), reason)
