"""Blocks over a grid of tokens: windows, relative positions and convolutions (ViTDet, Li et al. 2022).

Legend: B samples, R x C grid of patches (T = R * C tokens, row by row), W side of a window, H heads, E width of a head,
D = H * E width. Everything here is channels-last: [B,R,C,D].

Follows detectron2's `modeling/backbone/vit.py`; parameters are named as there: `attn.rel_pos_h`, `attn.rel_pos_w`,
`residual.{conv1,norm1,conv2,norm2,conv3,norm3}`. Relative positions that blocks share are BEiT's (Bao et al. 2021).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.trunk.attention import Attention, attend
from pipeline.models.trunk.block import Block
from pipeline.models.trunk.config import ModelConfig


def partition(x: Float[Tensor, "b r c d"], window: int) -> Float[Tensor, "bn window window d"]:
    """Cut into windows, row by row, after padding the grid with zeros below and at the right to whole windows.

    Padded places take part in attention like any other: the official weights were trained that way.
    """
    b, rows, columns, d = x.shape
    x = F.pad(x, (0, 0, 0, -columns % window, 0, -rows % window))
    x = x.view(b, x.shape[1] // window, window, x.shape[2] // window, window, d)
    return x.transpose(2, 3).reshape(-1, window, window, d)


def join(windows: Float[Tensor, "bn window window d"], grid: tuple[int, int]) -> Float[Tensor, "b r c d"]:
    """The inverse of `partition`: the grid again, without its padding."""
    window, d = windows.shape[1], windows.shape[-1]
    rows, columns = grid
    down, across = -(-rows // window), -(-columns // window)
    x = windows.view(-1, down, across, window, window, d).transpose(2, 3)
    return x.reshape(-1, down * window, across * window, d)[:, :rows, :columns]


def relative_table(table: Float[Tensor, "n e"], side: int) -> Float[Tensor, "side side e"]:
    """Entry (i, j) is the embedding of a query at i and a key at j; a table of another length is interpolated."""
    length = 2 * side - 1
    if len(table) != length:
        table = F.interpolate(table.T.unsqueeze(0).float(), size=length, mode="linear")[0].T.to(table.dtype)
    place = torch.arange(side, device=table.device)
    return table[place.unsqueeze(1) - place.unsqueeze(0) + side - 1]


def fold_relative(
    q: Float[Tensor, "b h t e"],
    k: Float[Tensor, "b h t e"],
    rows: Float[Tensor, "n e"],
    columns: Float[Tensor, "m e"],
    grid: tuple[int, int],
) -> tuple[Float[Tensor, "b h t f"], Float[Tensor, "b h t f"]]:
    """Queries and keys, F = E + R + C wide, whose plain product is the scores with decomposed relative positions.

    The score of a query at (r, c) and a key at (i, j) is q.k E^-0.5 + q.down[r, i] + q.across[c, j], with q before
    scaling. To each query we append its R + C products with the tables, and to each key a one-hot encoding of its row
    and column. So no T x T bias is needed, and any fused attention kernel applies.
    """
    b, h, t, e = q.shape
    placed = q.view(b, h, *grid, e)
    down = torch.einsum("bhrce,rke->bhrck", placed, relative_table(rows, grid[0]))
    across = torch.einsum("bhrce,cke->bhrck", placed, relative_table(columns, grid[1]))
    queries = torch.cat([placed * e**-0.5, down, across], dim=-1).view(b, h, t, -1)
    place = torch.arange(t, device=q.device)
    row = F.one_hot(place // grid[1], grid[0])
    column = F.one_hot(place % grid[1], grid[1])
    where = torch.cat([row, column], dim=-1).to(k.dtype).expand(b, h, -1, -1)
    return queries, torch.cat([k, where], dim=-1)


class SharedPositions(nn.Module):
    """A bias on each head's scores for every pair of places, by their relative position; shared by several blocks.

    BEiT's relative position bias without a cls token (Bao et al. 2021, arXiv 2106.08254). It doesn't depend on the
    query, so it can't be folded into it: it is a [H,T,T] tensor, computed once for all images and blocks.
    """

    def __init__(self, native: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.native = native
        self.table = nn.Parameter(torch.zeros((2 * native[0] - 1) * (2 * native[1] - 1), heads))

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "h t t"]:
        """The bias for a grid; for a grid other than the native one the table is interpolated bilinearly."""
        rows, columns = grid
        table = self.table.T.reshape(-1, 2 * self.native[0] - 1, 2 * self.native[1] - 1)
        if grid != self.native:
            size = (2 * rows - 1, 2 * columns - 1)
            table = F.interpolate(table.unsqueeze(0).float(), size=size, mode="bilinear")[0].to(table.dtype)
        down, across = (self._apart(side, table.device) for side in grid)
        bias: Tensor = table[:, down[:, None, :, None], across[None, :, None, :]]
        return bias.reshape(-1, rows * columns, rows * columns)

    @staticmethod
    def _apart(side: int, device: torch.device) -> Tensor:
        place = torch.arange(side, device=device)
        return place.unsqueeze(1) - place.unsqueeze(0) + side - 1


class SpatialAttention(Attention):
    """Self-attention within a grid, with decomposed relative positions (of a native grid) or none."""

    def __init__(self, width: int, heads: int, native: tuple[int, int] | None) -> None:
        super().__init__(width, heads)
        self.rel_pos_h = self.rel_pos_w = None
        if native is not None:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * native[0] - 1, width // heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * native[1] - 1, width // heads))

    def forward(  # type: ignore[override]  # it has places
        self, x: Float[Tensor, "b r c d"], bias: Float[Tensor, "h t t"] | None = None
    ) -> Float[Tensor, "b r c d"]:
        """Attend from every place to every place of its grid; `bias` is added to the scores."""
        b, rows, columns, d = x.shape
        t = rows * columns
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.rel_pos_h is None or self.rel_pos_w is None:
            out = attend(q, k, v, bias)
        else:
            q, k = fold_relative(q, k, self.rel_pos_h, self.rel_pos_w, (rows, columns))
            out = attend(q, k, v, scale=1.0)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(b, rows, columns, d))
        return projected

    def weights(
        self, x: Float[Tensor, "b r c d"], bias: Float[Tensor, "h t t"] | None = None
    ) -> Float[Tensor, "b h t t"]:
        """As `Attention.weights`, for the grid's places row by row."""
        b, rows, columns, d = x.shape
        t = rows * columns
        q, k, _ = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.rel_pos_h is None or self.rel_pos_w is None:
            q = q * q.shape[-1] ** -0.5
        else:
            q, k = fold_relative(q, k, self.rel_pos_h, self.rel_pos_w, (rows, columns))
        scores = q @ k.transpose(-2, -1)
        weights: Tensor = (scores if bias is None else scores + bias).softmax(-1)
        return weights


