"""Exact gradient accumulation where DeepSpeed would add micro batches up in bf16."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class GradientSums:
    """fp32 sums of low-precision gradients over the micro batches of one step.

    Args:
        parameters: whose `grad` is summed.
        enabled: False makes both methods do nothing, for engines that already keep fp32 sums.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, enabled: bool) -> None:
        self._parameters = parameters if enabled else ()
        self._sums: list[Tensor | None] = [None] * len(self._parameters)

    def add(self) -> None:
        """Add the gradients of the last backward pass to the sums, and clear them."""
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                total = self._sums[i]
                self._sums[i] = parameter.grad.float() if total is None else total.add_(parameter.grad)
                parameter.grad = None

    def write_back(self) -> None:
        """Make the sums the gradients, rounded once."""
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = None if total is None else total.to(parameter.dtype)
