"""What happens when a loss or a gradient isn't finite: the step was skipped on all ranks; too many end the run."""

from __future__ import annotations

import logging

from pipeline.errors import DataError
from pipeline.train.engine import StepResult
from pipeline.train.state import State

NUM_NAMED = 16  # sample ids in a message

log = logging.getLogger("vitrail")


def check_finite(state: State, result: StepResult, max_consecutive: int) -> None:
    """Report a skipped step, and end the run after too many in a row.

    Raises:
        DataError: `max_consecutive` steps in a row were skipped.
    """
    if result.applied or not result.suspects:
        return
    named = ", ".join(map(str, result.suspects[:NUM_NAMED])) + (", ..." if len(result.suspects) > NUM_NAMED else "")
    log.warning(
        "step %d skipped on all ranks: loss %g, gradient norm %g; sample ids %s",
        state.step,
        result.loss,
        result.grad_norm,
        named,
    )
    if state.num_skipped_in_a_row >= max_consecutive:
        raise DataError(
            f"{state.num_skipped_in_a_row} steps in a row had a loss or gradient that isn't finite",
            where=f"step {state.step}, sample ids {named}",
            fix="lower optim.lr, set optim.clip_grad, try engine.precision=fp32, or look at these samples",
        )
