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

from pipeline.data.images.decode import (
    Encoded,
    ImageHeader,
    PixelRectangle,
    decode,
    scale_for_crop,
    scaled_size,
    scratch_memory,
)
from pipeline.data.images.views import Box, View

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Colour = tuple[int, int, int]
IMAGENET_FILL: Colour = (124, 116, 104)  # 255 x IMAGENET_MEAN, rounded

Interpolation = Literal["bilinear", "bicubic"]
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def show(
    data: Encoded, header: ImageHeader, view: View, interpolation: Interpolation, fill: Colour = (0, 0, 0)
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
    data: Encoded, header: ImageHeader, views: Sequence[View], interpolation: Interpolation, fill: Colour = (0, 0, 0)
) -> list[UInt8[Tensor, "3 h w"]]:
    """What several views show of one image, which is decoded once, at the scale the most demanding of them needs."""
    whole = decoded = (header.height, header.width)
    if header.scalable:
        scale = max(
            scale_for_crop((view.box.bottom - view.box.top, view.box.right - view.box.left), view.size)
            for view in views
        )
        decoded = scaled_size(whole, scale)
    boxes = [_scaled(view.box, whole, decoded) for view in views]
    part = PixelRectangle(0, 0, *decoded)
    if all(view.cut_first for view in views):  # else pixels beyond the box have their influence
        tops, lefts, bottoms, rights = zip(*(_whole_pixels(box) for box in boxes), strict=True)
        part = PixelRectangle(min(tops), min(lefts), max(bottoms), max(rights))
    pixels = decode(data, decoded if decoded != whole else None, header=header, part=part, scratch=True)
    return [_shown(pixels, part, view, box, interpolation, fill) for view, box in zip(views, boxes, strict=True)]


def _scaled(box: Box, whole: tuple[int, int], decoded: tuple[int, int]) -> Box:
    if decoded == whole:
        return box
    y, x = decoded[0] / whole[0], decoded[1] / whole[1]
    return Box(box.left * x, box.top * y, box.right * x, box.bottom * y)


def _whole_pixels(box: Box) -> PixelRectangle:
    """A box is drawn in whole pixels of the stored image, so it is rounded only where a smaller scale was decoded: then
    by at most half a decoded pixel, hence half a pixel of the result.
    """
    top, left = round(box.top), round(box.left)
    return PixelRectangle(top, left, max(round(box.bottom), top + 1), max(round(box.right), left + 1))


def _shown(
    pixels: UInt8[np.ndarray, "H W 3"],
    part: PixelRectangle,
    view: View,
    box: Box,
    interpolation: Interpolation,
    fill: Colour,
) -> UInt8[Tensor, "3 h w"]:
    """A copy of what a view shows of the decoded `part` of an image; `box` is the view's, at the decoded scale."""
    size = view.size
    if view.cut_first:
        top, left, bottom, right = _whole_pixels(box)
        cut = pixels[top - part.top : bottom - part.top, left - part.left : right - part.left]
        shown = _resized(cut, size, interpolation)
    else:
        shown = _resized_and_cut(pixels, box, size, interpolation)
    if view.mirror:
        shown = shown.flip(-1)
    if view.shape == size:
        return shown.contiguous()
    canvas = torch.tensor(fill, dtype=torch.uint8)[:, None, None].expand(3, *view.shape).contiguous()
    canvas[:, : size[0], : size[1]] = shown
    return canvas


def _resized(
    pixels: UInt8[np.ndarray, "H W 3"], size: tuple[int, int], interpolation: Interpolation
) -> UInt8[Tensor, "3 h w"]:
    """Resized by torch, which does on uint8 what Pillow does, and faster; a copy in any case."""
    if pixels.shape[:2] == size:
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    cut = scratch_memory("cut", pixels.size)[: pixels.size].reshape(pixels.shape)
    np.copyto(cut, pixels)
    image = torch.from_numpy(cut).permute(2, 0, 1)
    return torch.nn.functional.interpolate(image[None], size, mode=interpolation, antialias=True)[0]


def _resized_and_cut(
    pixels: UInt8[np.ndarray, "H W 3"], box: Box, size: tuple[int, int], interpolation: Interpolation
) -> UInt8[Tensor, "3 h w"]:
    """The box, which may be fractional, cut from the resized whole, so that pixels outside of it contribute too."""
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
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)[:, None, None]
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device)[:, None, None]
    if images.device.type != "cpu":
        return images.float().mul_(scale).sub_(shift)
    normalised = torch.empty(images.shape)
    for image, out in zip(images, normalised, strict=True):  # one by one, they stay in the core's cache
        out.copy_(image).mul_(scale).sub_(shift)
    return normalised
