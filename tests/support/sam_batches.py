"""Small images with known objects."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from pipeline.config import validate
from pipeline.data.batch import Batch, Instances
from pipeline.data.images.views import fitted
from pipeline.stages.base import DataFacts
from pipeline.stages.sam import SamOptions, SamStage

SIDE = 32
MODEL = {
    "width": 32, "depth": 2, "heads": 2, "image_size": SIDE, "patch_size": 8, "cls_token": False,
    "final_norm": False, "window": 3, "global_blocks": [1], "relative_positions": True, "position_trained": True,
}  # fmt: skip
SAM = {"channels": 16, "heads": 2, "mlp_width": 24, "iou_width": 16, "mask_channels": 8}


def tiny_stage(seed: int = 0, **options: Any) -> SamStage:
    torch.manual_seed(seed)
    return SamStage(validate(SamOptions, {"model": MODEL, "sam": SAM, **options}, where="test"), DataFacts())


def objects(*boxes: tuple[int, int, int, int], crowd: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Instances:
    """Filled rectangles, the last so many of them crowds."""
    masks = np.zeros((*size, len(boxes)), np.uint8, order="F")
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        masks[y0:y1, x0:x1, number] = 1
    return Instances(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.zeros(len(boxes), dtype=torch.int64),
        masks=tuple(coco_mask.encode(masks)) if boxes else (),
        crowd=torch.tensor([int(i >= len(boxes) - crowd) for i in range(len(boxes))], dtype=torch.int64),
        view=fitted(*size, (SIDE, SIDE)),
    )


def batch(*instances: Instances, weight: Tensor | None = None) -> Batch:
    ids = torch.arange(len(instances))
    draw = torch.Generator().manual_seed(7)
    return Batch(
        ids=ids,
        seeds=ids * 97 + 5,
        weight=torch.ones(len(instances)) if weight is None else weight,
        position=0,
        images=torch.randint(0, 256, (len(instances), 3, SIDE, SIDE), generator=draw, dtype=torch.uint8),
        instances=instances,
    )
