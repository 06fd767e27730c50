"""What runs a stage's forward, backward and update over all ranks, and hands out and takes back its state.

The loop and the checkpoints know this file alone; `deepspeed_engine` implements it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.evaluate.base import Predictions


class Span(NamedTuple):
    """Elements [start, stop) of one flattened parameter or buffer."""

    name: str
    start: int
    stop: int


class Fragment(NamedTuple):
    """A span's state. The tensors of a snapshot are views, valid until the next `step`.

    `tensors` holds `value` (fp32 for parameters, a buffer's own type for buffers) and what the optimizer keeps per
    element (`exp_avg`, `exp_avg_sq`, `momentum_buffer`), and `ema` where a moving average is kept; `group` what the
    optimizer keeps per parameter (`lr`, `weight_decay`, `lr_scale`, `step`). Empty `group`: frozen, or a buffer.
    """

    name: str
    start: int
    stop: int
    tensors: Mapping[str, Float[Tensor, " stop_minus_start"]]
    group: Mapping[str, float]


class TensorFacts(NamedTuple):
    """What a checkpoint tells about one parameter or buffer as a whole."""

    shape: tuple[int, ...]
    kind: str  # "parameter", "frozen" or "buffer"
    dtype: str  # torch's name of the values' type


class StepResult(NamedTuple):
    """What one global step came to; the same on every rank."""

    loss: float  # weighted mean over the global batch
    parts: dict[str, float]
    grad_norm: float  # before clipping; inf or NaN when the step was skipped for it
    applied: bool  # False: nothing changed
    stop: bool  # some rank was asked to stop
    cause: str = ""  # why it wasn't applied: "loss" or "gradient" isn't finite, loss "spike"; "": nothing to learn from
    suspects: tuple[int, ...] = ()  # ids of the samples it came from, all of the batch where it can't be told


Read = Callable[[str, int, int], Fragment]


@runtime_checkable
class Engine(Protocol):
    """One stage in training. All methods but `snapshot` are collective.

    `busy_s` is what this rank's forward passes took in the last step. Up to ZeRO 2 it waits for no other rank in them,
    so they tell a slow one from those that wait for it.
    """

    busy_s: float

    def step(
        self, micro: Sequence[Batch], lr: float, *, stop: bool = False, loss_limit: float = math.inf
    ) -> StepResult:
        """Forward and backward over this rank's micro batches, one update, unless the loss is beyond the limit.

        `stop` is this rank's vote.
        """
        ...

    def skip(self, *, stop: bool = False) -> StepResult:
        """No step: only the vote."""
        ...

    def predict(self, batch: Batch) -> Predictions:
        """The stage's predictions, in eval mode and without gradients."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block `predict` uses the moving average of the weights; no step and no snapshot may be taken.

        Raises:
            ValueError: none is kept.
        """
        ...

    def facts(self) -> dict[str, TensorFacts]:
        """Every parameter and persistent buffer by name, in the module's order."""
        ...

    def snapshot(self) -> Iterable[Fragment]:
        """The rank's own share of the state; all ranks' shares together hold every element once."""
        ...

    def wanted(self) -> list[Span]:
        """What `restore` will read on this rank."""
        ...

    def restore(self, read: Read) -> None:
        """Take over a snapshot made at any ZeRO stage, world size and precision."""
        ...
