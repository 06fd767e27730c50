"""Batch norm whose statistics are those of all ranks (SyncBN, Peng et al. 2018, arXiv 1711.07240, section 3.2.2).

Legend: B samples (or regions) of this rank, C channels, H W places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.ranks import sum_over_ranks, world

_PLACES = (0, 2, 3)


class BatchNorm(nn.Module):
    """Batch norm that computes, and keeps its running averages, in fp32 or better: in bf16 they would stop moving.

    In training each channel is standardised over the current micro batches of all ranks, forwards and backwards. So
    outputs and gradients don't depend on how samples are divided among ranks, as long as the ranks together hold the
    same samples; with gradient accumulation those are a part of the global batch. torch's SyncBatchNorm does the same,
    but on GPUs only. Ranks may hold different numbers of rows, or none. Collective in training: every rank must call it
    the same number of times.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Standardise each channel, by the batch's statistics in training and by the running averages otherwise."""
        dtype = self.running_mean.dtype
        weight, bias, wide = self.weight.to(dtype), self.bias.to(dtype), x.to(dtype)
        alone = world().size == 1 and x[:, 0].numel() > 1
        if alone or not self.training:
            mean, variance = self.running_mean, self.running_var
            out = F.batch_norm(wide, mean, variance, weight, bias, self.training, self.momentum, self.eps)
        else:
            mean, variance, count = self._statistics(wide.detach())
            out = _Standardise.apply(wide, weight, bias, mean, torch.rsqrt(variance + self.eps), count)
        return out.to(x.dtype)

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and number of all ranks' values of each channel; also updates the running averages."""
        local_count = x[:, 0].numel()
        moments = x.new_zeros(2, x.shape[1], dtype=torch.float64)
        if local_count:
            variance, mean = torch.var_mean(x, _PLACES, correction=0)
            moments = torch.stack([mean.double(), variance.double() + mean.double().square()]) * local_count
        sums = sum_over_ranks(torch.cat([moments.flatten(), moments.new_full((1,), local_count)]))
        count = sums[-1]
        mean, square = (sums[:-1] / count.clamp_min(1)).chunk(2)
        variance = (square - mean.square()).clamp_min(0)
        if count > 0:
            self.running_mean.lerp_(mean.to(x.dtype), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1).clamp_min(1)).to(x.dtype), self.momentum)
        return mean.to(x.dtype), variance.to(x.dtype), count.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the averages, but don't round them."""
        averages = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in averages.items():
            if getattr(self, name).dtype.itemsize < value.dtype.itemsize:
                setattr(self, name, value.to(getattr(self, name).device))
        return self


class _Standardise(torch.autograd.Function):
    """(x - mean) / deviation * weight + bias, with the mean and deviation of all ranks' x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, count: Tensor
    ) -> Tensor:
        normed = (x - _wide(mean)) * _wide(inverse)
        ctx.save_for_backward(normed, weight, inverse, count)
        return normed * _wide(weight) + _wide(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed, weight, inverse, count = ctx.saved_tensors
        gradient = gradients[0]
        to_bias, to_weight = gradient.sum(_PLACES), (gradient * normed).sum(_PLACES)
        # Each value moves the shared mean and deviation, so gradients reach it from every rank's outputs.
        sums = sum_over_ranks(torch.cat([to_bias, to_weight]).double()) / count.clamp_min(1)
        along_mean, along_normed = sums.to(gradient.dtype).chunk(2)
        to_x = (gradient - _wide(along_mean) - normed * _wide(along_normed)) * _wide(weight * inverse)
        return to_x, to_weight, to_bias, None, None, None


def _wide(x: Tensor) -> Tensor:
    """One value per channel, shaped to broadcast over [B,C,H,W]."""
    return x.view(1, -1, 1, 1)
