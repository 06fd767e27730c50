"""BatchNorm's running statistics differ over ranks: their mean is kept, so that all ranks predict alike."""

from __future__ import annotations

import torch
from torch import nn

from pipeline import ranks


class RunningStatistics:
    """The running means and variances of a module's BatchNorm layers."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = [
            buffer
            for layer in module.modules()
            if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats
            for buffer in (layer.running_mean, layer.running_var)
            if buffer is not None
        ]

    def average(self) -> None:
        """Set each to its mean over the ranks. Collective, but for a module without such layers."""
        if not self._buffers:
            return
        flat = torch.cat([buffer.reshape(-1).float() for buffer in self._buffers])
        mean = ranks.sum_over_ranks(flat) / ranks.world().size
        start = 0
        for buffer in self._buffers:
            buffer.copy_(mean[start : start + buffer.numel()].view(buffer.shape))
            start += buffer.numel()
