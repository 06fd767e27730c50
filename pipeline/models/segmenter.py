"""Heads for semantic segmentation: linear, and UPerNet on four taps.

Legend: B images, R x C grid of patches, D width of the trunk, F channels of the head, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops.misc import Conv2dNormActivation

from pipeline.models.detection.pyramid import HeadNorm, RescaledTaps, norm_layer

POOLED_SIDES = (1, 2, 3, 6)


class LinearSegmenter(nn.Module):
    """One linear layer on each patch of the last map (the linear protocol of DINOv2 and others)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, maps: tuple[Float[Tensor, "b d r c"], ...]) -> Float[Tensor, "b k r c"]:
        """Logits of each patch."""
        normed = self.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: Tensor = self.head(normed)
        return out


class UPerNet(nn.Module):
    """Pyramid pooling over the coarsest map, a top-down path, and fusion of all levels (Xiao et al. 2018, arXiv
    1807.10221), on taps rescaled as in MAE's and BEiT's segmentation.
    """

    def __init__(self, width: int, channels: int, num_classes: int, norm: HeadNorm) -> None:
        super().__init__()
        layer = norm_layer(norm)
        self.rescale = RescaledTaps(width)
        self.pools = nn.ModuleList(_conv(width, channels, 1, layer) for _ in POOLED_SIDES)
        self.bottleneck = _conv(width + len(POOLED_SIDES) * channels, channels, 3, layer)
        self.lateral = nn.ModuleList(_conv(width, channels, 1, layer) for _ in range(3))
        self.smooth = nn.ModuleList(_conv(channels, channels, 3, layer) for _ in range(3))
        self.fuse = _conv(4 * channels, channels, 3, layer)
        self.head = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, maps: tuple[Float[Tensor, "b d r c"], ...]) -> Float[Tensor, "b k _ _"]:
        """Logits at a stride of a quarter of a patch."""
        *fine, last = self.rescale(maps)
        size = (last.shape[2], last.shape[3])
        pooled = [
            _resized(conv(F.adaptive_avg_pool2d(last, side)), size)
            for conv, side in zip(self.pools, POOLED_SIDES, strict=True)
        ]
        top: Tensor = self.bottleneck(torch.cat([last, *pooled], dim=1))
        levels = [top]
        for conv, level in zip(reversed(self.lateral), reversed(fine), strict=True):
            lateral = conv(level)
            levels.insert(0, lateral + _resized(levels[0], (lateral.shape[2], lateral.shape[3])))
        largest = (levels[0].shape[2], levels[0].shape[3])
        smoothed = [conv(level) for conv, level in zip(self.smooth, levels[:-1], strict=True)]
        together = torch.cat([_resized(level, largest) for level in (*smoothed, top)], dim=1)
        out: Tensor = self.head(self.fuse(together))
        return out


def _conv(before: int, after: int, kernel: int, norm: Callable[[int], nn.Module] | None) -> nn.Module:
    conv: nn.Module = Conv2dNormActivation(before, after, kernel, norm_layer=norm)
    return conv


def _resized(x: Float[Tensor, "b f _ _"], size: tuple[int, int]) -> Float[Tensor, "b f _ _"]:
    if (x.shape[2], x.shape[3]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
