"""From images to one vector per patch.

Legend: B samples, N patches of the image, K kept patches, P = p * p * 3 values of a patch of p x p pixels, D width.
"""

from __future__ import annotations

import math

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.batch_norm import BatchNorm
from pipeline.models.pixels import patchify
from pipeline.models.trunk.config import ModelConfig
from pipeline.models.trunk.masking import take


def patch_embedding(config: ModelConfig) -> PatchEmbed | NormedPatchEmbed | ConvStem:
    """The configured kind of patch embedding; its forward takes (images, keep)."""
    width = config.shape.width
    if config.patch_embed == "norm_linear":
        return NormedPatchEmbed(width, config.patch_size, config.norm_eps)
    if config.patch_embed == "conv_stem":
        return ConvStem(width, config.stem)
    return PatchEmbed(width, config.patch_size, bias=not config.pre_norm)


class PatchEmbed(nn.Module):
    """One linear projection of each patch. Its weight has the shape of the equivalent convolution, [D,3,p,p]."""

    def __init__(self, width: int, patch_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(3, width, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k d"]:
        """Embed all patches, or only those at `keep`: masked ones aren't projected at all."""
        patches = patchify(images, self.patch_size)
        if keep is not None:
            patches = take(patches, keep)
        out: Tensor = self.proj(patches)
        return out


class PatchProjection(nn.Conv2d):
    """A convolution with stride = kernel, applied to patches that were cut out before."""

    def forward(self, patches: Float[Tensor, "b k P"]) -> Float[Tensor, "b k d"]:
        """Project patches whose values are in (row, column, channel) order."""
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

    A convolution that changes the number of channels has stride 2, one that doesn't has stride 1. Initialisation is
    pycls's. Patches depend on their neighbours' pixels, so `keep` selects after the stem.

    Batch norm's statistics are those of the micro batches of all ranks, including absent samples (see `BatchNorm`): it
    is the only part of the trunk in which samples of a batch affect each other.
    """

    def __init__(self, width: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        before = 3
        for after in channels:
            stride = 1 if after == before else 2
            self.convs.append(nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False))
            self.norms.append(BatchNorm(after))
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
