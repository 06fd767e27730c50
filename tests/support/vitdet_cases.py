"""A tiny detector in training, for `test_engine_vitdet.py`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pipeline import ranks
from pipeline.config import validate
from pipeline.data.batch import Batch, Instances
from pipeline.models.batch_norm import BatchNorm
from pipeline.models.detection.masks import encode_masks
from pipeline.stages.base import DataFacts, seeded_init
from pipeline.stages.vitdet import VitDetOptions, VitDetStage
from pipeline.train.config import OptimConfig
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine

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


def losses_at_every_zero_stage(relative: bool | str) -> dict[int, list[float]]:
    """Of four steps, the second without any object, with relative positions of either kind."""
    losses = {}
    document = OPTIONS | {"model": OPTIONS["model"] | {"relative_positions": relative}}
    for zero_stage in (0, 1, 2, 3):
        torch.manual_seed(0)
        stage = VitDetStage(validate(VitDetOptions, document, where="test"), DataFacts(("a", "b")))
        engine = DeepSpeedEngine(stage, OPTIM, zero_stage=zero_stage, precision="fp32", peak_lr=1e-3)
        losses[zero_stage] = [engine.step([batch_of(i, empty=i == 1)], 1e-3).loss for i in range(4)]
        engine.close()
    return losses


def batch_norm_in_shares(shares: tuple[int, int]) -> dict[str, Tensor]:
    """Output, gradients and averages of a batch norm whose rows lie on two ranks."""
    draw = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(sum(shares), 3, 2, 2, generator=draw, dtype=torch.float64) + 1 for _ in range(2))
    norm = BatchNorm(3).double()
    torch.nn.init.normal_(norm.weight, generator=draw)
    own = x.split(list(shares))[ranks.world().rank].requires_grad_()
    out = norm(own)
    (out * pull.split(list(shares))[ranks.world().rank]).sum().backward()
    assert own.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    parts = {"out": out.detach(), "x": own.grad}
    found = {name: torch.cat([part.reshape(-1, 3, 2, 2) for part in ranks.gather(t)]) for name, t in parts.items()}
    found |= {name: ranks.sum_over_ranks(p.grad) for name, p in norm.named_parameters() if p.grad is not None}
    return found | {"mean": norm.running_mean, "variance": norm.running_var}


def gradients_with_batch_norm() -> dict[str, Tensor]:
    """Of a detector with batch norm in its stem, pyramid and heads, over a batch that all ranks share."""
    seeded_init(0)
    model = OPTIONS["model"] | {"patch_embed": "conv_stem"}
    detector = OPTIONS["detector"] | {"head_norm": "batch", "cascade": False}
    options = {"model": model, "detector": detector, "pyramid": "fpn"}
    stage = VitDetStage(validate(VitDetOptions, options, where="test"), DataFacts(("a", "b")))
    batch = batch_of(0, empty=False)
    first = batch.instances[0] if batch.instances else None
    assert first is not None
    batch = dataclasses.replace(batch, instances=(first, first._replace(boxes=first.boxes + 2)))
    world = ranks.world()
    for i in range(len(batch))[world.rank :: world.size] if world.size > 1 else (None,):
        stage.loss(batch if i is None else batch.at(slice(i, i + 1))).total.backward()
    return {name: ranks.sum_over_ranks(p.grad) for name, p in stage.named_parameters() if p.grad is not None}
