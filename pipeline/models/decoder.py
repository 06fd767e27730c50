"""MAE's decoder: from the kept patches' tokens to the pixels of the masked ones.

Legend: B samples, N patches, K kept, M masked, R prefix tokens, W decoder width, D encoder width, P pixel values of a
patch. Parameters are named as in the official MAE.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.models.block import Block, initialize
from pipeline.models.config import ModelConfig, Position
from pipeline.models.masking import Masking, take
from pipeline.models.position import FixedPositions
from pipeline.models.vit import Tokens


class DecoderConfig(Config):
    """Shape of the decoder; MAE's own by default."""

    width: int = Field(default=512, gt=0)
    depth: int = Field(default=8, gt=0)
    heads: int = Field(default=16, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> DecoderConfig:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads}) and of 4")
        return self


class MaeDecoder(nn.Module):
    """Self-attention over kept tokens and mask tokens (He et al. 2022, section 3)."""

    def __init__(self, config: DecoderConfig, model: ModelConfig) -> None:
        super().__init__()
        width, eps = config.width, model.norm_eps
        kind: Position = model.position if model.position.startswith("sincos") else "sincos2d"
        self.fixed = FixedPositions(model.grid, width, kind, model.interpolation)
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
        """Predict the masked patches, in the order of `masking.masked`; the tokens are in `masking.keep`'s."""
        kept = self.decoder_embed(tokens.patches)
        b, num_kept, width = kept.shape
        num_patches = num_kept + masking.masked.shape[1]
        index = masking.keep.unsqueeze(-1).expand(-1, -1, width)
        patches = self.mask_token.to(kept.dtype).expand(b, num_patches, -1).scatter(1, index, kept)
        x = torch.cat([self.decoder_embed(tokens.prefix), patches + self.fixed(tokens.grid, kept)], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        masked = take(x[:, tokens.prefix.shape[1] :], masking.masked)  # only their prediction is ever used
        out: Tensor = self.decoder_pred(self.decoder_norm(masked))
        return out
