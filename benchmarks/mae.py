"""A full training step of MAE, ViT-B/16 at 224 in bf16: ours against Hugging Face's, and masked against unmasked.

A step is forward, backward and AdamW's update of all weights, on uint8 images that are in memory already. Ours is the
engine that `vitrail train` runs (DeepSpeed, ZeRO stage 0, one process), theirs `transformers.ViTMAEForPreTraining`
under `torch.autocast` with `torch.optim.AdamW`, both with all cores. Both see the same images and the same masks, start
from the same weights, and their losses must agree at every step.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Comparison, Contender, Goal, UnequalWork, Work, alone, compare
from pipeline import convert
from pipeline.config import validate
from pipeline.data.batch import Batch
from pipeline.models.noise import uniform
from pipeline.models.pixels import normalize
from pipeline.models.trunk.masking import take
from pipeline.stages.base import DataFacts
from pipeline.stages.mae import MaeOptions, MaeStage
from pipeline.train.config import OptimConfig
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine

BATCH, SIDE, RATE = 32, 224, 1e-4
PATCHES = 196
TOLERANCE = 0.01  # of the loss: bf16 keeps 8 bits


def run(pairs: int) -> list[Comparison]:
    """`mae-step` against transformers, and `mae-masking`: a masked step against one whose encoder sees all patches."""
    torch.set_num_threads(_cores())
    alone()
    return [against_transformers(pairs), masked_against_unmasked(pairs)]


def against_transformers(pairs: int) -> Comparison:
    """Ours against the peer."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = ours_step(folder), theirs_step(folder)
        return compare(
            "mae-step",
            f"one training step of MAE, ViT-B/16 at {SIDE}, batch {BATCH}, bf16, mask ratio .75, {_cores()} cores",
            Contender("vitrail's engine", ours),
            Contender("transformers ViTMAEForPreTraining", theirs),
            check=same_loss,
            pairs=pairs,
            work=Work(BATCH, "images"),
            goal=Goal(ratio_min=2.0),
            notes={"batch": BATCH},
        )


def masked_against_unmasked(pairs: int) -> Comparison:
    """What leaving masked patches out of the encoder saves: the same model with and without, decoder alike."""
    masked, whole = stage_step(build(), masked=True), stage_step(build(), masked=False)
    return compare(
        "mae-masking",
        f"forward and backward of MAE, ViT-B/16 at {SIDE}, batch {BATCH}, bf16: encoder on a quarter of the patches, or"
        " on all of them with mask tokens in place of the masked ones",
        Contender("encoder sees 49 patches", masked),
        Contender("encoder sees 196 patches", whole),
        check=lambda ours, peer: bool(torch.isfinite(torch.tensor([ours, peer])).all()),
        pairs=pairs,
        work=Work(BATCH, "images"),
        notes={"paper": "2.8x to 4.1x on accelerators", "activation_bytes": activation_bytes()},
    )


def build() -> MaeStage:
    """The recipe's model."""
    torch.manual_seed(0)
    return MaeStage(validate(MaeOptions, {"model": {"size": "B"}}, where="benchmark"), DataFacts())


def batches() -> Callable[[], Batch]:
    """The same sequence of batches for each side."""
    images = torch.randint(
        0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    step = 0

    def next_batch() -> Batch:
        nonlocal step
        step += 1
        seeds = torch.arange(BATCH) + 1000 * step
        return Batch(torch.arange(BATCH), seeds, torch.ones(BATCH), BATCH * step, images=images)

    return next_batch


def ours_step(folder: str) -> Callable[[], float]:
    """One step of the engine; leaves the weights in `folder` for the peer first."""
    stage = build()
    convert.save(stage, folder, "hf_vit_mae")
    optim = OptimConfig(lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    engine = DeepSpeedEngine(stage, optim, zero_stage=0, precision="bf16", peak_lr=RATE)
    following = batches()
    return lambda: engine.step([following()], RATE).loss


def theirs_step(folder: str) -> Callable[[], float]:
    """One step of the peer, written as its users do."""
    from transformers import ViTMAEForPreTraining

    model = ViTMAEForPreTraining.from_pretrained(folder).train()
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    following = batches()

    def step() -> float:
        batch = following()
        assert batch.images is not None
        with torch.autocast("cpu", torch.bfloat16):
            pixels = normalize(batch.images, "imagenet")
            loss = model(pixel_values=pixels, noise=uniform(batch.seeds, "mask", PATCHES).float()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def stage_step(stage: MaeStage, *, masked: bool) -> Callable[[], float]:
    """Forward and backward in bf16."""
    stage = stage.bfloat16()
    following = batches()

    def step() -> float:
        loss = loss_of(stage, following(), masked=masked)
        stage.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.item())

    return step


def loss_of(stage: MaeStage, batch: Batch, *, masked: bool) -> Tensor:
    """MAE's loss. Unmasked, the encoder works on all patches, of which the decoder gets the kept ones."""
    assert batch.images is not None
    pixels = normalize(batch.images, "imagenet").to(stage.trunk.patch_embed.proj.weight.dtype)
    masking = stage.masking(batch)
    if masked:
        tokens = stage.trunk(pixels, keep=masking.keep)
    else:
        tokens = stage.trunk(pixels)
        tokens = tokens._replace(patches=take(tokens.patches, masking.keep))
    return stage.errors(pixels, masking, stage.decoder(tokens, masking)).mean()


def activation_bytes() -> dict[str, int]:
    """What backward needs kept of one forward, masked and unmasked, views counted once."""
    results = {}
    for name, masked in (("masked", True), ("unmasked", False)):
        stage = build().bfloat16()
        weights = {p.untyped_storage().data_ptr() for p in stage.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Any, saved: dict[int, int] = saved) -> Any:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(stage, batches()(), masked=masked)  # held until all is counted: freed memory is used again
        results[name] = sum(size for pointer, size in saved.items() if pointer not in weights)
        del loss
    return results


def same_loss(ours: float, theirs: float) -> bool:
    """Equal but for bf16's rounding.

    Raises:
        UnequalWork: they aren't.
    """
    if abs(ours - theirs) > TOLERANCE * abs(theirs):
        raise UnequalWork(f"loss {ours:.5f} against {theirs:.5f}")
    return True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
