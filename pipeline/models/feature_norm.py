"""Standardised features, identical for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.ranks import sum_over_ranks


class FeatureNorm(nn.Module):
    """BatchNorm1d(affine=False) for features that need no gradient, with statistics over all ranks' present samples.

    MAE's linear probe puts it before its head. In training each feature gets mean 0 and variance 1 over the current
    micro batches of all ranks, so the layout doesn't matter as long as the ranks together hold the same samples; with
    gradient accumulation those are not the whole global batch. In evaluation running averages are used, kept in fp32
    whatever precision the module is cast to; the first updates are plain means, so that the initial values don't
    affect short runs.
    """

    running_mean: Tensor
    running_var: Tensor
    num_updates: Tensor

    def __init__(self, width: int, *, eps: float = 1e-6, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_updates", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "b d"], weight: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Standardise rows; those of weight 0 are left out of the statistics. Collective in training."""
        x = x.float()
        mean, variance = self._update(x, weight) if self.training else (self.running_mean, self.running_var)
        return (x - mean) * torch.rsqrt(variance + self.eps)

    def _update(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.double() * (weight > 0).unsqueeze(1)
        count = (weight > 0).sum().double().view(1)
        sums = sum_over_ranks(torch.cat([count, rows.sum(0), rows.square().sum(0)]))
        count = sums[:1].clamp_min(1)
        mean, square = sums[1:].chunk(2)
        mean = mean / count
        variance = (square / count - mean.square()).clamp_min(0)
        self.num_updates += 1
        share = (1.0 / self.num_updates).clamp_min(self.momentum).to(torch.float32)
        self.running_mean.lerp_(mean.float(), share)
        self.running_var.lerp_((variance * count / (count - 1).clamp_min(1)).float(), share)
        return mean.float(), variance.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the averages, but don't round them: in bf16 they would stop changing."""
        averages = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in averages.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self