class ConvBottleneck(nn.Module):
    """Residual 1x1, 3x3, 1x1 convolutions that carry information between windows; initially the identity."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        hidden = width // 2
        self.conv1 = nn.Conv2d(width, hidden, 1, bias=False)
        self.norm1 = nn.LayerNorm(hidden, eps=eps)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(hidden, eps=eps)
        self.conv3 = nn.Conv2d(hidden, width, 1, bias=False)
        self.norm3 = nn.LayerNorm(width, eps=eps)
        self.start_as_identity()

    def start_as_identity(self) -> None:
        """Initialise: He's normal distribution for convolutions, 0 for the last norm."""
        for conv in (self.conv1, self.conv2, self.conv3):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Float[Tensor, "b r c d"]) -> Float[Tensor, "b r c d"]:
        """Add the convolutions' output to x."""
        y = x.permute(0, 3, 1, 2)
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            y = F.gelu(norm(conv(y).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        out: Tensor = x + self.norm3(self.conv3(y).permute(0, 2, 3, 1))
        return out


class SpatialBlock(Block):
    """A block over a grid of patches without prefix tokens, within windows or global."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        width, _, mlp_width, heads = config.shape
        super().__init__(width, heads, mlp_width, config.norm_eps, config.gelu, config.layer_scale)
        self.window = None if number in config.global_blocks else config.window
        native = config.grid if self.window is None else (self.window, self.window)
        self.attn = SpatialAttention(width, heads, native if config.relative_positions is True else None)
        self.residual = ConvBottleneck(width) if number in config.conv_blocks else None

    def forward(  # type: ignore[override]  # it needs the grid
        self,
        x: Float[Tensor, "b t d"],
        branch_scale: Float[Tensor, "b 2"] | None,
        grid: tuple[int, int],
        bias: Float[Tensor, "h n n"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """As `Block.forward`, for the patches of `grid`; `bias` is what shared relative positions add to the scores."""
        placed = self.norm1(x).view(x.shape[0], *grid, -1)
        if self.window is None:
            attended = self.attn(placed, bias)
        else:
            attended = join(self.attn(partition(placed, self.window), bias), grid)
        x = x + self._branch(attended.reshape(x.shape), branch_scale, 0)
        x = x + self._branch(self.mlp(self.norm2(x)), branch_scale, 1)
        if self.residual is None:
            return x
        out: Tensor = self.residual(x.view(x.shape[0], *grid, -1)).reshape(x.shape)
        return out
