"""The vision transformer that every stage shares.

Legend: B samples, N patches of the image, K kept patches, R prefix tokens (cls, then registers), T = R + (N or K)
tokens, D width, p patch size.

Parameters are named as in timm and the official MAE (`patch_embed.proj`, `cls_token`, `pos_embed`,
`blocks.i.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}`, `norm`), so that their state dicts map one to one. A
fixed sincos table is a constant of the configuration and not part of the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.noise import uniform
from pipeline.models.trunk.block import Block, initialize
from pipeline.models.trunk.config import ModelConfig
from pipeline.models.trunk.masking import take
from pipeline.models.trunk.patch_embed import PatchEmbed, patch_embedding
from pipeline.models.trunk.position import FixedPositions, interpolate
from pipeline.models.trunk.windows import ConvBottleneck, SharedPositions, SpatialBlock


class Tokens(NamedTuple):
    """Output of the trunk. A NamedTuple, since ZeRO-3's hooks can't see into other classes."""

    patches: Float[Tensor, "b k d"]  # in image order, or in keep's order
    prefix: Float[Tensor, "b r d"]  # cls, registers
    grid: tuple[int, int]  # rows and columns of the whole image
    taps: tuple[
        Float[Tensor, "b t d"], ...
    ] = ()  # all tokens after each of `ViT.forward`'s taps, before the final norm


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) that can encode a subset of the patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, depth, mlp_width, heads = config.shape
        self.width = width
        self.num_prefix = int(config.cls_token) + config.registers
        self.num_layers = depth + 1  # of layer_of: 0 ... num_layers
        self.patch_embed = patch_embedding(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.cls_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.registers, width)) if config.registers else None
        trained = config.position == "learned" or config.position_trained
        rows, columns = config.position_grid
        num_rows = int(config.cls_token) + rows * columns
        self.pos_embed = nn.Parameter(torch.empty(1, num_rows, width)) if trained else None
        self.fixed: FixedPositions | None = None
        if config.position.startswith("sincos"):
            self.fixed = FixedPositions(config.position_grid, width, config.position, config.interpolation)
        self.norm_pre = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else None
        self.blocks = nn.ModuleList(
            SpatialBlock(config, i)
            if config.spatial
            else Block(width, heads, mlp_width, config.norm_eps, config.gelu, config.layer_scale)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps) if config.final_norm else None
        self.rel_pos_windows = self.rel_pos_global = None
        if config.relative_positions == "shared":
            windows = [block.window for block in self.blocks if isinstance(block, SpatialBlock)]
            if config.window is not None and config.window in windows:
                self.rel_pos_windows = SharedPositions((config.window, config.window), heads)
            if None in windows:
                self.rel_pos_global = SharedPositions(config.grid, heads)
        self._initialize()

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        *,
        keep: Int[Tensor, "b k"] | None = None,
        context: Int[Tensor, "b c"] | None = None,
        taps: Sequence[int] = (),
        seeds: Int[Tensor, " b"] | None = None,
    ) -> Tokens:
        """Encode images.

        Args:
            images: normalised pixels; any size that is a multiple of the patch size.
            keep: encode only these patches, each with the position it has in the image; the output is in keep's order.
            context: only these of the encoded patches (numbered as in the output), and the prefix, serve as keys and
                values, in every block; all tokens are queries.
            taps: numbers of blocks whose output is returned too; -1 is the first block's input.
            seeds: the samples' seeds, from which drop path is drawn; required in training when it is on.

        Raises:
            ValueError: windows, convolutions or relative positions are on, and `keep` or `context` is given.
        """
        if self.config.spatial and (keep is not None or context is not None):
            raise ValueError("a trunk with windows, conv_blocks or relative_positions encodes whole images")
        p = self.config.patch_size
        grid = (images.shape[2] // p, images.shape[3] // p)
        x = self.patch_embed(images, keep)
        prefix, positions = self._positions(grid, x)
        if positions is not None:
            x = x + (positions if keep is None else take(positions.expand(len(keep), -1, -1), keep))
        if prefix is not None:
            x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        x, tapped = self._through_blocks(x, self._branch_scales(seeds), self._sources(context), grid, taps)
        if self.norm is not None:
            x = self.norm(x)
        return Tokens(x[:, self.num_prefix :], x[:, : self.num_prefix], grid, tapped)

    def layer_of(self, parameter: str) -> int:
        """Number of the layer that a parameter (named within the trunk) belongs to, for layer-wise decay.

        0 is the embedding, i + 1 is block i, `num_layers` is the final norm and everything after the trunk; the factor
        on the learning rate is decay ** (num_layers - layer), as in MAE's fine-tuning. Convolutions between blocks have
        layer `num_layers`, as in detectron2, and so have relative positions that blocks share.
        """
        if parameter.startswith("blocks.") and ".residual." not in parameter:
            return int(parameter.split(".")[1]) + 1
        return self.num_layers if parameter.startswith(("norm.", "blocks.", "rel_pos_")) else 0

    @staticmethod
    def adds_nothing_at_first(parameter: str) -> bool:
        """Whether a parameter (named within the trunk) has no effect until it is trained: relative positions and
        convolutions between blocks. A plain trunk's weights lack them.
        """
        shared = parameter.startswith(("rel_pos_windows.", "rel_pos_global."))
        return shared or parameter.endswith((".rel_pos_h", ".rel_pos_w")) or ".residual." in parameter

    def _through_blocks(
        self, x: Tensor, scale: Tensor | None, sources: Tensor | None, grid: tuple[int, int], taps: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The last block's output, and the outputs at `taps`."""
        again = self.config.activation_checkpointing and self.training and torch.is_grad_enabled()
        tapped: dict[int, Tensor] = {-1: x}
        within, over = self._shared_biases(grid)
        for i, block in enumerate(self.blocks):
            place: tuple[Any, ...] = (sources,)
            if isinstance(block, SpatialBlock):
                place = (grid, over if block.window is None else within)
            extra = (None if scale is None else scale[:, i], *place)
            if again:  # blocks draw no random numbers
                x = checkpoint(block, x, *extra, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *extra)
            if i in taps:
                tapped[i] = x
        return x, tuple(tapped[i] for i in taps)

    def _shared_biases(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """The biases that shared relative positions add to the scores, within windows and over the whole grid."""
        windows, whole = self.rel_pos_windows, self.rel_pos_global
        return None if windows is None else windows(windows.native), None if whole is None else whole(grid)

    def _sources(self, context: Tensor | None) -> Tensor | None:
        """Numbers of the tokens that may be attended to: the prefix and the patches of `context`."""
        if context is None or self.num_prefix == 0:
            return context
        prefix = torch.arange(self.num_prefix, device=context.device).expand(len(context), -1)
        return torch.cat([prefix, context + self.num_prefix], dim=1)

    def _positions(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Prefix tokens [1,R,D] with their position added, and positions of the patches [1,N,D]."""
        cls: Tensor | None = self.cls_token
        table: Tensor | None = None
        if self.pos_embed is not None:
            first = int(self.config.cls_token)
            native, how = self.config.position_grid, self.config.interpolation
            table = interpolate(self.pos_embed[0, first:], native, grid, how).unsqueeze(0)
            cls = None if cls is None else cls + self.pos_embed[:, :1]
        elif self.fixed is not None:
            table = self.fixed(grid, like).unsqueeze(0)
        parts: list[Tensor] = [part for part in (cls, self.reg_token) if part is not None]
        return (torch.cat(parts, dim=1) if parts else None), table

    def _branch_scales(self, seeds: Tensor | None) -> Tensor | None:
        """Drop path's factors [B, depth, 2], drawn from the seeds (Huang et al. 2016); None outside of training."""
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
        if isinstance(self.patch_embed, PatchEmbed):
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.width, -1))
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        for part in self.modules():
            if isinstance(part, ConvBottleneck):
                part.start_as_identity()
        if self.pos_embed is None:
            return
        nn.init.normal_(self.pos_embed, std=0.02)
        if self.fixed is not None:
            with torch.no_grad():
                self.pos_embed.zero_()
                self.pos_embed[0, int(self.config.cls_token) :] = self.fixed.table
