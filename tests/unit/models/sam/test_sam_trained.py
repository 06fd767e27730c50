"""A model trained here, exported, and asked for everything by the original's generator and by ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator

from pipeline import convert
from pipeline.config import validate
from pipeline.data.batch import Batch, Instances
from pipeline.data.images.views import fitted
from pipeline.models.sam.automatic import AutomaticSettings, automatic_masks
from pipeline.stages.base import DataFacts
from pipeline.stages.sam import SamOptions, SamStage
from tests.support.sam_models import load_into_official

SIDE, CELL, PATCH = 60, 12, 4  # 25 tiles an image
STEPS, IMAGES = 500, 2


def tiles(seed: int) -> tuple[np.ndarray, list[dict[str, object]], torch.Tensor]:
    """A picture of 25 tiles of different colours with dark seams, their masks and boxes."""
    draw = np.random.default_rng(seed)
    image = draw.integers(0, 30, (SIDE, SIDE, 3))
    masks, boxes = np.zeros((SIDE, SIDE, 25), np.uint8, order="F"), []
    for number in range(25):
        row, column = divmod(number, 5)
        top, left = row * CELL + int(draw.integers(0, 3)), column * CELL + int(draw.integers(0, 3))
        height, width = draw.integers(7, 10, 2)
        image[top : top + height, left : left + width] = draw.integers(90, 256, 3)
        masks[top : top + height, left : left + width, number] = 1
        boxes.append((left, top, left + width, top + height))
    return image.astype(np.uint8), list(coco_mask.encode(masks)), torch.tensor(boxes, dtype=torch.float32)


def batch(step: int) -> Batch:
    made = [tiles(step * IMAGES + i) for i in range(IMAGES)]
    none = torch.zeros(25, dtype=torch.int64)
    view = fitted(SIDE, SIDE, (SIDE, SIDE))
    ids = torch.arange(IMAGES) + step * IMAGES
    return Batch(
        ids=ids,
        seeds=ids * 31 + 7,
        weight=torch.ones(IMAGES),
        position=0,
        images=torch.stack([torch.from_numpy(image.transpose(2, 0, 1).copy()) for image, _, _ in made]),
        instances=tuple(Instances(boxes, none, tuple(masks), none, view) for _, masks, boxes in made),
    )


def trained() -> SamStage:
    torch.manual_seed(0)
    options = {
        "model": {
            "width": 64, "depth": 2, "heads": 2, "image_size": SIDE, "patch_size": PATCH, "cls_token": False,
            "final_norm": False,
        },
        "sam": {"channels": 32, "heads": 2, "mlp_width": 64, "iou_width": 32, "mask_channels": 8},
        "clicks": 1, "repeats": 0, "point_share": 1.0,
        "focal_weight": 2.0,  # tiles are 2% of an image: with 20, nothing at all is a good answer for long
    }  # fmt: skip
    stage = SamStage(validate(SamOptions, options, where="test"), DataFacts()).train()
    optimizer = torch.optim.AdamW(stage.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        losses = stage.loss(batch(step))
        optimizer.zero_grad()
        (losses.total / IMAGES).backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return stage.eval()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_of_at_least_twenty_masks_an_image_99_of_100_are_the_originals(tmp_path: Path) -> None:
    stage = trained()
    convert.save(stage, str(tmp_path / "sam.pth"), "segment_anything")
    official = load_into_official(str(tmp_path / "sam.pth"), stage)
    settings = AutomaticSettings(points_per_side=20, min_iou=0.7, min_stability=0.7)
    generator = SamAutomaticMaskGenerator(
        official, points_per_side=20, pred_iou_thresh=0.7, stability_score_thresh=0.7, output_mode="coco_rle"
    )
    for seed in (10**6, 10**6 + 1):
        image, truth, _ = tiles(seed)
        ours = automatic_masks(stage.predictor(), image, settings)
        theirs = generator.generate(image)
        assert len(ours) >= 20
        assert len(ours) == len(theirs)
        wanted = [entry["segmentation"] for entry in theirs]
        iou = coco_mask.iou([entry.segmentation for entry in ours], wanted, [0] * len(ours))
        assert (iou.max(1) >= 0.99).mean() >= 0.99
        assert (iou.max(0) >= 0.99).mean() >= 0.99
        best_iou = coco_mask.iou([entry.segmentation for entry in ours], truth, [0] * 25).max(0)
        assert (best_iou > 0.5).mean() > 0.7, "and they are the tiles"
