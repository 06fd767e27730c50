"""Fifty steps of MAE's pretraining, ours and Hugging Face's, from the same weights, images and masks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import convert, ranks
from pipeline.config import load, validate
from pipeline.data.batch import Batch, derive_seed
from pipeline.models.noise import uniform
from pipeline.models.pixels import normalize
from pipeline.stages.base import DataFacts, seeded_init
from pipeline.stages.mae import MaeOptions, MaeStage
from pipeline.train.config import TrainConfig
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine
from pipeline.train.optim import peak_rate, scheduled_rate

NUM_STEPS, GLOBAL_BATCH = 50, 16
RECIPE = Path(__file__).parents[2] / "configs" / "pretrain" / "mae.yaml"
MODEL = {"size": None, "width": 48, "depth": 3, "heads": 4, "image_size": 64, "patch_size": 8}
DECODER = {"width": 32, "depth": 2, "heads": 4}


def recipe() -> tuple[TrainConfig, MaeOptions]:
    """The shipped recipe at a tiny size: 50 steps, warm-up as long a part of them as in the recipe's, and a rate that
    the small batch is scaled up to what the recipe's own batch gives.
    """
    document = load(str(RECIPE), ["name=trajectory", "data.train=none"])
    config = validate(TrainConfig, document, where=str(RECIPE))
    share = config.optim.warmup_samples / config.length_samples
    length = NUM_STEPS * GLOBAL_BATCH
    assert config.optim.base_lr is not None
    document["data"]["global_batch"] = GLOBAL_BATCH
    document["length_samples"] = length
    document["optim"]["warmup_samples"] = round(share * length)
    document["optim"]["base_lr"] = config.optim.base_lr * config.data.global_batch / GLOBAL_BATCH
    document["options"]["model"] = MODEL
    document["options"]["decoder"] = DECODER
    config = validate(TrainConfig, document, where="trajectory")
    return config, validate(MaeOptions, config.options, where="trajectory")


def batch_of(step: int, rows: slice = slice(None)) -> Batch:
    """Smooth random images, so that there is something to learn; seeds, and so masks, of the step's own."""
    generator = torch.Generator().manual_seed(step)
    coarse = torch.rand(GLOBAL_BATCH, 3, 5, 5, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic", align_corners=True)
    seeds = torch.tensor([derive_seed("trajectory", step, i) for i in range(GLOBAL_BATCH)])
    return Batch(
        ids=torch.arange(GLOBAL_BATCH)[rows],
        seeds=seeds[rows],
        weight=torch.ones(GLOBAL_BATCH)[rows],
        position=step * GLOBAL_BATCH,
        images=(images[rows] * 255).clamp(0, 255).to(torch.uint8),
    )


def build() -> MaeStage:
    seeded_init(5)
    return MaeStage(recipe()[1], DataFacts())


def ours(zero_stage: int, changes: dict[str, Any] | None = None) -> list[float]:
    """Losses of the engine over this process group's ranks."""
    config, _ = recipe()
    optim = config.optim.model_copy(update=changes or {})
    stage = build()
    peak = peak_rate(optim, GLOBAL_BATCH)
    engine = DeepSpeedEngine(stage, optim, zero_stage=zero_stage, precision="fp32", peak_lr=peak)
    world = ranks.world()
    size = GLOBAL_BATCH // world.size
    rows = slice(world.rank * size, (world.rank + 1) * size)
    losses = []
    for step in range(NUM_STEPS):
        lr = scheduled_rate(optim, peak, step * GLOBAL_BATCH, config.length_samples)
        losses.append(engine.step([batch_of(step, rows)], lr).loss)
    engine.close()
    return losses


def theirs(folder: str) -> list[float]:
    """Losses of `ViTMAEForPreTraining` in a training loop written after `main_pretrain.py` with torch alone: timm's
    groups (no decay for one dimension and biases), AdamW, the rate set before every step by `lr_sched.py`.
    """
    from transformers import ViTMAEForPreTraining

    convert.save(build(), folder, "hf_vit_mae")
    model = ViTMAEForPreTraining.from_pretrained(folder).train()
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.requires_grad_(False)  # fixed in the official code; transformers 5 trains what `from_pretrained` reads
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    exempt = [p for name, p in trained if p.ndim <= 1 or name.endswith(".bias")]
    decayed = [p for name, p in trained if not (p.ndim <= 1 or name.endswith(".bias"))]
    peak = 1.5e-4 * 4096 / 256
    groups = [{"params": exempt, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    epochs, warmup = 800.0, 40.0
    losses = []
    for step in range(NUM_STEPS):
        epoch = epochs * step / NUM_STEPS
        if epoch < warmup:
            lr = peak * epoch / warmup
        else:
            lr = peak * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = batch_of(step)
        assert batch.images is not None
        noise: Tensor = uniform(batch.seeds, "mask", 64)
        loss = model(pixel_values=normalize(batch.images, "imagenet"), noise=noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
