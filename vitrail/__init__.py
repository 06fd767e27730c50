"""Vitrail from Python, in notebooks and programs of one's own.

    import vitrail

    vitrail.train("mae.yaml")                       # as `vitrail train --no-ray`
    model = vitrail.load("runs/mae")                # or any weights: vitrail.load("vit.pth", "timm", {"heads": 12})
    vitrail.predict(model, "photos/")               # facts and pictures
    vitrail.embed(model, "photos/")                 # a vector for each image
    vitrail.evaluate(model, {"heldout": "data/heldout"})
    vitrail.convert("runs/mae", "vit/", "hf_vit_mae")
    vitrail.read_dataset("data/train")[0].caption

What a user can put right raises `vitrail.UserError`, which says what is wrong, where, and how to mend it. Nothing heavy
is imported before the first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.workers.attempts import TrainResult
    from pipeline.data.dataset import Dataset, DecodedSample, read_dataset
    from pipeline.errors import UserError
    from pipeline.inference.converting import Conversion, convert
    from pipeline.inference.evaluating import EvaluationResult, KnnOptions
    from pipeline.inference.loading import Model, load
    from pipeline.inference.predicting import Prediction
    from vitrail.api import embed, evaluate, predict, train

_MODULES = {
    "Conversion": "pipeline.inference.converting",
    "Dataset": "pipeline.data.dataset",
    "DecodedSample": "pipeline.data.dataset",
    "EvaluationResult": "pipeline.inference.evaluating",
    "KnnOptions": "pipeline.inference.evaluating",
    "Model": "pipeline.inference.loading",
    "Prediction": "pipeline.inference.predicting",
    "TrainResult": "launch.workers.attempts",
    "UserError": "pipeline.errors",
    "convert": "pipeline.inference.converting",
    "embed": "vitrail.api",
    "evaluate": "vitrail.api",
    "load": "pipeline.inference.loading",
    "predict": "vitrail.api",
    "read_dataset": "pipeline.data.dataset",
    "train": "vitrail.api",
}
__all__ = [
    "Conversion",
    "Dataset",
    "DecodedSample",
    "EvaluationResult",
    "KnnOptions",
    "Model",
    "Prediction",
    "TrainResult",
    "UserError",
    "convert",
    "embed",
    "evaluate",
    "load",
    "predict",
    "read_dataset",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
