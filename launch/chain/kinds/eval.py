"""Measuring a run, or any weights, on data sets, without training."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pydantic import Field

from launch.chain.kinds.base import ChainFolders, StepKind
from launch.chain.kinds.weights import WeightsConfig
from launch.stopping import StopRequest
from pipeline import config as configs
from pipeline.config import Config, Document

log = logging.getLogger("vitrail")


class KnnConfig(Config):
    """Weighted nearest neighbours on the trunk's features instead of the stage's own evaluations."""

    pooling: Literal["avg", "cls", "avg_with_cls"] = "avg"
    k: int = Field(default=20, gt=0)
    temperature: float = Field(default=0.07, gt=0)


class EvalConfig(WeightsConfig):
    """What is measured, and on which data sets."""

    sets: dict[str, str] = {}  # data sets by name; those of the run if none is given
    train: str | None = None  # the training set, for neighbours; of a run its own
    options: dict[str, Any] = {}  # changes of the stage's options; keys may be dotted
    knn: KnnConfig | None = None
    batch: int = Field(default=64, gt=0)
    loader_workers: int = Field(default=0, ge=0)


class EvalStep(StepKind):
    """Writes figures and details as JSON; its document is an `EvalConfig`."""

    def output(self, name: str, document: Document, folders: ChainFolders) -> str:
        return str(folders.work / "evaluations" / f"{name}.json")

    def run(self, document: Document, *, where: str, output: str, stop: StopRequest) -> dict[str, Any]:
        from pipeline.inference.evaluating import KnnOptions, evaluate, read_sets
        from pipeline.inference.loading import change_options, read_source_weights

        config = configs.validate(EvalConfig, document, where=where)
        weights = read_source_weights(config.source, config.format, config.known, config.weights)
        measured_on = read_sets(config.source, config.sets, config.train)
        if measured_on.unreadable:
            log.info("measured without the run's training set, which is out of reach: %s", measured_on.unreadable)
        result = evaluate(
            change_options(weights, config.options),
            measured_on.manifests,
            knn=None if config.knn is None else KnnOptions(**config.knn.model_dump()),
            batch=config.batch,
            loader_workers=config.loader_workers,
        )
        result.write(output)
        return {"written": output, "figures": result.figures}
