"""Fifty steps of contrastive training, ours and open_clip's, from the same weights, pairs and masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import convert, ranks
from pipeline.config import load, validate
from pipeline.data.batch import Batch
from pipeline.models.pixels import normalize
from pipeline.models.trunk.masking import random_masking
from pipeline.stages.base import DataFacts, seeded_init
from pipeline.stages.flip import FlipOptions, FlipStage
from pipeline.train.config import TrainConfig
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine
from pipeline.train.optim import scheduled_rate

NUM_STEPS, GLOBAL_BATCH, WARMUP = 50, 16, 10
MODEL = {"size": None, "width": 64, "depth": 2, "heads": 4, "image_size": 32, "patch_size": 8}
TEXT = {"width": 48, "heads": 3, "layers": 2}
COLOURS = ("red", "green", "blue", "dark", "pale", "bright", "grey", "pink")


def recipe() -> tuple[TrainConfig, FlipOptions]:
    """The shipped recipe of OpenCLIP at a tiny size, half of the patches masked."""
    document = load("configs/pretrain/open_clip.yaml", ["name=trajectory", "data.train=none"])
    document["data"] |= {"global_batch": GLOBAL_BATCH}
    document["length_samples"] = NUM_STEPS * GLOBAL_BATCH
    document["optim"] |= {"warmup_samples": WARMUP * GLOBAL_BATCH, "lr": 2e-3}
    document["options"]["model"] |= MODEL
    document["options"]["text"] |= TEXT
    document["options"] |= {"embed_dim": 32, "mask_ratio": 0.5}
    config = validate(TrainConfig, document, where="trajectory")
    return config, validate(FlipOptions, config.options, where="trajectory")


def build() -> FlipStage:
    seeded_init(5)
    return FlipStage(recipe()[1], DataFacts())


def batch_of(stage: FlipStage, step: int, rows: slice = slice(None)) -> Batch:
    """Noisy patches of colour, and captions that name which."""
    ids = (torch.arange(GLOBAL_BATCH) + 5 * step) % 64
    coarse = torch.stack([torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(int(i))) for i in ids])
    images = (nn.functional.interpolate(coarse, size=(32, 32)) * 255).to(torch.uint8)
    text = stage.tokenizer([f"a {COLOURS[int(i) % 8]} {COLOURS[int(i) // 8]} thing" for i in ids])
    weight = torch.ones(GLOBAL_BATCH)
    position = step * GLOBAL_BATCH
    return Batch(ids[rows], (1000 * step + ids)[rows], weight[rows], position, images=images[rows], text=text[rows])


def ours(zero_stage: int, num_micro: int, changes: dict[str, Any] | None = None) -> list[float]:
    """Losses of the engine over this process group's ranks."""
    config, _ = recipe()
    optim = config.optim.model_copy(update=changes or {})
    stage = build()
    assert optim.lr is not None
    engine = DeepSpeedEngine(stage, optim, zero_stage=zero_stage, precision="fp32", peak_lr=optim.lr)
    world = ranks.world()
    size = GLOBAL_BATCH // world.size // num_micro
    first = world.rank * GLOBAL_BATCH // world.size
    losses = []
    for step in range(NUM_STEPS):
        micro = [batch_of(stage, step, slice(first + k * size, first + (k + 1) * size)) for k in range(num_micro)]
        lr = scheduled_rate(optim, optim.lr, step * GLOBAL_BATCH, config.length_samples)
        losses.append(engine.step(micro, lr).loss)
    engine.close()
    return losses


class GivenPatches(nn.Module):
    """In place of open_clip's PatchDropout, which draws its own: keeps the class token and the patches it is told."""

    keep: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[torch.arange(len(x))[:, None], 1 + self.keep]], dim=1)


def theirs(folder: str) -> list[float]:
    """Losses of open_clip's model and `ClipLoss` in a loop written after its `main.py` and `train.py` with torch alone:
    no decay for one dimension, norms and biases; AdamW; linear warm-up and cosine; the scale clamped after each step.
    """
    import open_clip
    from open_clip.loss import ClipLoss

    stage = build()
    convert.save(stage, f"{folder}/", "open_clip")
    model = open_clip.create_model(f"local-dir:{folder}").train()
    model.visual.patch_dropout = GivenPatches()
    named = list(model.named_parameters())

    def excluded(name: str, p: Tensor) -> bool:
        return p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

    groups = [
        {"params": [p for name, p in named if excluded(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in named if not excluded(name, p)], "weight_decay": 0.2},
    ]
    peak = 2e-3
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-6)
    losses = []
    for step in range(NUM_STEPS):
        lr = peak * step / WARMUP
        if step >= WARMUP:
            lr = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (NUM_STEPS - WARMUP))) * peak
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = batch_of(stage, step)
        assert batch.images is not None
        model.visual.patch_dropout.keep = random_masking(batch.seeds, 16, 8).keep
        images, texts, scale = model(normalize(batch.images, "clip"), batch.text)
        loss = ClipLoss()(images, texts, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
    return losses
