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
    pixels = decode(data, min_size)
    return [_shown(pixels, view, interpolation, fill) for view in views]


def _shown(
    pixels: UInt8[np.ndarray, "H W 3"], view: View, interpolation: Interpolation, fill: Colour
) -> UInt8[Tensor, "3 h w"]:
    """A view of an image that may have been decoded at a smaller scale."""
    box, whole, size = view.box, view.source, view.size
    if pixels.shape[:2] != whole:
        y, x = pixels.shape[0] / whole[0], pixels.shape[1] / whole[1]
        box = Box(box.left * x, box.top * y, box.right * x, box.bottom * y)
    if pixels.shape[:2] == size and tuple(box) == (0, 0, size[1], size[0]):
        resized = pixels
    else:
        box = Box(max(box.left, 0), max(box.top, 0), min(box.right, pixels.shape[1]), min(box.bottom, pixels.shape[0]))
        image = Image.fromarray(pixels)
        resized = np.asarray(image.resize((size[1], size[0]), _RESAMPLING[interpolation], box=box))
    if view.mirror:
        resized = resized[:, ::-1]
    if view.shape == size:
        return torch.from_numpy(resized.transpose(2, 0, 1).copy())
    canvas = np.empty((3, *view.shape), np.uint8)
    canvas[:] = np.asarray(fill, np.uint8)[:, None, None]
    canvas[:, : size[0], : size[1]] = resized.transpose(2, 0, 1)
    return torch.from_numpy(canvas)


def normalise(
    images: UInt8[Tensor, "b 3 h w"],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Tensor, "b 3 h w"]:
    """(images / 255 - mean) / std in float32, on the images' device."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return images.float() * scale[:, None, None] - shift[:, None, None]
