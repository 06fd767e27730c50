"""Measuring a trained stage, or any weights, on data sets, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from pipeline import ranks, storage
from pipeline.classes import TRAIN, facts_to_measure
from pipeline.convert.weights import Weights, build, checked_options
from pipeline.data.batch import Batch, Transform
from pipeline.data.loader import ReadingOptions, sweep
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.errors import CheckpointError, ConfigError, UserError
from pipeline.evaluate.base import Evaluation, Measured, Predictions
from pipeline.evaluate.knn import KnnEvaluation
from pipeline.inference.embedding import trunk_features
from pipeline.inference.loading import is_complete, is_run
from pipeline.models.trunk.pooling import Pooling
from pipeline.run_dir import RunDir
from pipeline.stages.base import Stage
from pipeline.stages.images import ImageOptions, measured_transform, with_labels

FORMAT, FORMAT_VERSION = "vitrail.evaluation", 1


class KnnOptions(NamedTuple):
    """Weighted nearest neighbours on the trunk's features, whatever the stage (Wu et al. 2018).

    Args:
        pooling: of the features.
        k: neighbours that vote.
        temperature: of their votes.
    """

    pooling: Pooling = "avg"
    k: int = 20
    temperature: float = 0.07


class EvaluationSets(NamedTuple):
    """Data sets to measure on."""

    manifests: Mapping[str, Manifest]  # by name, a training set as "train"
    unreadable: str = ""  # why the run's own training set isn't among them, though it has one


class EvaluationResult(NamedTuple):
    """What was measured on which data sets."""

    weights: Weights  # without their tensors
    manifests: Mapping[str, Manifest]  # the data sets by name, a training set as "train"
    knn: KnnOptions | None
    figures: dict[str, float]  # "set/figure" -> value
    details: dict[str, Any]  # what the evaluations tell beside, such as the classes' own figures; JSON-able

    def document(self) -> dict[str, Any]:
        """Ready for JSON; the content of the file that `write` writes."""
        sets = {name: {"url": m.url, "num_samples": m.num_samples} for name, m in self.manifests.items()}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "source": self.weights.where,
            "stage": self.weights.stage,
            "weights": self.weights.description,
            "options": self.weights.options,
            "sets": sets,
            "knn": None if self.knn is None else self.knn._asdict(),
            "figures": self.figures,
            "details": self.details,
        }

    def write(self, url: str) -> None:
        """Write the document as JSON, local or s3://."""
        storage.write(url, (json.dumps(self.document(), indent=1, ensure_ascii=False) + "\n").encode())


class _Measurement(NamedTuple):
    """Evaluations, the predictions they see, and how samples become examples."""

    evaluations: Mapping[str, Evaluation]
    predict: Callable[[Batch], Predictions]
    transform: Transform


def evaluate(
    weights: Weights,
    manifests: Mapping[str, Manifest],
    *,
    knn: KnnOptions | None = None,
    batch: int = 64,
    loader_workers: int = 0,
) -> EvaluationResult:
    """Measure weights with every evaluation their stage has, or by neighbours, on this process's device.

    Args:
        weights: of `read_source_weights`.
        manifests: the data sets by name; the set that evaluations know as "train" under that name.
        knn: measure nearest neighbours instead of the stage's own evaluations; they need no head.
        batch: samples at a time.
        loader_workers: processes that decode; 0: this one.

    Raises:
        CheckpointError: the weights lack the head or decoder that the stage's evaluations need.
        ConfigError: a data set that an evaluation needs is missing, or labels mean other classes.
        DataError, StorageError: a data set can't be read.
    """
    stage = _build(weights, manifests, votes=knn is not None)
    measurement = _own_measurement(stage, weights) if knn is None else _neighbours(stage, knn, manifests)
    if not measurement.evaluations:
        raise ConfigError(
            f"stage {weights.stage!r} has no evaluation", where=weights.where, fix="pass knn=KnnOptions()"
        )
    names = tuple(name for name in manifests if name != TRAIN)

    def swept(name: str) -> Iterator[Batch]:
        if name not in manifests:
            raise ConfigError(f"an evaluation needs the {name} set", where=name, fix="say where it is")
        return sweep(manifests[name], measurement.transform, batch=batch, reading=ReadingOptions(loader_workers))

    figures: dict[str, float] = {}
    details: dict[str, Any] = {}
    for evaluation in measurement.evaluations.values():
        measured: Measured = evaluation(_without_gradients(measurement.predict), swept, names)
        figures.update(measured)
        details.update(measured.details)
    return EvaluationResult(weights._replace(state={}), manifests, knn, figures, details)


