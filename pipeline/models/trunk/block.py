"""The transformer block.

Legend: B samples, T tokens, C tokens that are attended to, D width.

Parameters are named as in timm and the official MAE: `norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2`, and with
LayerScale `ls1.gamma, ls2.gamma`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.trunk.attention import Attention
from pipeline.models.trunk.config import Gelu
from pipeline.models.trunk.masking import take


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


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Scale each channel."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        eps: float,
        gelu: Gelu = "erf",
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale is not None else None
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_width, gelu)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale is not None else None

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        branch_scale: Float[Tensor, "b 2"] | None = None,
        context: Int[Tensor, "b c"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """One block.

        Args:
            x: tokens.
            branch_scale: factors of the two residual branches of each sample: 0 or 1/(1-rate) with drop path.
            context: indices of the only tokens that serve as keys and values; all tokens are queries.
        """
        normed = self.norm1(x)
        x = x + self._branch(self.attn(normed, None if context is None else take(normed, context)), branch_scale, 0)
        return x + self._branch(self.mlp(self.norm2(x)), branch_scale, 1)

    def _branch(self, branch: Tensor, branch_scale: Tensor | None, i: int) -> Tensor:
        """The branch's output, scaled, as it is added to the residual stream."""
        scale = self.ls2 if i else self.ls1
        if scale is not None:
            branch = scale(branch)
        return branch if branch_scale is None else branch * branch_scale[:, i].to(branch.dtype).view(-1, 1, 1)


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
