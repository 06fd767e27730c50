"""Prompts of Segment Anything and their encoder (Kirillov et al. 2023, appendix A).

Legend: I images, M prompts of all images, T points of a prompt (including corners of boxes), C channels, H W pixels of
the model's input, h w places of an image's embedding, y x = 4h 4w of the masks that go in and come out.

Parameters are named as in the package segment-anything: `pe_layer.positional_encoding_gaussian_matrix`,
`point_embeddings.{0..3}`, `not_a_point_embed`, `no_mask_embed`, `mask_downscaling.{0,1,3,4,6}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.detection.pyramid import ChannelNorm

ABSENT = -2  # pads the shorter prompts of a batch: no token attends to it
NOT_A_POINT = -1  # a token that accompanies points without a box
BACKGROUND, FOREGROUND, UPPER_LEFT, LOWER_RIGHT = 0, 1, 2, 3


class Prompts(NamedTuple):
    """Prompts of several images, padded to equal length. Each asks for one object of one image."""

    image: Int[Tensor, " m"]  # number of the image each prompt is about
    points: Float[Tensor, "m t 2"]  # x, y in pixels of the model's input; a pixel's centre is a whole number
    labels: Int[Tensor, "m t"]  # what each point is: see the constants above
    masks: Float[Tensor, "m 1 y x"] | None = None  # logits of an earlier prediction; None: no prompt has a mask
    has_mask: Bool[Tensor, " m"] | None = None  # with `masks`: which prompts have one; None: all

    @property
    def num(self) -> int:
        """Number of prompts."""
        return int(self.labels.shape[0])

    def rows(self, start: int, stop: int) -> Prompts:
        """The prompts from `start` up to `stop`."""
        return Prompts(*(None if part is None else part[start:stop] for part in self))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts on another device."""
        return Prompts(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]


def prompts_of(
    points: Float[Tensor, "m p 2"] | None = None,
    labels: Int[Tensor, "m p"] | None = None,
    boxes: Float[Tensor, "m 4"] | None = None,
    masks: Float[Tensor, "m 1 y x"] | None = None,
    *,
    image: int = 0,
) -> Prompts:
    """Prompts of one image, in pixels of the model's input.

    Args:
        points: x, y.
        labels: FOREGROUND or BACKGROUND; NOT_A_POINT for a token that stands for no point, ABSENT for no token at all.
        boxes: x0 y0 x1 y1.
        masks: logits, a quarter of the input's size.
        image: the image's number.

    Raises:
        ValueError: there are no prompts, points come without labels, or the numbers of prompts differ.
    """
    parts = [part for part in (points, boxes, masks) if part is not None]
    if not parts:
        raise ValueError("give points, boxes or masks")
    if (points is None) != (labels is None):
        raise ValueError("points need labels, one each, and labels need points")
    num, device = len(parts[0]), parts[0].device
    if any(len(part) != num for part in parts):
        raise ValueError(f"unequal numbers of prompts: {[len(part) for part in parts]}")
    places: list[Tensor] = []
    kinds: list[Tensor] = []
    if points is not None and labels is not None:
        if points.shape[:2] != labels.shape:
            raise ValueError(f"points {tuple(points.shape)} need labels {tuple(points.shape[:2])}")
        places.append(points.float())
        kinds.append(labels.long())
        if boxes is None:
            places.append(torch.zeros(num, 1, 2, device=device))
            kinds.append(torch.full((num, 1), NOT_A_POINT, device=device))
    if boxes is not None:
        places.append(boxes.float().reshape(num, 2, 2))
        kinds.append(torch.tensor([UPPER_LEFT, LOWER_RIGHT], device=device).expand(num, 2))
    if not places:
        places.append(torch.zeros(num, 0, 2, device=device))
        kinds.append(torch.zeros(num, 0, dtype=torch.int64, device=device))
    return Prompts(torch.full((num,), image, device=device), torch.cat(places, dim=1), torch.cat(kinds, dim=1), masks)