def read_sets(source: str, sets: Mapping[str, str], train: str | None = None) -> EvaluationSets:
    """The data sets that `source` is to be measured on.

    Args:
        source: a run or weights.
        sets: URLs by name; if empty, those of the run's configuration. One called "train" is the training set.
        train: URL of the training set, for neighbours; None: the run's own, as long as it can be read.

    Raises:
        ConfigError: there is nothing to measure on.
        DataError, StorageError: a set can't be read.
    """
    of_run: Mapping[str, Any] = {}
    if is_run(source):
        of_run = (RunDir(source).config() or {}).get("data", {})
    urls = dict(sets) or dict(of_run.get("evaluate", {}))
    if not urls:
        raise ConfigError("nothing to measure on", where=source, fix="give a data set")
    if TRAIN in urls and train is None:
        train = urls.pop(TRAIN)
        urls = urls or {f"{TRAIN}_set": train}
    if train:
        urls[TRAIN] = train
    manifests = {name: read_manifest(url) for name, url in urls.items()}
    trained_on = of_run.get("train")
    if not train and isinstance(trained_on, str):  # of a mixture, no single set is "the" training set
        try:
            manifests[TRAIN] = read_manifest(trained_on)
        except (UserError, OSError) as error:  # few evaluations want it, and those raise for it
            return EvaluationSets(manifests, str(error))
    return EvaluationSets(manifests)


def _build(weights: Weights, manifests: Mapping[str, Manifest], *, votes: bool) -> Stage:
    _, options = checked_options(weights)
    facts = facts_to_measure(weights.stage, options, weights.classes, manifests, votes=votes)
    stage, _ = build(weights, facts)
    return stage.to(ranks.device())


def _own_measurement(stage: Stage, weights: Weights) -> _Measurement:
    if not is_complete(stage, weights):
        raise CheckpointError(
            f"only {' and '.join(weights.parts)}* is there",
            where=weights.where,
            fix="pass knn=KnnOptions(), which measures the trunk alone, or give weights with their head or decoder",
        )
    return _Measurement(stage.evaluations(), stage.predict, stage.transform(train=False))


def _neighbours(stage: Stage, knn: KnnOptions, manifests: Mapping[str, Manifest]) -> _Measurement:
    options = stage.options
    assert isinstance(options, ImageOptions)

    def features(batch: Batch) -> Predictions:
        assert batch.images is not None
        return with_labels({"features": trunk_features(stage, batch.images, knn.pooling)}, batch)

    if knn.pooling == "cls" and not stage.trunk.config.cls_token:
        raise ConfigError("this trunk has no cls token", where="pooling", fix="use avg")
    num_classes = len(manifests[TRAIN].classes) if TRAIN in manifests else 0  # without it the evaluation raises
    transform = measured_transform(options, num_classes=num_classes)
    return _Measurement({"knn": KnnEvaluation(knn.k, knn.temperature)}, features, transform)


def _without_gradients(predict: Callable[[Batch], Predictions]) -> Callable[[Batch], Predictions]:
    @torch.no_grad()
    def call(batch: Batch) -> Predictions:
        return predict(batch.to(ranks.device()))

    return call
