"""An encoded image through a view, to uint8 pixels; and pixels to a model's input on the device.

Legend: H W pixels of the stored image, h w of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from pipeline.data.images import Header, decode, scale_for_crop, scaled_size
from pipeline.data.views import Box, View

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Colour = tuple[int, int, int]
IMAGENET_FILL: Colour = (124, 116, 104)  # 255 x IMAGENET_MEAN, rounded

Interpolation = Literal["bilinear", "bicubic"]
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def show(
    data: bytes, header: Header, view: View, interpolation: Interpolation, fill: Colour = (0, 0, 0)
) -> UInt8[Tensor, "3 h w"]:
    """What a view shows of an encoded image, which is decoded no larger than that needs.

    Args:
        header: of the image, whose size is the view's source.
        interpolation: of the antialiased resize.
        fill: colour of the canvas beyond the view's size.

    Raises:
        UnreadableSample: the image is damaged.
    """
    return show_several(data, header, [view], interpolation, fill)[0]


def show_several(
    data: bytes, header: Header, views: Sequence[View], interpolation: Interpolation, fill: Colour = (0, 0, 0)
) -> list[UInt8[Tensor, "3 h w"]]:
    """What several views show of one image, which is decoded once, at the scale the most demanding of them needs."""
    whole = (header.height, header.width)
    min_size = None
    if header.format == "jpeg":
        scale = max(
            scale_for_crop((view.box.bottom - view.box.top, view.box.right - view.box.left), view.size)
            for view in views
        )
        min_size = scaled_size(whole, scale) if scale < 1 else None
    pixels = decode(data, min_size, header=header, scratch=True)
    return [_shown(pixels, view, interpolation, fill) for view in views]


def _shown(
    pixels: UInt8[np.ndarray, "H W 3"], view: View, interpolation: Interpolation, fill: Colour
) -> UInt8[Tensor, "3 h w"]:
    """A view of an image that may have been decoded at a smaller scale; a copy of its pixels."""
    box, whole, size = view.box, view.source, view.size
    if pixels.shape[:2] != whole:
        y, x = pixels.shape[0] / whole[0], pixels.shape[1] / whole[1]
        box = Box(box.left * x, box.top * y, box.right * x, box.bottom * y)
    shown = (_cut_and_resized if view.cut_first else _resized_and_cut)(pixels, box, size, interpolation)
    if view.mirror:
        shown = shown.flip(-1)
    if view.shape == size:
        return shown.contiguous()
    canvas = torch.tensor(fill, dtype=torch.uint8)[:, None, None].expand(3, *view.shape).contiguous()
    canvas[:, : size[0], : size[1]] = shown
    return canvas


def _cut_and_resized(
    pixels: UInt8[np.ndarray, "H W 3"], box: Box, size: tuple[int, int], interpolation: Interpolation
) -> UInt8[Tensor, "3 h w"]:
    """The box cut out, to whole pixels, then resized by torch, which does on uint8 what Pillow does, and faster.

    A box is drawn in whole pixels of the stored image, so it is rounded only where a smaller scale was decoded: then by
    at most half a decoded pixel, hence half a pixel of the result.
    """
    left, top = round(box.left), round(box.top)
    cut = pixels[top : max(round(box.bottom), top + 1), left : max(round(box.right), left + 1)].copy()
    image = torch.from_numpy(cut).permute(2, 0, 1)
    if cut.shape[:2] == size:
        return image
    return torch.nn.functional.interpolate(image[None], size, mode=interpolation, antialias=True)[0]


def _resized_and_cut(
    pixels: UInt8[np.ndarray, "H W 3"], box: Box, size: tuple[int, int], interpolation: Interpolation
) -> UInt8[Tensor, "3 h w"]:
    """The box, which may be fractional, as it is in the resized whole: pixels beyond it have their influence."""
    if pixels.shape[:2] == size and tuple(box) == (0, 0, size[1], size[0]):
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    box = Box(max(box.left, 0), max(box.top, 0), min(box.right, pixels.shape[1]), min(box.bottom, pixels.shape[0]))
    image = Image.fromarray(pixels)
    resized = image.resize((size[1], size[0]), _RESAMPLING[interpolation], box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def normalise(
    images: UInt8[Tensor, "b 3 h w"],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Tensor, "b 3 h w"]:
    """(images / 255 - mean) / std in float32, on the images' device."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return images.float().mul_(scale[:, None, None]).sub_(shift[:, None, None])
