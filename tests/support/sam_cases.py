"""Segment Anything measured by ranks with unequal numbers of objects, for `test_engine_sam.py`."""

from __future__ import annotations

from pipeline import ranks
from pipeline.stages.sam import OBJECTS_AT_ONCE
from pipeline.train.config import OptimConfig
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine
from tests.support.sam_batches import batch, objects, tiny_stage

MANY = OBJECTS_AT_ONCE + 6


def figures() -> dict[str, float]:
    """What an evaluation finds under ZeRO-3 on two images, one with more objects than are asked about at once, one with
    none; of two ranks, each has one of them.
    """
    stage = tiny_stage()
    engine = DeepSpeedEngine(stage, OptimConfig(lr=1e-3), zero_stage=3, precision="fp32", peak_lr=1e-3)
    places = [(x, y) for x in range(0, 28, 4) for y in range(0, 28, 2)][:MANY]
    whole = batch(objects(*((x, y, x + 4, y + 4) for x, y in places)), objects())
    here = ranks.world()
    own = whole if here.size == 1 else whole.at(slice(here.rank, here.rank + 1))
    (evaluation,) = stage.evaluations().values()
    found = dict(evaluation(engine.predict, lambda name: iter([own]), ("seen",)))
    engine.close()
    return found
