"""Multi-head attention.

Legend: B samples, T tokens, S tokens that are attended to, H heads, E width of a head, G width of a value (E but for
relative positions), D = H * E.
"""

from __future__ import annotations

from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

EXPLICIT_UP_TO = 1024
"""Longest sequence for which `attend` computes attention explicitly, in bf16 on a CPU.

There, forward and backward of two batched products and a softmax took 1.35 ms against 7.3 ms of
`scaled_dot_product_attention` at T=17 (B=32, H=3), 8.3 against 34.7 at T=50 (B=16, H=12), 42 against 71 at T=197
(B=8, H=12) and 95 against 165 at T=1025 (B=1, H=12), torch 2.15, one core, E=64. In fp32 the fused kernel is at least
as fast from T=65 on, and everywhere on a GPU. Beyond this length the T x T matrix costs too much memory.
"""


def attend(
    q: Float[Tensor, "b h t e"],
    k: Float[Tensor, "b h s e"],
    v: Float[Tensor, "b h s g"],
    mask: Float[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h t g"]:
    """Softmax attention, by the faster of two equivalent computations (see `EXPLICIT_UP_TO`).

    `mask` is added to the scores: 0 where a token may attend, -inf where it may not; it broadcasts to [B,H,T,S].
    `scale` defaults to E^-0.5. Values may be narrower than queries and keys: they are then padded with zeros, since the
    fused kernels that need no T x S matrix require equal widths.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= EXPLICIT_UP_TO:
        return attend_explicitly(q, k, v, mask, scale)
    width = v.shape[-1]
    if width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))
    out: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out if out.shape[-1] == width else out[..., :width]


def attend_explicitly(
    q: Float[Tensor, "b h t e"],
    k: Float[Tensor, "b h s e"],
    v: Float[Tensor, "b h s g"],
    mask: Float[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h t g"]:
    """Two batched matrix products and a softmax; q is scaled, since it is smaller than the scores."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q if factor == 1 else q * factor) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    out: Tensor = scores.softmax(-1) @ v
    return out


class QkvProjection(nn.Linear):
    """Queries, keys and values in one matrix, [3D,D]; keys and values may come from other tokens than queries."""

    @overload
    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t 3*d"]: ...
    @overload
    def forward(
        self, x: Float[Tensor, "b t d"], source: Float[Tensor, "b s d"]
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b s 2*d"]]: ...
    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """All three of x; or with `source`, the queries of x and the keys and values of `source`."""
        if source is None:
            return super().forward(x)
        d = self.in_features
        return F.linear(x, self.weight[:d], self.bias[:d]), F.linear(source, self.weight[d:], self.bias[d:])


class Attention(nn.Module):
    """Self-attention with a fused projection; parameters named as in timm and MAE."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = QkvProjection(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        source: Float[Tensor, "b s d"] | None = None,
        mask: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend from every token of x to every token of `source`, by default x itself; `mask` is `attend`'s."""
        b, t, d = x.shape
        shape = (self.heads, d // self.heads)
        if source is None:
            q, k, v = self.qkv(x).view(b, t, 3, *shape).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            queries, both = self.qkv(x, source)
            q = queries.view(b, t, *shape).transpose(1, 2)
            k, v = both.view(b, -1, 2, *shape).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(attend(q, k, v, mask).transpose(1, 2).reshape(b, t, d))
        return out

    def weights(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b h t t"]:
        """How much every token attends to every other; rows sum to 1. For inspection only: `forward` is faster."""
        b, t, d = x.shape
        q, k, _ = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights: Tensor = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return weights
