"""Position tables of the patches.

Legend: N = rows * columns patches, row by row; D width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.trunk.config import Interpolation, Position


def sincos2d(grid: tuple[int, int], width: int, convention: Position = "sincos2d") -> Float[Tensor, "n d"]:
    """Fixed sine and cosine table: [sin x, cos x, sin y, cos y], a quarter of the width each.

    `sincos2d` spaces the frequencies as MAE and MoCo v3 do (exponent i / (D/4)), `sincos2d_bigvision` as big_vision
    does (i / (D/4 - 1)). Both put the column (x) first. Computed in float64, returned in fp32.
    """
    quarter = width // 4
    exponent = torch.arange(quarter, dtype=torch.float64)
    exponent = exponent / quarter if convention == "sincos2d" else exponent / max(quarter - 1, 1)
    frequency = 1.0 / 10000**exponent
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    y = torch.outer(rows.repeat_interleave(grid[1]), frequency)
    x = torch.outer(columns.repeat(grid[0]), frequency)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


def sincos1d(num: int, width: int) -> Float[Tensor, "n d"]:
    """Fixed table of a patch's number in reading order: [sin, cos], half of the width each, exponent i / (D/2).

    MAE's `get_1d_sincos_pos_embed_from_grid`. Computed in float64, returned in fp32.
    """
    half = width // 2
    frequency = 1.0 / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(num, dtype=torch.float64), frequency)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def interpolate(
    table: Float[Tensor, "n d"], native: tuple[int, int], grid: tuple[int, int], how: Interpolation
) -> Float[Tensor, "m d"]:
    """The table of a `native` grid, interpolated to another one.

    `bicubic` is MAE's and DINO's way (no antialiasing), `bicubic_antialias` timm's and open_clip's.
    """
    if native == grid:
        return table
    image = table.float().T.reshape(1, -1, *native)
    mode = "bilinear" if how == "bilinear" else "bicubic"
    resized = F.interpolate(image, size=grid, mode=mode, align_corners=False, antialias=how == "bicubic_antialias")
    return resized.flatten(2)[0].T.to(table.dtype)


class FixedPositions:
    """A sincos table of one grid, interpolated to any other: a constant, so not part of a module's state.

    Kept in fp32 whatever the parameters' precision; casts and interpolations are cached.
    """

    def __init__(self, native: tuple[int, int], width: int, convention: Position, how: Interpolation) -> None:
        self.native = native
        self.how = how
        by_number = convention == "sincos1d"
        self.table = sincos1d(native[0] * native[1], width) if by_number else sincos2d(native, width, convention)
        self._cast: dict[tuple[tuple[int, int], torch.device, torch.dtype], Tensor] = {}

    def __call__(self, grid: tuple[int, int], like: Tensor) -> Float[Tensor, "m d"]:
        """Positions of a grid's patches, with the dtype and on the device of `like`."""
        key = (grid, like.device, like.dtype)
        if key in self._cast:
            return self._cast[key]
        table = interpolate(self.table, self.native, grid, self.how).to(like.device, like.dtype)
        if type(table) is Tensor:  # not while a graph is traced: the model must not keep the tracer's stand-in
            self._cast[key] = table
        return table
