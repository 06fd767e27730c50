"""A tiny ViTDet whose weights and image follow formulas, so that detectron2's record of it needs to hold neither."""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIDE = 128  # pixels
NUM_CLASSES = 3


class Shown(NamedTuple):
    """An image and its objects."""

    image: Tensor  # uint8 [3,96,120]
    boxes: Tensor  # [3,4]
    classes: Tensor  # [3]
    masks: Tensor  # bool [3,96,120]


def weights_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter of detectron2's name."""
    count = math.prod(shape)
    seed = zlib.crc32(name.encode()) % 1000
    number = np.arange(count, dtype=np.float64)
    values = np.sin((number + 1) * (1.37 + seed / 777) * 1.7) + np.cos((number + seed) ** 1.21)
    values *= 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.2
    if "rel_pos" in name or "pos_embed" in name:
        values *= 0.3 * math.sqrt(math.prod(shape[1:]))
    if len(shape) == 1 and name.endswith("weight"):  # of a norm
        values = 1 + 0.3 * values
    if "anchor_deltas" in name or "bbox_pred" in name:
        values *= 0.3
    return torch.from_numpy(values.reshape(shape)).float()


def shown() -> Shown:
    """Waves, three ellipses on them."""
    y, x = np.mgrid[0:96, 0:120]
    image = np.stack([128 + 100 * np.sin(x / 7 + y / 11 + c) * np.cos(y / (5 + c)) for c in range(3)]).astype(np.uint8)
    boxes = torch.tensor([[10.0, 12, 60, 70], [50, 20, 110, 90], [70, 60, 95, 80]])
    masks = torch.zeros(3, 96, 120, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist(), strict=True):
        across, down = (x + 0.5 - (x0 + x1) / 2) / ((x1 - x0) / 2), (y + 0.5 - (y0 + y1) / 2) / ((y1 - y0) / 2)
        mask[:] = torch.from_numpy(across**2 + down**2 <= 1)
    return Shown(torch.from_numpy(image), boxes, torch.tensor([0, 2, 1]), masks)
