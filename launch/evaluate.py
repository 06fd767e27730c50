"""Measuring a trained stage, or any weights, on data sets, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from launch.convert import is_run
from launch.predict import changed_options, read_weights_of
from pipeline import ranks, storage
from pipeline.classes import TRAIN, facts_to_measure
from pipeline.convert.weights import Weights, build, checked_options
from pipeline.data.batch import Batch, Transform
from pipeline.data.loader import sweep
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.errors import CheckpointError, ConfigError, UserError
from pipeline.evaluate.base import Evaluation, Measured, Predictions
from pipeline.evaluate.knn import KnnEvaluation
from pipeline.models.pixels import normalize
from pipeline.models.trunk.pooling import Pooling, pool
from pipeline.run_dir import RunDir
from pipeline.stages.base import Stage
from pipeline.stages.images import ImageOptions, measured_transform, with_labels

FORMAT, FORMAT_VERSION = "vitrail.evaluation", 1


class Knn(NamedTuple):
    """Weighted nearest neighbours on the trunk's features, whatever the stage (Wu et al. 2018)."""

    pooling: Pooling = "avg"
    k: int = 20
    temperature: float = 0.07


def evaluate(
    source: str,
    sets: Sequence[str],
    say: Callable[[str], None],
    *,
    train: str | None = None,
    source_format: str | None = None,
    known: Sequence[str] = (),
    settings: Sequence[str] = (),
    which: str = "auto",
    knn: Knn | None = None,
    batch: int = 64,
    workers: int = 0,
    out: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Measure `source` with every evaluation its stage has, or by its neighbours, on this process's device.

    Args:
        source: a run, a weight file of ours, or with `source_format` another project's.
        sets: data sets, as URL or name=URL; those of the run's configuration if none is given.
        train: the set that evaluations know as "train"; of a run its own, unless given.
        which: of a run's weights, see `run_weights`.
        knn: measure nearest neighbours instead of the stage's own evaluations.
        out: where to write the document.

    Raises:
        UserError: weights, options or data sets are wrong, or don't fit each other.
    """
    weights = read_weights_of(source, source_format, known, which)
    if settings:
        weights = weights._replace(options=changed_options(weights.options, settings))
    manifests = _manifests(source, sets, train, say)
    _, options = checked_options(weights)
    facts = facts_to_measure(weights.stage, options, weights.classes, manifests, votes=knn is not None)
    stage, _ = build(weights, facts)
    stage = stage.to(ranks.device())
    names = tuple(name for name in manifests if name != TRAIN)
    on = ", ".join(f"{name} ({manifests[name].num_samples})" for name in names)
    say(f"{weights.stage} from {source}, {weights.told}, on {on}")
    if knn is None:
        _whole(stage, weights)
    evaluations, predict, transform = _own(stage) if knn is None else _neighbours(stage, knn, manifests)
    if not evaluations:
        raise ConfigError(f"stage {weights.stage!r} has no evaluation", where=source, fix="add --knn")

    def swept(name: str) -> Iterator[Batch]:
        if name not in manifests:
            raise ConfigError(f"an evaluation needs the {name} set", where=f"--{name}", fix="say where it is")
        manifest = manifests[name]
        return iter(sweep(manifest, transform, rank=0, world_size=1, batch=batch, workers=workers, seed=0))

    figures: dict[str, float] = {}
    details: dict[str, Any] = {}
    for evaluation in evaluations.values():
        measured: Measured = evaluation(_without_gradients(predict), swept, names)
        figures.update(measured)
        details.update(measured.details)
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": source,
        "stage": weights.stage,
        "weights": weights.told,
        "options": weights.options,
        "sets": {name: {"url": m.url, "num_samples": m.num_samples} for name, m in manifests.items()},
        "knn": None if knn is None else knn._asdict(),
        "figures": figures,
        "details": details,
    }
    lines = [f"{name:<32} {value:.4g}" for name, value in figures.items()]
    if not figures:
        lines = ["no figures: the data sets lack what the evaluations need (labels, captions)"]
    if out is not None:
        storage.write(out, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
        lines.append(f"written: {out}")
    return document, lines


def _manifests(source: str, sets: Sequence[str], train: str | None, say: Callable[[str], None]) -> dict[str, Manifest]:
    """The data sets by name; a run's own training set, which nobody asked for, only where it can be read."""
    places, trained_on = _places(source, sets, train)
    manifests = {name: read_manifest(url) for name, url in places.items()}
    if trained_on is not None:
        try:
            manifests[TRAIN] = read_manifest(trained_on)
        except (UserError, OSError) as error:  # few evaluations want it, and those say so
            say(f"measured without the run's training set, which is out of reach: {error}")
    return manifests


def _places(source: str, sets: Sequence[str], train: str | None) -> tuple[dict[str, str], str | None]:
    """Data sets by name, the training set as "train" where it is given, and else the one that a run was trained on."""
    of_run: Mapping[str, Any] = {}
    if is_run(source):
        of_run = (RunDir(source).config() or {}).get("data", {})
    named = dict(_named(one) for one in sets) or dict(of_run.get("evaluate", {}))
    if not named:
        raise ConfigError("nothing to measure on", where=source, fix="give a data set: FOLDER or NAME=FOLDER")
    if TRAIN in named and train is None:
        train = named.pop(TRAIN)
        named = named or {TRAIN + "_set": train}
    if train:
        return {**named, TRAIN: train}, None
    found = of_run.get("train")  # of a mixture, no single set is "the" training set: it must be named
    return named, found if isinstance(found, str) else None


def _named(given: str) -> tuple[str, str]:
    name, equals, url = given.partition("=")
    if equals and name.isidentifier():
        return name, url
    return given.rstrip("/").rpartition("/")[2] or given, given


def _whole(stage: Stage, weights: Weights) -> None:
    missing = [name for name in stage.state_dict() if not name.startswith(weights.parts)]
    if missing:
        raise CheckpointError(
            f"only {' and '.join(weights.parts)}* is there",
            where=weights.where,
            fix="add --knn, which measures the trunk alone, or give weights with their head or decoder",
        )


Measures = tuple[Mapping[str, Evaluation], Callable[[Batch], Predictions], Transform]
"""Evaluations, the predictions they see, and how samples become examples."""


def _own(stage: Stage) -> Measures:
    return stage.evaluations(), stage.predict, stage.transform(train=False)


def _neighbours(stage: Stage, knn: Knn, manifests: Mapping[str, Manifest]) -> Measures:
    options = stage.options
    assert isinstance(options, ImageOptions)
    if knn.pooling == "cls" and not stage.trunk.config.cls_token:
        raise ConfigError("this trunk has no cls token", where="--pooling", fix="use avg")

    def features(batch: Batch) -> Predictions:
        assert batch.images is not None
        tokens = stage.trunk(normalize(batch.images, options.pixels))
        return with_labels({"features": pool(tokens, knn.pooling).float()}, batch)

    num_classes = len(manifests[TRAIN].classes) if TRAIN in manifests else 0  # without it the evaluation says so
    transform = measured_transform(options, num_classes=num_classes)
    return {"knn": KnnEvaluation(knn.k, knn.temperature)}, features, transform


def _without_gradients(predict: Callable[[Batch], Predictions]) -> Callable[[Batch], Predictions]:
    @torch.no_grad()
    def call(batch: Batch) -> Predictions:
        return predict(batch.to(ranks.device()))

    return call
