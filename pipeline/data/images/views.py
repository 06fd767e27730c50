"""Which part of an image is shown, at what size: every geometric augmentation of a recipe comes down to one `View`.

Legend: H W pixels of the stored image, h w of what is shown.

A view is drawn from sizes alone, before anything is decoded. The image (`pipeline.data.images.pixels`), its boxes and
its masks (`pipeline.data.instances`) are then put through the same view, so they can't come apart, and a JPEG is
decoded no larger than the view needs.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Box(NamedTuple):
    """A rectangle of an image in pixels; the lower right corner is outside."""

    left: float
    top: float
    right: float
    bottom: float


class View(NamedTuple):
    """`box` of a stored image, resized to `size`, mirrored or not, in the upper left corner of `canvas`."""

    source: tuple[int, int]  # (H, W) of the stored image
    box: Box  # what is shown, in pixels of the stored image; may be fractional
    size: tuple[int, int]  # (h, w) that the box becomes
    mirror: bool = False  # left and right exchanged, within `size`
    canvas: tuple[int, int] = (0, 0)  # (h, w) of the result, at least `size`; the rest is padding. (0, 0): `size`
    cut_first: bool = False  # cut out the box, then resize, as RandomResizedCrop does; else resize the whole, then cut

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of the result, padding included."""
        return max(self.canvas[0], self.size[0]), max(self.canvas[1], self.size[1])

    def shown(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Boxes (x0 y0 x1 y1) of the stored image, in pixels of the result, clipped to what is shown."""
        y, x = self._factors()
        x0, x1 = (boxes[:, 0] - self.box.left) * x, (boxes[:, 2] - self.box.left) * x
        if self.mirror:
            x0, x1 = self.size[1] - x1, self.size[1] - x0
        y0, y1 = (boxes[:, 1] - self.box.top) * y, (boxes[:, 3] - self.box.top) * y
        h, w = self.size
        return torch.stack([x0.clamp(0, w), y0.clamp(0, h), x1.clamp(0, w), y1.clamp(0, h)], dim=1)

    def stored(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """The way back: boxes of the result, predicted ones for example, in pixels of the stored image, clipped to it.

        `shown`, then `stored`, is the identity for boxes that lie wholly in view.
        """
        y, x = self._factors()
        x0, x1 = boxes[:, 0], boxes[:, 2]
        if self.mirror:
            x0, x1 = self.size[1] - x1, self.size[1] - x0
        height, width = self.source
        corners = [
            (x0 / x + self.box.left).clamp(0, width),
            (boxes[:, 1] / y + self.box.top).clamp(0, height),
            (x1 / x + self.box.left).clamp(0, width),
            (boxes[:, 3] / y + self.box.top).clamp(0, height),
        ]
        return torch.stack(corners, dim=1)

    def shown_points(self, points: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Points (x, y) of the stored image, in pixels of the result; nothing is clipped."""
        y, x = self._factors()
        across, down = (points[..., 0] - self.box.left) * x, (points[..., 1] - self.box.top) * y
        return torch.stack([self.size[1] - across if self.mirror else across, down], dim=-1)

    def _factors(self) -> tuple[float, float]:
        """Pixels of the result per pixel of the stored image, downwards and to the right."""
        box = self.box
        return self.size[0] / (box.bottom - box.top), self.size[1] / (box.right - box.left)


def random_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draw: random.Random
) -> Box:
    """A crop as torchvision's `RandomResizedCrop.get_params` draws it.

    Args:
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width over its height, log-uniform.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        area = height * width * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(*log_ratio))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = draw.randint(0, height - h)
            left = draw.randint(0, width - w)
            return Box(left, top, left + w, top + h)
    # Hardly any shape fits: the largest central crop within the ratios.
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    top, left = (height - h) // 2, (width - w) // 2
    return Box(left, top, left + w, top + h)


def centre_crop(height: int, width: int, size: tuple[int, int], resize: int | None) -> Box:
    """What remains of an image after resizing its shortest side to `resize` and cutting `size` from its centre.

    An image that would then be smaller than `size` is resized to just cover it instead, as with `resize` None.
    """
    covering = max(size[0] / height, size[1] / width)
    factor = covering if resize is None else max(covering, resize / min(height, width))
    h, w = size[0] / factor, size[1] / factor
    top, left = (height - h) / 2, (width - w) / 2
    return Box(left, top, left + w, top + h)


def large_scale_jitter(
    height: int, width: int, canvas: tuple[int, int], scale: tuple[float, float], *, flip: bool, draw: random.Random
) -> View:
    """Large-scale jitter (Ghiasi et al. 2021) as ViTDet's recipe in detectron2 draws it: mirror, resize, crop or pad.

    The image is mirrored with probability 1/2 (if `flip`), resized to the largest size of its shape within `canvas`
    times a factor drawn uniformly from `scale`, and cut to `canvas`: from one random place, the same share of the
    leeway along both axes (as detectron2's FixedSizeCrop does it), where it is larger; padded below and on the right
    where it is smaller.
    """
    mirror = flip and draw.random() < 0.5
    factor = draw.uniform(*scale)
    share = draw.random()
    by = min(canvas[0] * factor / height, canvas[1] * factor / width)
    resized = max(1, round(height * by)), max(1, round(width * by))
    size = min(resized[0], canvas[0]), min(resized[1], canvas[1])
    top, left = round((resized[0] - size[0]) * share), round((resized[1] - size[1]) * share)
    if mirror:  # the place was drawn on the mirrored image
        left = resized[1] - size[1] - left
    y, x = height / resized[0], width / resized[1]
    box = Box(left * x, top * y, (left + size[1]) * x, (top + size[0]) * y)
    return View((height, width), box, size, mirror, canvas)


def fitted(height: int, width: int, canvas: tuple[int, int]) -> View:
    """The whole image at the largest size of its shape within `canvas`, padded below and on the right.

    With a square canvas: SAM's ResizeLongestSide, and detectron2's ResizeShortestEdge where the shortest edge may be as
    long as the longest.
    """
    by = min(canvas[0] / height, canvas[1] / width)
    size = max(1, int(height * by + 0.5)), max(1, int(width * by + 0.5))
    return View((height, width), Box(0, 0, width, height), size, canvas=canvas)
