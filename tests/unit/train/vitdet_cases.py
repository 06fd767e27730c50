"""A tiny detector in training, for `test_engine_vitdet.py`."""

from __future__ import annotations

import torch

from pipeline.config import validate
from pipeline.data.batch import Batch, Instances
from pipeline.models.rcnn_masks import encode_masks
from pipeline.stages.base import DataFacts
from pipeline.stages.vitdet import VitDetOptions, VitDetStage
from pipeline.train.config import OptimConfig
from pipeline.train.engine_deepspeed import DeepSpeedEngine

OPTIONS = {
    "model": {
        "width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8, "cls_token": False,
        "final_norm": False, "window": 3, "global_blocks": [1], "conv_blocks": [0], "relative_positions": True,
    },
    "detector": {
        "pyramid_channels": 8, "rpn_samples": 32, "train_proposals": [32, 16], "box_samples": 8, "box_convs": 1,
        "box_width": 16, "mask_convs": 1, "cascade": True,
    },
}  # fmt: skip
OPTIM = OptimConfig(lr=1e-3)


def batch_of(step: int, *, empty: bool) -> Batch:
    """Two images with an object each, or with none."""
    images = torch.randint(0, 255, (2, 3, 32, 32), generator=torch.Generator().manual_seed(step)).to(torch.uint8)
    pixels = torch.zeros(1, 32, 32, dtype=torch.bool)
    pixels[0, 4:24, 4:24] = True
    boxes = torch.tensor([[4.0, 4, 24, 24]])
    one = Instances(boxes, torch.tensor([step % 2]), tuple(encode_masks(pixels)), torch.zeros(1).long())
    none = Instances(torch.zeros(0, 4), torch.zeros(0).long(), (), torch.zeros(0).long())
    seeds = torch.tensor([step, step + 100])
    return Batch(
        torch.arange(2), seeds, torch.ones(2), 2 * step, images=images, instances=(none if empty else one,) * 2
    )


def losses_at_every_zero_stage() -> dict[int, list[float]]:
    """Of four steps, the second without any object."""
    losses = {}
    for zero_stage in (0, 1, 2, 3):
        torch.manual_seed(0)
        stage = VitDetStage(validate(VitDetOptions, OPTIONS, where="test"), DataFacts(("a", "b")))
        engine = DeepSpeedEngine(stage, OPTIM, zero_stage=zero_stage, precision="fp32", peak_lr=1e-3)
        losses[zero_stage] = [engine.step([batch_of(i, empty=i == 1)], 1e-3).loss for i in range(4)]
        engine.close()
    return losses
