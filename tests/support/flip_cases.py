"""What the tests of stage `flip` under the engine run on every rank of a process group."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipeline import ranks
from pipeline.config import validate
from pipeline.data.batch import Batch
from pipeline.stages.base import DataFacts, Losses
from pipeline.stages.flip import FlipOptions, FlipStage
from pipeline.train.config import OptimConfig
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine
from tests.support.engine_cases import whole

OPTIONS: dict[str, Any] = {
    "model": {"width": 16, "depth": 1, "heads": 2, "image_size": 32, "patch_size": 8},
    "text": {"context_length": 12, "width": 16, "heads": 2, "layers": 1, "vocab_size": 600},
    "embed_dim": 8,
    "text_mask_ratio": 0.25,
    "init_scale": 5.0,
}
NUM_PAIRS = 24  # 1, 2 and 3 ranks share them equally, and each share can be cut in 4
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.0)
COLOURS = ("red", "green", "blue", "dark", "pale")


class PushedStage(FlipStage):
    """Its loss falls as the logit scale rises."""

    def contrast(self, embedded: tuple[tuple[Tensor, ...], Tensor]) -> Losses:
        losses = super().contrast(embedded)
        return losses._replace(total=losses.total - 100 * self.logit_scale.float().sum() * embedded[1].sum())


def build(cls: type[FlipStage] = FlipStage, **options: Any) -> FlipStage:
    torch.manual_seed(7)
    return cls(validate(FlipOptions, OPTIONS | options, where="test"), DataFacts())


def pairs(stage: FlipStage, rows: slice = slice(None), position: int = 0) -> Batch:
    """Some of the global batch's pairs; two are absent."""
    ids = torch.arange(NUM_PAIRS)
    images = torch.randint(0, 256, (NUM_PAIRS, 3, 32, 32), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    text = stage.tokenizer([f"{COLOURS[i % 5]} thing {i}" for i in range(NUM_PAIRS)])
    weight = torch.ones(NUM_PAIRS)
    weight[[5, 17]] = 0
    return Batch(ids[rows], ids[rows] + 100, weight[rows], position, images=images[rows], text=text[rows])


def share(stage: FlipStage, num_micro: int) -> list[Batch]:
    """This rank's micro batches."""
    world = ranks.world()
    size = NUM_PAIRS // world.size // num_micro
    starts = [world.rank * NUM_PAIRS // world.size + k * size for k in range(num_micro)]
    return [pairs(stage, slice(start, start + size)) for start in starts]


def reference(loss: str, mask: float) -> dict[str, Tensor]:
    """Gradients of the mean loss of the full batch, by autograd alone, in one process."""
    assert ranks.world().size == 1
    stage = build(loss=loss, mask_ratio=mask)
    batch = pairs(stage)
    (stage.loss(batch).total / batch.weight.sum()).backward()
    return {name: p.grad.flatten() for name, p in stage.named_parameters() if p.grad is not None}


def gradients(loss: str, mask: float, zero_stage: int, num_micro: int) -> dict[str, Tensor]:
    """Gradients as the engine's optimizer sees them: one step's first moment over 1 - beta1."""
    stage = build(loss=loss, mask_ratio=mask)
    engine = DeepSpeedEngine(stage, OPTIM, zero_stage=zero_stage, precision="fp32", peak_lr=1e-3)
    assert engine.step(share(stage, num_micro), 1e-3).applied
    gradients_of_run = {name: state["exp_avg"] / (1 - OPTIM.betas[0]) for name, (state, _) in whole(engine).items()}
    engine.close()
    return gradients_of_run


def worst(expected: dict[str, Tensor], loss: str, num_micro: int, zero_stage: int, mask: float) -> tuple[float, str]:
    """The greatest difference from the full batch's gradient over its greatest element, and where it is."""
    gradients_of_run = gradients(loss, mask, zero_stage, num_micro)
    assert expected.keys() == gradients_of_run.keys()
    assert "logit_scale" in gradients_of_run
    largest = max(float(g.abs().max()) for g in expected.values())
    return max((float((gradients_of_run[name] - g).abs().max()) / largest, name) for name, g in expected.items())


def pushed_scale(zero_stage: int, how: str) -> tuple[float, float]:
    """Greatest log of the logit scale in bf16 over a few steps that push it up: the master's, and the forward's."""
    stage = build(PushedStage, init_scale=90.0)
    if how != "held":
        stage.limits = {}  # type: ignore[misc]
    engine = DeepSpeedEngine(stage, OPTIM, zero_stage=zero_stage, precision="bf16", peak_lr=0.1)
    greatest, factor = -math.inf, 0.0
    for _ in range(4):
        if how == "held":
            factor = max(factor, engine.step(share(stage, 1), 0.1).parts["logit_scale"])
        else:
            stage.limits = FlipStage.limits  # type: ignore[misc]  # the forward's clamp stays
            held, engine._hold_limits = engine._hold_limits, lambda: None  # type: ignore[method-assign]
            factor = max(factor, engine.step(share(stage, 1), 0.1).parts["logit_scale"])
            engine._hold_limits = held  # type: ignore[method-assign]
            with torch.no_grad():
                stage.logit_scale.clamp_(max=math.log(100))  # what open_clip's training does after each step
        greatest = max(greatest, float(whole(engine)["logit_scale"][0]["value"]))
    engine.close()
    return greatest, factor
