"""The vision transformer that every stage shares.

Legend: B samples, N patches of the image, K kept patches, R prefix tokens (cls, then registers), T = R + (N or K)
tokens, D width, p patch size.

Parameters are named as in timm and the official MAE (`patch_embed.proj`, `cls_token`, `pos_embed`,
`blocks.i.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}`, `norm`), so that their state dicts map one to one. A
fixed sincos table is a constant of the configuration and not part of the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.attention import Attention
from pipeline.models.config import Gelu, ModelConfig
from pipeline.models.masking import take
from pipeline.models.noise import uniform
from pipeline.models.pixels import patchify
from pipeline.models.position import FixedPositions, interpolate


class Tokens(NamedTuple):
    """Output of the trunk. A NamedTuple, since ZeRO-3's hooks can't see into other classes."""

    patches: Float[Tensor, "b k d"]  # in image order, or in keep's order
    prefix: Float[Tensor, "b r d"]  # cls, registers
    grid: tuple[int, int]  # rows and columns of the whole image
    taps: tuple[Float[Tensor, "b t d"], ...] = ()  # all tokens after the blocks asked for, before the final norm


class PatchEmbed(nn.Module):
    """One linear projection of each patch. Its weight has the shape of the convolution it equals, [D,3,p,p]."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(3, width, kernel_size=patch_size, stride=patch_size)

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


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int, gelu: Gelu) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.gelu = gelu

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Apply to each token."""
        x = self.fc1(x)
        if self.gelu == "quick":
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = F.gelu(x, approximate="tanh" if self.gelu == "tanh" else "none")
        out: Tensor = self.fc2(x)
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_width: int, eps: float, gelu: Gelu = "erf") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_width, gelu)

    def forward(
        self, x: Float[Tensor, "b t d"], branch_scale: Float[Tensor, "b 2"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """`branch_scale` multiplies the two residual branches of each sample: 0 or 1/(1-rate) with drop path."""
        x = x + _scaled(self.attn(self.norm1(x)), branch_scale, 0)
        return x + _scaled(self.mlp(self.norm2(x)), branch_scale, 1)


def _scaled(branch: Tensor, branch_scale: Tensor | None, i: int) -> Tensor:
    return branch if branch_scale is None else branch * branch_scale[:, i].to(branch.dtype).view(-1, 1, 1)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) that can encode a part of its patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, depth, mlp_width, heads = config.shape
        self.width = width
        self.num_prefix = int(config.cls_token) + config.registers
        self.num_layers = depth + 1  # of layer_of: 0 ... num_layers
        self.patch_embed = PatchEmbed(width, config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.cls_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.registers, width)) if config.registers else None
        trained = config.position == "learned" or config.position_trained
        rows = int(config.cls_token) + config.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, rows, width)) if trained else None
        kind = "sincos2d" if config.position == "learned" else config.position
        self.fixed = FixedPositions(config.grid, width, kind, config.interpolation)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, config.norm_eps, config.gelu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps) if config.final_norm else None
        self._initialize()

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        *,
        keep: Int[Tensor, "b k"] | None = None,
        taps: Sequence[int] = (),
        seeds: Int[Tensor, " b"] | None = None,
    ) -> Tokens:
        """Encode images.

        Args:
            images: normalised pixels; any size that is a multiple of the patch size.
            keep: encode only these patches, each with the position it has in the image; the output is in keep's order.
            taps: numbers of blocks whose output is wanted too.
            seeds: the samples' seeds, which drop path is drawn from; needed in training when it is on.
        """
        p = self.config.patch_size
        grid = (images.shape[2] // p, images.shape[3] // p)
        x = self.patch_embed(images, keep)
        prefix, patches = self._positions(grid, x)
        if keep is not None:
            patches = take(patches.expand(len(keep), -1, -1), keep)
        x = x + patches
        if prefix is not None:
            x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        scale = self._branch_scales(seeds)
        tapped: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = block(x, None if scale is None else scale[:, i])
            if i in taps:
                tapped[i] = x
        if self.norm is not None:
            x = self.norm(x)
        return Tokens(x[:, self.num_prefix :], x[:, : self.num_prefix], grid, tuple(tapped[i] for i in taps))

    def layer_of(self, parameter: str) -> int:
        """Number of the layer a parameter (named within the trunk) belongs to, for layer-wise decay.

        0 is the embedding, i + 1 block i, `num_layers` the final norm and whatever follows the trunk; the learning
        rate's factor is decay ** (num_layers - layer), as in MAE's fine-tuning.
        """
        if parameter.startswith("blocks."):
            return int(parameter.split(".")[1]) + 1
        return self.num_layers if parameter.startswith("norm.") else 0

    def _positions(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor | None, Tensor]:
        """Prefix tokens [1,R,D] with their position added, and positions of the patches [1,N,D]."""
        native = self.config.grid
        cls: Tensor | None = self.cls_token
        if self.pos_embed is None:
            table = self.fixed(grid, like).unsqueeze(0)
        else:
            patches = self.pos_embed[0, -self.config.num_patches :]
            table = interpolate(patches, native, grid, self.config.interpolation).unsqueeze(0)
            cls = None if cls is None else cls + self.pos_embed[:, :1]
        parts: list[Tensor] = [part for part in (cls, self.reg_token) if part is not None]
        return (torch.cat(parts, dim=1) if parts else None), table

    def _branch_scales(self, seeds: Tensor | None) -> Tensor | None:
        """Drop path's factors [B, depth, 2] in training, drawn from the seeds (Huang et al. 2016)."""
        if not self.training or self.config.drop_path == 0:
            return None
        if seeds is None:
            raise ValueError("drop path is on: pass the batch's seeds")
        depth = len(self.blocks)
        rates = torch.linspace(0, self.config.drop_path, depth, dtype=torch.float64, device=seeds.device).view(1, -1, 1)
        draws = uniform(seeds, "drop_path", 2 * depth).view(-1, depth, 2)
        return (draws >= rates) / (1 - rates)

    def _initialize(self) -> None:
        """As the official MAE: Xavier for matrices, N(0, 0.02) for tokens."""
        initialize(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.width, -1))
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        if self.pos_embed is not None:
            if self.config.position == "learned":
                nn.init.normal_(self.pos_embed, std=0.02)
            else:
                with torch.no_grad():
                    self.pos_embed.zero_()
                    self.pos_embed[0, -self.config.num_patches :] = self.fixed.table


def initialize(module: nn.Module) -> None:
    """MAE's initialisation of linear layers and norms: Xavier uniform, zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
