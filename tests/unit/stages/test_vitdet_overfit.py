"""A tiny detector learns sixteen real photos by heart, which no error in targets, losses or pasting survives."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import ranks
from pipeline.config import validate
from pipeline.data.batch import Batch, Example, RawSample, collate
from pipeline.data.instances import Fitted, InstanceExample
from pipeline.evaluate.base import Predictions
from pipeline.stages.base import DataFacts
from pipeline.stages.vitdet import VitDetOptions, VitDetStage
from pipeline.train.config import OptimConfig
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine
from pipeline.train.optim import scheduled_rate
from pipeline.train.resolve import multiplies_bf16

SIDE = 256  # pixels of the training size
SMALLEST = 32  # pixels, root of the area at training size; smaller objects are ignored
NUM_PHOTOS, BATCH, NUM_STEPS = 16, 4, 500
OPTIONS = {
    "model": {
        "width": 128, "depth": 4, "heads": 2, "image_size": SIDE, "patch_size": 16, "cls_token": False,
        "final_norm": False, "position_trained": True, "window": 7, "global_blocks": [1, 3], "relative_positions": True,
    },
    "detector": {
        "pyramid_channels": 48, "rpn_samples": 32, "train_proposals": [300, 100], "test_proposals": [300, 100],
        "box_samples": 48, "box_positives": 0.5, "box_convs": 0, "box_width": 192, "mask_convs": 2, "mask_width": 64,
        "detections": 50,
    },
}  # fmt: skip
# Losses of proposals are divided by the anchors that are to be sampled, and a long object, such as the train, has three
# that show it: with 128, the few steps here don't bring it among the proposals.
PEAK_LR = 1.5e-3
OPTIM = OptimConfig(lr=PEAK_LR, betas=(0.9, 0.999), weight_decay=0.0, warmup_samples=20 * BATCH)


def photos(folder: Path) -> tuple[list[RawSample], tuple[str, ...]]:
    """The first photos with an object that is large enough, as shards hold them."""
    document = json.loads((folder / "instances.json").read_text())
    by_image = defaultdict(list)
    for annotation in document["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    chosen = []
    for image in document["images"]:
        factor = SIDE / max(image["height"], image["width"])
        annotations = by_image[image["id"]]
        if any(
            annotation["area"] ** 0.5 * factor >= SMALLEST and not annotation["iscrowd"] for annotation in annotations
        ):
            chosen.append((image, factor, annotations))
    chosen = chosen[:NUM_PHOTOS]
    used = sorted({annotation["category_id"] for _, _, annotations in chosen for annotation in annotations})
    names = {category["id"]: category["name"] for category in document["categories"]}
    samples = []
    for number, (image, factor, annotations) in enumerate(chosen):
        marked = [
            annotation
            | {
                "category_id": used.index(annotation["category_id"]),
                "iscrowd": int(annotation["iscrowd"] or annotation["area"] ** 0.5 * factor < SMALLEST),
            }
            for annotation in annotations
        ]
        members = {
            "jpg": (folder / "images" / image["file_name"]).read_bytes(),
            "json": json.dumps({"annotations": marked}).encode(),
        }
        samples.append(RawSample(number, image["file_name"], members))
    return samples, tuple(names[i] for i in used)


def batch_of(examples: list[Example], ids: list[int], position: int) -> Batch:
    return collate(
        [examples[i] for i in ids], ids, [1000 * position + i for i in ids], [1.0] * len(ids), position * BATCH
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sixteen_photos_are_learnt_by_heart(shared: Path) -> None:
    folder = shared / "data" / "coco_sample"
    if not (folder / "instances.json").is_file():
        pytest.skip("no photos with masks: VITRAIL_SHARED holds no data/coco_sample/instances.json")
    samples, classes = photos(folder)
    torch.manual_seed(0)
    stage = VitDetStage(validate(VitDetOptions, OPTIONS, where="test"), DataFacts(classes, len(samples)))
    shown, stored = (
        [InstanceExample(Fitted((SIDE, SIDE)), objects=objects)(sample, 0) for sample in samples]
        for objects in ("shown", "stored")
    )
    precision: Any = "bf16" if multiplies_bf16(ranks.device()) else "fp32"
    engine = DeepSpeedEngine(stage, OPTIM, zero_stage=0, precision=precision, peak_lr=PEAK_LR)
    order = torch.Generator().manual_seed(0)
    ids: list[int] = []
    for step in range(NUM_STEPS):
        if len(ids) < BATCH:
            ids += torch.randperm(len(samples), generator=order).tolist()
        batch_ids, ids = ids[:BATCH], ids[BATCH:]
        rate = scheduled_rate(OPTIM, PEAK_LR, step * BATCH, NUM_STEPS * BATCH)
        assert engine.step([batch_of(shown, batch_ids, step)], rate).applied

    def predict(batch: Batch) -> Predictions:
        return engine.predict(batch)

    def sweep(name: str) -> Iterable[Batch]:
        return [batch_of(stored, [2 * i, 2 * i + 1], 0) for i in range(len(samples) // 2)]

    figures: dict[str, float] = {}
    for evaluation in stage.evaluations().values():
        figures |= evaluation(predict, sweep, ("train",))
    engine.close()
    assert figures["train/box_ap50"] > 0.90
    assert figures["train/mask_ap50"] > 0.80
