"""Sizes and options of the vision trunk, validated before anything is built."""

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
    "C-1GF": Size(192, 11, 576, 3),
    "C-4GF": Size(384, 11, 1152, 6),
    "C-18GF": Size(768, 11, 3072, 12),
    "C-36GF": Size(1024, 13, 4096, 16),
}
"""Touvron et al. 2021 (Ti, S), Dosovitskiy et al. 2021 (B, L, H), Zhai et al. 2022 (g, G), Alabdulmohsin et al. 2023
(So400m), Xiao et al. 2021 (C-*, which go with `patch_embed: conv_stem`)."""

STEMS: dict[str, tuple[int, ...]] = {
    "C-1GF": (24, 48, 96, 192),
    "C-4GF": (48, 96, 192, 384),
    "C-18GF": (64, 128, 128, 256, 256, 512),
    "C-36GF": (64, 128, 128, 256, 256, 512),
}
"""Output channels of the 3x3 convolutions of the convolutional stem, by size (Xiao et al. 2021, appendix)."""

PatchEmbedKind = Literal["linear", "norm_linear", "conv_stem"]
Position = Literal["sincos2d", "sincos2d_bigvision", "sincos1d", "learned", "none"]
Interpolation = Literal["bicubic", "bicubic_antialias", "bilinear"]
Gelu = Literal["erf", "tanh", "quick"]


class ModelConfig(Config):
    """The vision trunk: a named size, any part of which can be overridden, or explicit width, depth and heads."""

    size: str | None = None  # a name in SIZES
    width: int | None = Field(default=None, gt=0)
    depth: int | None = Field(default=None, gt=0)
    heads: int | None = Field(default=None, gt=0)
    mlp_width: int | None = Field(default=None, gt=0)  # None: the size's, or 4 x width
    image_size: int | tuple[int, int] = 224  # pixels; (height, width) when not square
    patch_size: int = Field(default=16, gt=0)  # pixels
    cls_token: bool = True
    registers: int = Field(default=0, ge=0)  # tokens without position or output (Darcet et al. 2024)
    patch_embed: PatchEmbedKind = "linear"
    stem_channels: tuple[int, ...] = ()  # of a conv_stem; empty: the size's, or doubling up to the width
    position: Position = "sincos2d"
    position_image_size: int | tuple[int, int] | None = None  # image size that the position table has; None: image_size
    position_trained: bool = False  # train a sincos table too, as MAE's fine-tuning does; "learned" always is
    interpolation: Interpolation = "bicubic"  # of the position table, for grids other than the native one
    norm_eps: float = Field(default=1e-6, gt=0)
    gelu: Gelu = "erf"
    pre_norm: bool = False  # CLIP's: a norm before the first block, and no bias in the patch projection
    layer_scale: float | None = Field(default=None, gt=0)  # initial factor of the residual branches; None: no factor
    drop_path: float = Field(default=0.0, ge=0, lt=1)  # rate of the last block, rising linearly from 0 at the first
    final_norm: bool = True
    window: int | None = Field(default=None, gt=0)  # side of attention windows, in patches; None: all blocks global
    global_blocks: tuple[int, ...] = ()  # numbers of the blocks without windows
    conv_blocks: tuple[int, ...] = ()  # numbers of the blocks that a convolution follows
    # For the grid of image_size or the window. True: decomposed, one set per block, as ViTDet's; shared: BEiT's, one
    # table for all blocks with windows and one for all global ones, as in the detectors of Li et al. 2021.
    relative_positions: bool | Literal["shared"] = False
    activation_checkpointing: bool = False  # store only the blocks' inputs and recompute the rest in backward

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"no model size {self.size!r}; there are {', '.join(SIZES)}")
        if self.size is None and None in (self.width, self.depth, self.heads):
            raise ValueError("give a size, or all of width, depth and heads")
        shape = self.shape
        if shape.width % shape.heads:
            raise ValueError(f"heads ({shape.heads}) must divide width ({shape.width})")
        if self.position.startswith("sincos") and shape.width % 4:
            raise ValueError(f"{self.position} positions need a width divisible by 4, not {shape.width}")
        if self.position_trained and self.position == "none":
            raise ValueError("position_trained needs positions, and position is none")
        for name, (height, width) in (("image_size", self.image_hw), ("position_image_size", self.position_hw)):
            if min(height, width) < 1 or height % self.patch_size or width % self.patch_size:
                raise ValueError(f"{name} {height}x{width} isn't a multiple of patch_size {self.patch_size}")
        return self

    @model_validator(mode="after")
    def _stem_fits(self) -> ModelConfig:
        if self.patch_embed != "conv_stem":
            if self.stem_channels:
                raise ValueError("stem_channels needs patch_embed: conv_stem")
            return self
        if self.pre_norm:
            raise ValueError("pre_norm needs a linear patch_embed")
        if not self.stem or min(self.stem) < 1:
            raise ValueError(
                f"no default stem for patch_size {self.patch_size} and width {self.shape.width}; give stem_channels"
            )
        before, stride = 3, 1
        for after in self.stem:
            stride *= 1 if after == before else 2
            before = after
        if stride != self.patch_size:
            raise ValueError(f"a stem with channels {self.stem} has stride {stride}, not patch_size {self.patch_size}")
        return self

    @model_validator(mode="after")
    def _blocks_fit(self) -> ModelConfig:
        depth = self.shape.depth
        for name, blocks in (("global_blocks", self.global_blocks), ("conv_blocks", self.conv_blocks)):
            if any(not 0 <= block < depth for block in blocks):
                raise ValueError(f"{name} {blocks} must all be among the blocks 0 to {depth - 1}")
        if self.global_blocks and self.window is None:
            raise ValueError("global_blocks needs window: without it, all blocks are global")
        if self.spatial and (self.cls_token or self.registers):
            raise ValueError("windows, conv_blocks and relative_positions need cls_token false and no registers")
        return self

    @property
    def spatial(self) -> bool:
        """Whether blocks depend on where their tokens are in the grid."""
        return self.window is not None or bool(self.conv_blocks) or bool(self.relative_positions)

    @property
    def stem(self) -> tuple[int, ...]:
        """Channels of the convolutional stem."""
        if self.stem_channels:
            return self.stem_channels
        if self.size in STEMS and self.shape.width == SIZES[self.size].width:
            return STEMS[self.size]
        halvings = self.patch_size.bit_length() - 1
        return tuple(self.shape.width >> i for i in reversed(range(halvings)))

    @property
    def position_hw(self) -> tuple[int, int]:
        """Height and width of the images that the position table was made for, in pixels."""
        return self.image_hw if self.position_image_size is None else _height_width(self.position_image_size)

    @property
    def position_grid(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        height, width = self.position_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def shape(self) -> Size:
        """Width, depth, mlp width and heads, with the overrides applied."""
        named = SIZES[self.size] if self.size is not None else None
        width = self.width or (named.width if named else 0)
        depth = self.depth or (named.depth if named else 0)
        heads = self.heads or (named.heads if named else 0)
        default_mlp = named.mlp_width if named and width == named.width else 4 * width
        return Size(width, depth, self.mlp_width or default_mlp, heads)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return _height_width(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        rows, columns = self.grid
        return rows * columns

    def num_kept(self, mask_ratio: float) -> int:
        """Number of visible patches when `mask_ratio` of them are masked: int(N (1 - r)), as in the official MAE."""
        return int(self.num_patches * (1 - mask_ratio))


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)