def join_prompts(parts: Sequence[Prompts]) -> Prompts:
    """Prompts of several images or of different kinds as one batch."""
    longest = max(part.labels.shape[1] for part in parts)
    masked = [part.masks for part in parts if part.masks is not None]
    masks = has_mask = None
    if masked:
        like = masked[0]
        masks = torch.cat([like.new_zeros(p.num, *like.shape[1:]) if p.masks is None else p.masks for p in parts])
        has_mask = torch.cat([_has_mask(part) for part in parts])
        if has_mask.all():
            has_mask = None
    return Prompts(
        torch.cat([part.image for part in parts]),
        torch.cat([F.pad(part.points, (0, 0, 0, longest - part.points.shape[1])) for part in parts]),
        torch.cat([F.pad(part.labels, (0, longest - part.labels.shape[1]), value=ABSENT) for part in parts]),
        masks,
        has_mask,
    )


def _has_mask(part: Prompts) -> Tensor:
    if part.has_mask is not None:
        return part.has_mask
    return torch.full((part.num,), part.masks is not None, device=part.image.device)


class Encoded(NamedTuple):
    """Prompts as the mask decoder takes them."""

    sparse: Float[Tensor, "m t c"]
    present: Bool[Tensor, "m t"] | None  # which tokens may be attended to; None: all
    dense: Float[Tensor, "m_or_1 c h w"]  # added to the image's embedding


class FourierPositions(nn.Module):
    """Sines and cosines of random projections of places in the unit square (Tancik et al. 2020).

    The projection is a constant of the model. It stays in fp32 or better whatever the precision of the weights, and so
    does the computation: in bf16 neighbouring places would coincide.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, channels // 2))

    def forward(self, places: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n c"]:
        """Embed x, y in [0, 1]."""
        matrix = self.positional_encoding_gaussian_matrix
        turns = 2 * math.pi * ((2 * places - 1).to(matrix.dtype) @ matrix)
        return torch.cat([turns.sin(), turns.cos()], dim=-1)

    def grid(self, size: tuple[int, int]) -> Float[Tensor, "n c"]:
        """Embed the centres of a grid's cells, row by row."""
        like = self.positional_encoding_gaussian_matrix
        y, x = ((torch.arange(side, device=like.device, dtype=like.dtype) + 0.5) / side for side in size)
        encoded: Tensor = self(torch.stack([x.repeat(size[0]), y.repeat_interleave(size[1])], dim=-1))
        return encoded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the projection, but don't round it."""
        matrix = self.positional_encoding_gaussian_matrix
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.positional_encoding_gaussian_matrix.dtype.itemsize < matrix.dtype.itemsize:
            self.positional_encoding_gaussian_matrix = matrix.to(self.positional_encoding_gaussian_matrix.device)
        return self


class PromptEncoder(nn.Module):
    """Encodes points and box corners as tokens, and masks as maps that are added to the image's embedding."""

    def __init__(self, channels: int, mask_channels: int) -> None:
        super().__init__()
        self.pe_layer = FourierPositions(channels)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, channels) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, channels)
        self.no_mask_embed = nn.Embedding(1, channels)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, 2, stride=2),
            ChannelNorm(mask_channels // 4),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, 2, stride=2),
            ChannelNorm(mask_channels),
            nn.GELU(),
            nn.Conv2d(mask_channels, channels, 1),
        )

    def forward(self, prompts: Prompts, size: tuple[int, int]) -> Encoded:
        """Encode prompts.

        All point embeddings take part in every call, unused ones with a gradient of zero.

        Args:
            size: (H, W) of the model's input.
        """
        labels = prompts.labels
        zero = torch.zeros(1, dtype=torch.int64, device=labels.device)
        kinds = torch.cat([part(zero) for part in (self.not_a_point_embed, *self.point_embeddings)])
        scale = torch.tensor([size[1], size[0]], device=labels.device, dtype=torch.float32)
        places = self.pe_layer((prompts.points + 0.5) / scale) * (labels >= 0).unsqueeze(-1)
        sparse = places.to(kinds.dtype) + kinds[(labels + 1).clamp(min=0)]
        no_mask = self.no_mask_embed(zero)[:, :, None, None]
        dense = no_mask
        if prompts.masks is not None:
            dense = self.mask_downscaling(prompts.masks.to(no_mask.dtype))
            if prompts.has_mask is not None:
                dense = torch.where(prompts.has_mask[:, None, None, None], dense, no_mask)
        present = labels > ABSENT
        return Encoded(sparse, None if torch.onnx.is_in_onnx_export() or bool(present.all()) else present, dense)
