"""The contract of an engine: it runs a stage's forward, backward and update over all ranks, and saves its state.

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
    """The state of a span. The tensors of a snapshot are views, valid until the next `step`.

    `tensors` holds `value` (fp32 for parameters, a buffer's own type for buffers), the optimizer's state by element
    (`exp_avg`, `exp_avg_sq`, `momentum_buffer`), and `ema` where there is a moving average; `group` holds the
    optimizer's state by parameter (`lr`, `weight_decay`, `lr_scale`, `step`). Empty `group`: frozen, or a buffer.
    """

    name: str
    start: int
    stop: int
    tensors: Mapping[str, Float[Tensor, " stop_minus_start"]]
    group: Mapping[str, float]


class TensorFacts(NamedTuple):
    """Facts of a whole parameter or buffer, as checkpoints have them."""

    shape: tuple[int, ...]
    kind: str  # "parameter", "frozen" or "buffer"
    dtype: str  # of the values, as torch names it


class StepResult(NamedTuple):
    """The result of one global step; the same on every rank."""

    loss: float  # weighted mean over the global batch
    parts: dict[str, float]
    grad_norm: float  # before clipping; inf or NaN when the step was skipped for it
    applied: bool  # False: nothing changed
    stop: bool  # some rank was asked to stop
    cause: str = ""  # of a skipped step: "loss" or "gradient" isn't finite, a loss "spike"; "": no samples
    suspects: tuple[int, ...] = ()  # ids of samples that may be the cause


Read = Callable[[str, int, int], Fragment]


@runtime_checkable
class Engine(Protocol):
    """One stage in training. All methods but `snapshot` are collective.

    `busy_s` is the time that this rank's forward passes took in the last step. Up to ZeRO 2 they wait for no other
    rank, so they distinguish a slow rank from those that wait for it.
    """

    busy_s: float

    def step(
        self, micro: Sequence[Batch], lr: float, *, stop: bool = False, loss_limit: float = math.inf
    ) -> StepResult:
        """Forward and backward over this rank's micro batches, and one update.

        The step is skipped on all ranks when a loss or gradient isn't finite, or the mean loss exceeds `loss_limit`.

        Args:
            micro: this rank's share of the global batch.
            lr: learning rate, before each group's scale.
            stop: whether this rank was asked to stop.
            loss_limit: for the mean loss of the global batch.
        """
        ...

    def skip(self, *, stop: bool = False) -> StepResult:
        """Skip a step; the ranks only agree whether to stop."""
        ...

    def predict(self, batch: Batch) -> Predictions:
        """The stage's predictions, in eval mode and without gradients."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """In the block `predict` uses the moving average of the weights; no step and no snapshot may be taken there.

        Raises:
            ValueError: there is no moving average.
        """
        ...

    def facts(self) -> dict[str, TensorFacts]:
        """Every parameter and persistent buffer by name, in the module's order."""
        ...

    def snapshot(self) -> Iterable[Fragment]:
        """A rank's share of the state; the shares of all ranks together hold every element once."""
        ...

    def wanted(self) -> list[Span]:
        """The spans that `restore` will read on this rank."""
        ...

    def restore(self, read: Read) -> None:
        """Restore a snapshot, made with any ZeRO stage, world size and precision."""
        ...
