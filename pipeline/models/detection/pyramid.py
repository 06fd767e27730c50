"""Feature pyramids over a plain trunk: ViTDet's simple one, and FPN on taps.

Legend: B images, R x C grid of patches, D width of the trunk, F channels of the pyramid.

Levels are named as in detectron2 for patches of 16 pixels: p2, p3, p4, p5, p6, with strides of 1/4, 1/2, 1, 2 and 4
patches. Parameters of the simple pyramid are named as in detectron2: `simfp_2.{0,1,3,4,5}`, `simfp_3.{0,1,2}`,
`simfp_4.{0,1}`, `simfp_5.{1,2}`, with `norm` beside a convolution's `weight`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from pipeline.models.batch_norm import BatchNorm

NUM_LEVELS = 5
STRIDES_IN_PATCHES = (0.25, 0.5, 1.0, 2.0, 4.0)
HeadNorm = Literal["layer", "batch", "none"]


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of [B,C,H,W], as detectron2's `LayerNorm`.

    It isn't an `nn.LayerNorm`: detectron2 decides on weight decay by class and decays this one's weights, so the two
    must remain distinguishable.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Standardise the channels at each location."""
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


def norm_layer(kind: HeadNorm) -> Callable[[int], nn.Module] | None:
    """A function from a number of channels to a norm; None for no norm.

    `batch` takes its statistics from the micro batches of all ranks.
    """
    return {"layer": ChannelNorm, "batch": BatchNorm, "none": None}[kind]


class NormedConv(nn.Conv2d):
    """A convolution without bias, followed by a norm that is its child `norm`, as in detectron2's `Conv2d`."""

    def __init__(self, before: int, after: int, kernel: int) -> None:
        super().__init__(before, after, kernel, padding=kernel // 2, bias=False)
        self.norm = ChannelNorm(after)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f h w"]:
        """Convolve, then normalise."""
        out: Tensor = self.norm(super().forward(input))
        return out


class SimplePyramid(nn.Module):
    """ViTDet's pyramid: every level is made from the trunk's last map alone (Li et al. 2022, arXiv 2203.16527,
    section 3).
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        up = nn.ConvTranspose2d
        self.simfp_2 = nn.Sequential(
            up(width, half, 2, stride=2), ChannelNorm(half), nn.GELU(), up(half, quarter, 2, stride=2),
            NormedConv(quarter, channels, 1), NormedConv(channels, channels, 3),
        )  # fmt: skip
        self.simfp_3 = nn.Sequential(
            up(width, half, 2, stride=2), NormedConv(half, channels, 1), NormedConv(channels, channels, 3)
        )
        self.simfp_4 = nn.Sequential(NormedConv(width, channels, 1), NormedConv(channels, channels, 3))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2), NormedConv(width, channels, 1), NormedConv(channels, channels, 3))

    def forward(self, maps: tuple[Float[Tensor, "b d r c"], ...]) -> tuple[Float[Tensor, "b f _ _"], ...]:
        """p2 to p6, from the last of `maps`."""
        x = maps[-1]
        levels = [level(x) for level in (self.simfp_2, self.simfp_3, self.simfp_4, self.simfp_5)]
        return (*levels, _coarser(levels[-1]))


class RescaledTaps(nn.Module):
    """Four taps of the trunk at strides of 1/4, 1/2, 1 and 2 patches, at the trunk's width (Li et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        up = nn.ConvTranspose2d
        self.up4 = nn.Sequential(
            up(width, width, 2, stride=2), nn.GroupNorm(math.gcd(32, width), width), nn.GELU(),
            up(width, width, 2, stride=2),
        )  # fmt: skip
        self.up2 = up(width, width, 2, stride=2)
        self.down2 = nn.MaxPool2d(2)

    def forward(self, maps: tuple[Float[Tensor, "b d r c"], ...]) -> tuple[Float[Tensor, "b d _ _"], ...]:
        """Maps from fine to coarse, from taps from shallow to deep."""
        first, second, third, fourth = maps
        return self.up4(first), self.up2(second), third, self.down2(fourth)


class TappedPyramid(nn.Module):
    """FPN over four taps of the trunk, one after each quarter of its blocks (Li et al. 2021, arXiv 2111.11429).

    The rescaled taps go through torchvision's top-down pyramid, with a norm after its convolutions where the paper has
    BatchNorm.
    """

    def __init__(self, width: int, channels: int, norm: HeadNorm) -> None:
        super().__init__()
        self.rescale = RescaledTaps(width)
        self.fpn = FeaturePyramidNetwork([width] * 4, channels, norm_layer=norm_layer(norm))

    def forward(self, maps: tuple[Float[Tensor, "b d r c"], ...]) -> tuple[Float[Tensor, "b f _ _"], ...]:
        """p2 to p6, from four taps, the shallowest first."""
        scaled = OrderedDict((str(i), x) for i, x in enumerate(self.rescale(maps)))
        levels = list(self.fpn(scaled).values())
        return (*levels, _coarser(levels[-1]))


def quarter_taps(depth: int) -> tuple[int, ...]:
    """Numbers of the last block of each quarter of a trunk."""
    return tuple(max(0, -(-depth * quarter // 4) - 1) for quarter in (1, 2, 3, 4))


def as_map(tokens: Float[Tensor, "b t d"], grid: tuple[int, int]) -> Float[Tensor, "b d r c"]:
    """Tokens in image order, rearranged as a feature map."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def _coarser(x: Tensor) -> Tensor:
    """Every other row and column, which detectron2 writes as a max-pool with kernel 1 (`LastLevelMaxPool`)."""
    return x[:, :, ::2, ::2]
