"""Decoders: from the tokens of visible patches to the pixels of masked ones.

Legend: B samples, N patches, K visible, M masked, R prefix tokens, W decoder width, D encoder width, P pixel values of
a patch, S = R + K tokens of the trunk.

Parameters are named as in the official MAE and CrossMAE.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.models.trunk.attention import attend
from pipeline.models.trunk.block import Block, Mlp, initialize
from pipeline.models.trunk.config import Gelu, ModelConfig, Position
from pipeline.models.trunk.masking import Masking, take
from pipeline.models.trunk.position import FixedPositions
from pipeline.models.trunk.vit import Tokens


class DecoderConfig(Config):
    """Kind and shape of the decoder; the defaults are MAE's."""

    attention: Literal["self", "cross"] = "self"  # cross: CrossMAE's
    feature_maps: bool = False  # cross only: each block reads a learned mixture of all the trunk's blocks, not the last
    width: int = Field(default=512, gt=0)
    depth: int = Field(default=8, gt=0)
    heads: int = Field(default=16, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> DecoderConfig:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads}) and of 4")
        if self.feature_maps and self.attention != "cross":
            raise ValueError("feature_maps needs attention: cross")
        return self


def decoder(config: DecoderConfig, model: ModelConfig) -> MaeDecoder | CrossDecoder:
    """The configured kind of decoder; its forward takes (tokens, masking)."""
    return CrossDecoder(config, model) if config.attention == "cross" else MaeDecoder(config, model)


class MaeDecoder(nn.Module):
    """Self-attention over visible tokens and mask tokens (He et al. 2022, section 3)."""

    def __init__(self, config: DecoderConfig, model: ModelConfig) -> None:
        super().__init__()
        width, eps = config.width, model.norm_eps
        self.fixed = _positions(config, model)
        self.decoder_embed = nn.Linear(model.shape.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_blocks = nn.ModuleList(
            Block(width, config.heads, 4 * width, eps, model.gelu) for _ in range(config.depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=eps)
        self.decoder_pred = nn.Linear(width, model.patch_size**2 * 3)
        initialize(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tokens, masking: Masking) -> Float[Tensor, "b m P"]:
        """Predict the masked patches, in the order of `masking.masked`; tokens come in the order of `masking.keep`."""
        visible = self.decoder_embed(tokens.patches)
        b, num_visible, width = visible.shape
        num_patches = num_visible + masking.masked.shape[1]
        index = masking.keep.unsqueeze(-1).expand(-1, -1, width)
        patches = self.mask_token.to(visible.dtype).expand(b, num_patches, -1).scatter(1, index, visible)
        x = torch.cat([self.decoder_embed(tokens.prefix), patches + self.fixed(tokens.grid, visible)], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        masked = take(x[:, tokens.prefix.shape[1] :], masking.masked)  # only their predictions are used
        out: Tensor = self.decoder_pred(self.decoder_norm(masked))
        return out


class CrossDecoder(nn.Module):
    """Mask tokens attend to the trunk's tokens and not to each other (CrossMAE, Fu et al. 2024, arXiv 2401.14391).

    So any subset of the masked patches can be predicted by itself, with the same result for each patch.
    """

    def __init__(self, config: DecoderConfig, model: ModelConfig) -> None:
        super().__init__()
        width, eps, source = config.width, model.norm_eps, model.shape.width
        self.fixed = _positions(config, model)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.dec_norms: nn.ModuleList | None = None
        self.wfm: FeatureMixer | None = None
        if config.feature_maps:
            self.dec_norms = nn.ModuleList(nn.LayerNorm(source, eps=eps) for _ in range(config.depth))
            self.wfm = FeatureMixer(model.shape.depth + 1, config.depth)
        self.decoder_blocks = nn.ModuleList(CrossBlock(source, config, eps, model.gelu) for _ in range(config.depth))
        self.decoder_norm = nn.LayerNorm(width, eps=eps)
        self.decoder_pred = nn.Linear(width, model.patch_size**2 * 3)
        initialize(self)
        nn.init.normal_(self.mask_token, std=0.02)
        if self.wfm is not None:
            self.wfm.reset()

    def forward(self, tokens: Tokens, masking: Masking) -> Float[Tensor, "b m P"]:
        """Predict the patches at `masking.masked`, in its order. With feature maps, `tokens.taps` must hold the first
        block's input and all blocks' outputs.
        """
        positions = self.fixed(tokens.grid, tokens.patches).expand(len(tokens.patches), -1, -1)
        x = self.mask_token + take(positions, masking.masked)
        if self.wfm is None or self.dec_norms is None:
            last = torch.cat([tokens.prefix, tokens.patches], dim=1)
            for block in self.decoder_blocks:
                x = block(x, last)
        else:
            mixed = self.wfm(tokens.taps)
            for i, (block, norm) in enumerate(zip(self.decoder_blocks, self.dec_norms, strict=True)):
                x = block(x, norm(mixed[..., i]))
        out: Tensor = self.decoder_pred(self.decoder_norm(x))
        return out


class FeatureMixer(nn.Module):
    """A learned mixture of the trunk's feature maps for each decoder block (CrossMAE, section 3.3)."""

    def __init__(self, num_maps: int, depth: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_maps, depth, bias=False)

    def reset(self) -> None:
        """Initialise the weights."""
        nn.init.normal_(self.linear.weight, std=self.linear.in_features**-0.5)

    def forward(self, maps: tuple[Float[Tensor, "b t d"], ...]) -> Float[Tensor, "b t d depth"]:
        """The mixtures for all decoder blocks."""
        out: Tensor = self.linear(torch.stack(maps, dim=-1))
        return out


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP; parameters are named as in the official CrossMAE."""

    def __init__(self, source: int, config: DecoderConfig, eps: float, gelu: Gelu) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=eps)
        self.cross_attn = CrossAttention(source, config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=eps)
        self.mlp = Mlp(config.width, 4 * config.width, gelu)

    def forward(self, x: Float[Tensor, "b m w"], source: Float[Tensor, "b s d"]) -> Float[Tensor, "b m w"]:
        """Attend from each token of x to the source, then apply the MLP."""
        x = x + self.cross_attn(self.norm1(x), source)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class CrossAttention(nn.Module):
    """Attention of decoder tokens to encoder tokens of another width."""

    def __init__(self, source: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(source, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b m w"], source: Float[Tensor, "b s d"]) -> Float[Tensor, "b m w"]:
        """Attend from each token of x to all of the source."""
        b, m, width = x.shape
        shape = (self.heads, width // self.heads)
        q = self.q(x).view(b, m, *shape).transpose(1, 2)
        k, v = self.kv(source).view(b, -1, 2, *shape).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(attend(q, k, v).transpose(1, 2).reshape(b, m, width))
        return out


def _positions(config: DecoderConfig, model: ModelConfig) -> FixedPositions:
    """The decoder's position table; it follows the trunk's convention where that is sincos."""
    kind: Position = model.position if model.position.startswith("sincos") else "sincos2d"
    return FixedPositions(model.grid, config.width, kind, model.interpolation)
