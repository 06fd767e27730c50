"""Puts every registered stage through its paces under ZeRO-3, as one rank; `test_stages.py` reads what it writes.

Run as `python stage_trial.py FOLDER` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Starting a process costs
more than a trial, so one start serves all stages.
"""

from __future__ import annotations

import dataclasses
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import ranks
from pipeline.config import validate
from pipeline.data.batch import Batch, Instances
from pipeline.data.images.views import fitted
from pipeline.data.instances import InstanceExample, decode_masks
from pipeline.models.detection.masks import encode_masks
from pipeline.stages import STAGES, stage_class
from pipeline.stages.base import DataFacts, Stage
from pipeline.train.config import OptimConfig
from pipeline.train.engine.base import Fragment
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine

CLASSES = ("dark", "red", "green", "blue")
MODEL = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8}
DENSE = {
    "cls_token": False, "final_norm": False, "window": 3, "global_blocks": [1], "conv_blocks": [0],
    "relative_positions": True, "drop_path": 0.1, "position_trained": True, "position_image_size": 16,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "mae": {"model": MODEL, "decoder": {"width": 16, "depth": 1, "heads": 2}, "evaluate": ["reconstruction", "knn"]},
    "mp3": {"model": MODEL | {"activation_checkpointing": True}, "context_ratio": 0.5},
    "flip": {
        "model": MODEL,
        "text": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
        "embed_dim": 16,
    },
    "classify": {"model": MODEL | {"drop_path": 0.2}, "head_init_std": 0.02, "mixup": 0.2, "cutmix": 1.0},
    "probe": {"model": MODEL | {"drop_path": 0.2}, "lr_multipliers": [0.5, 1.0]},
    "segment": {
        "model": MODEL | {"cls_token": False, "final_norm": False}, "head": "upernet", "channels": 64,
    },
    "vitdet": {
        "model": MODEL | DENSE,
        "detector": {
            "pyramid_channels": 16, "rpn_samples": 32, "train_proposals": [64, 32], "test_proposals": [64, 32],
            "box_samples": 16, "box_convs": 1, "box_width": 32, "mask_convs": 1, "detections": 8,
            "score_threshold": 0.01,
        },
    },
    "sam": {
        "model": MODEL | DENSE,
        "sam": {"channels": 32, "heads": 2, "mlp_width": 64, "iou_width": 16, "mask_channels": 4},
        "clicks": 1, "max_objects": 2, "max_box_noise": 2.0,
    },
}  # fmt: skip
GLOBAL_BATCH = 12
OPTIM = OptimConfig(lr=3e-3, weight_decay=0.01)


def build(name: str, seed: int = 0) -> Stage:
    torch.manual_seed(seed)
    cls = stage_class(name)
    return cls(validate(cls.options_class, TINY[name], where=f"TINY[{name}]"), DataFacts(CLASSES, num_samples=48))


def batch_of(stage: Stage, step: int, *, share: bool = True) -> Batch:
    """This rank's share of a global batch: noisy colours that labels and captions name; one sample absent."""
    ids = (torch.arange(GLOBAL_BATCH) + step * GLOBAL_BATCH) % 48
    labels = ids % len(CLASSES)
    noise = torch.stack([torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(int(i))) for i in ids])
    colour = torch.nn.functional.one_hot(labels, 4)[:, 1:].view(-1, 3, 1, 1)
    objects = [rectangle(int(i), int(label)) for i, label in zip(ids, labels, strict=True)]
    if hasattr(stage, "transform") and isinstance(stage.transform(train=True), InstanceExample):
        shown = torch.stack([decode_masks(one.masks, (32, 32)).any(0) for one in objects])
        colour = colour * shown.unsqueeze(1)
    images = (80 * noise + 150 * colour).to(torch.uint8)
    weight = torch.ones(GLOBAL_BATCH)
    weight[step % GLOBAL_BATCH] = 0
    text = stage.tokenizer([f"a {CLASSES[i]} picture" for i in labels]) if hasattr(stage, "tokenizer") else None
    rows = slice(None)
    if share:
        size = GLOBAL_BATCH // ranks.world().size
        rows = slice(ranks.world().rank * size, (ranks.world().rank + 1) * size)
    return Batch(
        ids=ids[rows],
        seeds=ids[rows] * 1000 + step // 4,
        weight=weight[rows],
        position=step * GLOBAL_BATCH,
        images=images[rows],
        text=None if text is None else text[rows],
        labels=labels[rows],
        instances=tuple(objects[rows]),
    )


def rectangle(number: int, label: int) -> Instances:
    """One object in an image of 32 x 32 pixels, or in every seventh image none, and in every fifth a crowd beside."""
    left, top = 2 * (number % 5), 2 * (number % 4)
    boxes = [(left, top, left + 18, top + 20), (20, 22, 30, 32)]
    chosen = [] if number % 7 == 6 else boxes[: 2 if number % 5 == 4 else 1]
    masks = torch.zeros(len(chosen), 32, 32, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, chosen, strict=True):
        mask[y0:y1, x0:x1] = True
    return Instances(
        boxes=torch.tensor(chosen, dtype=torch.float32).reshape(-1, 4),
        labels=torch.full((len(chosen),), label),
        masks=tuple(encode_masks(masks)),
        crowd=torch.tensor([0, 1][: len(chosen)]),
        view=fitted(32, 32, (32, 32)),
    )


