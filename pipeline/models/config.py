"""Sizes and options of the vision trunk, checked before anything is built."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from pipeline.config import Config


class Size(NamedTuple):
    """Shape of a transformer's blocks."""

    width: int
    depth: int
    mlp_width: int
    heads: int


SIZES: dict[str, Size] = {
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "So400m": Size(1152, 27, 4304, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
    "G": Size(1664, 48, 8192, 16),
}
"""Touvron et al. 2021 (Ti, S), Dosovitskiy et al. 2021 (B, L, H), Zhai et al. 2022 (g, G), Alabdulmohsin et al. 2023
(So400m)."""

Position = Literal["sincos2d", "sincos2d_bigvision", "learned"]
Interpolation = Literal["bicubic", "bicubic_antialias", "bilinear"]
Gelu = Literal["erf", "tanh", "quick"]


class ModelConfig(Config):
    """The vision trunk: a size by name, any part of it overridden, or width, depth and heads given."""

    size: str | None = None  # a name in SIZES
    width: int | None = Field(default=None, gt=0)
    depth: int | None = Field(default=None, gt=0)
    heads: int | None = Field(default=None, gt=0)
    mlp_width: int | None = Field(default=None, gt=0)  # None: the size's, or 4 x width
    image_size: int | tuple[int, int] = 224  # pixels; (height, width) when not square
    patch_size: int = Field(default=16, gt=0)  # pixels
    cls_token: bool = True
    registers: int = Field(default=0, ge=0)  # tokens without position or output (Darcet et al. 2024)
    position: Position = "sincos2d"
    position_trained: bool = False  # train a sincos table too, as MAE's fine-tuning does; "learned" always is
    interpolation: Interpolation = "bicubic"  # of the position table, for grids other than the native one
    norm_eps: float = Field(default=1e-6, gt=0)
    gelu: Gelu = "erf"
    drop_path: float = Field(default=0.0, ge=0, lt=1)  # rate of the last block, rising linearly from 0 at the first
    final_norm: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"no model size {self.size!r}; there are {', '.join(SIZES)}")
        if self.size is None and None in (self.width, self.depth, self.heads):
            raise ValueError("give a size, or all of width, depth and heads")
        shape = self.shape
        if shape.width % shape.heads:
            raise ValueError(f"heads ({shape.heads}) must divide width ({shape.width})")
        if self.position != "learned" and shape.width % 4:
            raise ValueError(f"{self.position} positions need a width divisible by 4, not {shape.width}")
        if min(self.image_hw) < 1 or any(side % self.patch_size for side in self.image_hw):
            height, width = self.image_hw
            raise ValueError(f"image_size {height}x{width} isn't a multiple of patch_size {self.patch_size}")
        return self

    @property
    def shape(self) -> Size:
        """Width, depth, mlp width and heads, with the overrides applied."""
        named = SIZES[self.size] if self.size is not None else None
        width = self.width or (named.width if named else 0)
        depth = self.depth or (named.depth if named else 0)
        heads = self.heads or (named.heads if named else 0)
        own_mlp = named.mlp_width if named and width == named.width else 4 * width
        return Size(width, depth, self.mlp_width or own_mlp, heads)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        rows, columns = self.grid
        return rows * columns

    def num_kept(self, mask_ratio: float) -> int:
        """Patches that stay when `mask_ratio` of them are masked: int(N (1 - r)), as the official MAE rounds."""
        return int(self.num_patches * (1 - mask_ratio))
