"""From tokens to one vector per image.

Legend: B samples, T tokens, H heads, E width of a head, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.models.trunk.attention import attend
from pipeline.models.trunk.block import Mlp, initialize
from pipeline.models.trunk.config import ModelConfig
from pipeline.models.trunk.vit import Tokens

Pooling = Literal["cls", "avg", "avg_with_cls"]


def pool(tokens: Tokens, how: Pooling) -> Float[Tensor, "b d"]:
    """`cls`: the first prefix token. `avg`: mean over the patches, as in MAE's fine-tuning. `avg_with_cls`: mean over
    prefix and patches, as in FLIP's code.
    """
    if how == "cls":
        return tokens.prefix[:, 0]
    if how == "avg":
        return tokens.patches.mean(1)
    return torch.cat([tokens.prefix, tokens.patches], dim=1).mean(1)


class AttentionPool(nn.Module):
    """Multi-head attention pooling: one learned query over all tokens, then an MLP (Zhai et al. 2022, section 2.2;
    big_vision's MAPHead). Parameters are named as timm's `AttentionPoolLatent`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, _, mlp_width, self.heads = config.shape
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, mlp_width, config.gelu)
        initialize(self)
        nn.init.xavier_uniform_(self.latent.view(1, width))

    def forward(self, tokens: Tokens) -> Float[Tensor, "b d"]:
        """Pool prefix and patches."""
        x = torch.cat([tokens.prefix, tokens.patches], dim=1)
        b, _, d = x.shape
        shape = (self.heads, d // self.heads)
        q = self.q(self.latent).view(1, 1, *shape).transpose(1, 2).expand(b, -1, -1, -1)
        k, v = self.kv(x).view(b, -1, 2, *shape).permute(2, 0, 3, 1, 4).unbind(0)
        pooled = self.proj(attend(q, k, v).transpose(1, 2).reshape(b, 1, d))
        out: Tensor = (pooled + self.mlp(self.norm(pooled)))[:, 0]
        return out
