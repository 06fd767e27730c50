"""From images to one vector per patch.

Legend: B samples, N patches of the image, K kept patches, P = p * p * 3 values of a patch of p x p pixels, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.config import ModelConfig
from pipeline.models.masking import take
from pipeline.models.pixels import patchify


def patch_embedding(config: ModelConfig) -> PatchEmbed | NormedPatchEmbed | ConvStem:
    """The configured kind; its forward takes (images, keep)."""
    width = config.shape.width
    if config.patch_embed == "norm_linear":
        return NormedPatchEmbed(width, config.patch_size, config.norm_eps)
    if config.patch_embed == "conv_stem":
        return ConvStem(width, config.stem)
    return PatchEmbed(width, config.patch_size, bias=not config.pre_norm)


class PatchEmbed(nn.Module):
    """One linear projection of each patch. Its weight has the shape of the convolution it equals, [D,3,p,p]."""

    def __init__(self, width: int, patch_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(3, width, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k d"]:
        """Embed all patches, or those at `keep`: masked ones are not even projected."""
        patches = patchify(images, self.patch_size)
        if keep is not None:
            patches = take(patches, keep)
        out: Tensor = self.proj(patches)
        return out


class PatchProjection(nn.Conv2d):
    """A convolution with stride = kernel, applied to patches that are cut out already."""

    def forward(self, patches: Float[Tensor, "b k P"]) -> Float[Tensor, "b k d"]:
        """Patches hold their values in (row, column, channel) order."""
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, -1)
        return F.linear(patches.to(weight.dtype), weight, self.bias)


class NormedPatchEmbed(nn.Module):
    """LayerNorm, linear, LayerNorm over flattened patches (Kumar et al. 2023, "Dual PatchNorm", arXiv 2302.01327)."""

    def __init__(self, width: int, patch_size: int, eps: float) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_in = nn.LayerNorm(3 * patch_size**2, eps=eps)
        self.proj = nn.Linear(3 * patch_size**2, width)
        self.norm_out = nn.LayerNorm(width, eps=eps)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k d"]:
        """Embed all patches, or those at `keep`."""
        patches = patchify(images, self.patch_size)
        if keep is not None:
            patches = take(patches, keep)
        out: Tensor = self.norm_out(self.proj(self.norm_in(patches.to(self.proj.weight.dtype))))
        return out


class ConvStem(nn.Module):
    """3x3 convolutions with batch norm and ReLU, then 1x1 to the width (Xiao et al. 2021, arXiv 2106.14881).

    A convolution that changes the number of channels has stride 2, one that keeps it stride 1. Initialisation is
    pycls's. Neighbouring patches see each other's pixels, so `keep` selects only after the stem.

    Batch norm's statistics are those of a rank's micro batch, absent samples among them: the one part of the trunk
    that is not the same for any number of ranks.
    """

    def __init__(self, width: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        before = 3
        for after in channels:
            stride = 1 if after == before else 2
            self.convs.append(nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False))
            self.norms.append(StemNorm(after))
            before = after
        self.proj = nn.Conv2d(before, width, 1)
        nn.init.normal_(self.proj.weight, std=math.sqrt(2 / width))
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k d"]:
        """All patches in image order, or those at `keep`."""
        x = images.to(self.proj.weight.dtype)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        patches = self.proj(x).flatten(2).transpose(1, 2)
        return patches if keep is None else take(patches, keep)


class StemNorm(nn.Module):
    """Batch norm that computes, and keeps its running averages, in fp32 or better: in bf16 they would stop moving."""

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
        """Standardise each channel, by this batch's statistics in training and by the running ones otherwise."""
        mean, variance = self.running_mean, self.running_var
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        out = F.batch_norm(x.to(mean.dtype), mean, variance, weight, bias, self.training, self.momentum, self.eps)
        return out.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but don't round the averages."""
        kept = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            if getattr(self, name).dtype.itemsize < value.dtype.itemsize:
                setattr(self, name, value.to(getattr(self, name).device))
        return self