def cut(batch: Batch, rows: slice) -> Batch:
    """Some of a batch's samples."""
    parts = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return Batch(**{name: part[rows] if isinstance(part, Tensor | tuple) else part for name, part in parts.items()})


def engine_of(stage: Stage, precision: str = "fp32") -> DeepSpeedEngine:
    return DeepSpeedEngine(stage, OPTIM, zero_stage=3, precision=precision, peak_lr=OPTIM.lr)  # type: ignore[arg-type]


def copied(engine: DeepSpeedEngine) -> dict[str, list[Fragment]]:
    """All ranks' fragments by name, in order."""
    own = [f._replace(tensors={k: t.clone() for k, t in f.tensors.items()}) for f in engine.snapshot()]
    found: dict[str, list[Fragment]] = {}
    for fragment in sorted((f for part in ranks.gather(own) for f in part), key=lambda f: (f.name, f.start)):
        found.setdefault(fragment.name, []).append(fragment)
    return found


def whole(fragments: dict[str, list[Fragment]], key: str = "value") -> dict[str, Tensor]:
    """The named tensor of every parameter and buffer that has it, flattened."""
    having = {name: parts for name, parts in fragments.items() if all(key in part.tensors for part in parts)}
    return {name: torch.cat([part.tensors[key] for part in parts]) for name, parts in having.items()}


def first_gradients(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Of the one step taken: Adam's first moment is then (1 - beta1) x gradient."""
    return {name: moment / (1 - OPTIM.betas[0]) for name, moment in whole(copied(engine), "exp_avg").items()}


def reader(fragments: dict[str, list[Fragment]]) -> Callable[[str, int, int], Fragment]:
    def read(name: str, start: int, stop: int) -> Fragment:
        parts = fragments[name]
        keys = parts[0].tensors.keys()
        joined = {key: torch.cat([part.tensors[key] for part in parts])[start:stop] for key in keys}
        return Fragment(name, start, stop, joined, parts[0].group)

    return read


def trial(name: str) -> dict[str, Any]:
    """Train ten steps; measure, and draw pictures. On several ranks, train five again from a snapshot, and in bf16."""
    stage = build(name)
    initial = {key: value.detach().clone().flatten() for key, value in stage.state_dict().items()}
    trainable = [key for key, p in stage.named_parameters() if stage.trainable(key) and p.requires_grad]
    engine = engine_of(stage)
    losses, middle, gradients = [], {}, {}
    for step in range(10):
        result = engine.step([batch_of(stage, step)], OPTIM.lr or 0)
        assert result.applied
        losses.append(result.loss)
        if step == 0:
            gradients = first_gradients(engine)
        if step == 4:
            middle = copied(engine)
    after = whole(copied(engine))
    report = {
        "initial": initial,
        "trainable": trainable,
        "losses": losses,
        "parts": sorted(result.parts),
        "gradients": gradients,
        "reached": [key for key, moment in whole(middle, "exp_avg").items() if moment.any()],
        "after": after,
    }
    report |= looked_at(stage, engine)
    engine.close()
    if ranks.world().size == 1:
        return report

    resumed = build(name, seed=1)
    engine = engine_of(resumed)
    engine.restore(reader(middle))
    report["losses_resumed"] = [engine.step([batch_of(resumed, step)], OPTIM.lr or 0).loss for step in range(5, 10)]
    report["after_resumed"] = whole(copied(engine))
    engine.close()

    engine = engine_of(split := build(name))
    whole_share = batch_of(split, 0)
    engine.step([cut(whole_share, slice(0, 2)), cut(whole_share, slice(2, None))], OPTIM.lr or 0)
    report["gradients_accumulated"] = first_gradients(engine)
    engine.close()

    low = build(name)
    engine = engine_of(low, "bf16")
    report["losses_bf16"] = [engine.step([batch_of(low, step)], OPTIM.lr or 0).loss for step in range(10)]
    engine.close()
    return report


def looked_at(stage: Stage, engine: DeepSpeedEngine) -> dict[str, Any]:
    """Figures of all its evaluations, and its pictures."""

    def sweep(name: str) -> list[Batch]:
        return [batch_of(stage, step) for step in range(4)]

    figures = {}
    details = {}
    for evaluation in stage.evaluations().values():
        measured = evaluation(engine.predict, sweep, ("validation", "heldout"))
        figures |= measured
        details |= measured.details
    batch = batch_of(stage, 0, share=False)
    pictures = stage.pictures(batch, engine.predict(batch))
    return {"figures": figures, "details": details, "pictures": pictures}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    assert TINY.keys() == STAGES.keys(), "every registered stage needs a tiny build here"
    reports = {name: trial(name) for name in STAGES}
    here = ranks.world()
    (folder / f"world{here.size}-rank{here.rank}.pickle").write_bytes(pickle.dumps(reports))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
