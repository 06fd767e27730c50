"""What the package offers beside the library's own functions: those that take a model or where to load it from."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from launch.workers.attempts import TrainResult
from pipeline import config as configs
from pipeline.convert.weights import Weights
from pipeline.errors import ConfigError
from pipeline.inference import evaluating, predicting
from pipeline.inference.embedding import embed_images, embed_texts
from pipeline.inference.evaluating import EvaluationResult, KnnOptions
from pipeline.inference.images import ImageInput, list_images
from pipeline.inference.loading import Model, load, read_source_weights
from pipeline.inference.predicting import Prediction, PredictRequest
from pipeline.models.trunk.pooling import Pooling

log = logging.getLogger("vitrail")


def predict(
    model: Model | str,
    images: ImageInput | Sequence[ImageInput],
    *,
    question: Mapping[str, Any] = {},
    attention: bool = False,
    block: int = -1,
    batch: int = 16,
    seed: int = 0,
) -> list[Prediction]:
    """What a trained stage makes of images: facts and pictures of each, in their order.

        >>> [prediction] = vitrail.predict("runs/mae", "photo.png")
        >>> sorted(prediction.facts)
        ['height', 'reconstruction_mse', 'width']

    Args:
        model: a loaded model, or a run or weight file that `load` takes without further arguments.
        images: one or several: a path, folder, glob or URL, encoded bytes, a PIL image, a uint8 array [H,W,3] or a
            uint8 tensor [3,H,W].
        question: what the stage is to be asked, such as {"texts": ["a cat", "a dog"]} for stage flip.
        attention: show where the trunk looks, head by head.
        block: whose attention is shown; -1 is the last.
        batch: images at a time.
        seed: of masks and whatever else is drawn.

    Raises:
        UserError: weights, question or images are wrong. An image that can't be read has its `error` said instead.
    """
    request = PredictRequest(question, attention, block, batch, seed)
    return list(predicting.predict(_loaded(model), list_images(images), request))


def embed(
    model: Model | str,
    images: ImageInput | Sequence[ImageInput] | None = None,
    *,
    texts: Sequence[str] | None = None,
    pooling: Pooling | None = None,
    batch: int = 16,
) -> Float[Tensor, "n d"]:
    """A vector for each image, or for each text of a model with a text tower; fp32, on the CPU.

        >>> vitrail.embed("runs/mae", "photo.png").shape
        torch.Size([1, 16])

    Args:
        model: as `predict`'s.
        images: as `predict`'s.
        texts: instead of images, for stage flip: comparable with its images' embeddings by a product.
        pooling: of the trunk's tokens: avg, cls or avg_with_cls; None: avg, but for stage flip the embedding that is
            compared with texts, of length 1.
        batch: images or texts at a time.

    Raises:
        UserError: the weights are wrong, an image can't be read, or the stage has no text tower.
    """
    if (images is None) == (texts is None):
        raise ConfigError("either images or texts are embedded", where="embed", fix="give one of the two")
    loaded = _loaded(model)
    if texts is not None:
        return embed_texts(loaded, texts, batch=batch)
    assert images is not None
    return embed_images(loaded, list_images(images), pooling=pooling, batch=batch)


def evaluate(
    model: Model | str,
    sets: Mapping[str, str] = {},
    *,
    train: str | None = None,
    knn: KnnOptions | None = None,
    batch: int = 64,
    loader_workers: int = 0,
) -> EvaluationResult:
    """Measure a model on data sets with every evaluation its stage has, or by nearest neighbours.

        >>> result = vitrail.evaluate("runs/mae", {"heldout": "data/heldout"})
        >>> list(result.figures)
        ['heldout/reconstruction_mse']

    Args:
        model: as `predict`'s.
        sets: the data sets' URLs by name; if empty, those that the run was measured on.
        train: URL of the training set, for neighbours; None: the run's own.
        knn: measure nearest neighbours on the trunk's features, which need no head.
        batch: samples at a time.
        loader_workers: processes that decode; 0: this one.

    Raises:
        UserError: weights or data sets are wrong, or don't fit each other.
    """
    weights = _weights(model)
    measured_on = evaluating.read_sets(weights.where, sets, train)
    if measured_on.unreadable:
        log.warning("measured without the run's training set, which can't be read: %s", measured_on.unreadable)
    return evaluating.evaluate(weights, measured_on.manifests, knn=knn, batch=batch, loader_workers=loader_workers)


def train(config: str | Mapping[str, Any], overrides: Sequence[str] = (), *, ranks: int = 1) -> TrainResult:
    """Train one stage in processes of this machine, as `vitrail train --no-ray`; the same call resumes it. Call it in
    the main thread: Ctrl-C saves a checkpoint and stops.

        >>> vitrail.train("mae.yaml", ["length_samples=32"]).status
        'done'

    Args:
        config: a YAML file, a run directory to go on with, or the configuration itself.
        overrides: "key=value" changes of it.
        ranks: processes.

    Raises:
        UserError: the configuration is wrong, or the machine can't serve it.
        launch.workers.attempts.JobFailedError: attempts kept dying without progress.
    """
    from launch.stopping import StopRequest
    from launch.train import Where, train_document
    from launch.worker import read_document
    from launch.workers.placement import PlacementRequest

    if isinstance(config, str):
        document, name = read_document(config, overrides), config
    else:
        document, name = dict(config), str(config.get("name", "configuration"))
        for item in overrides:
            document = configs.override(document, item)
    where = Where(PlacementRequest(ranks=ranks), use_ray=False)
    with StopRequest().on_signals() as stop:
        return train_document(document, name, where, stop=stop, say=_to_stderr)


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _loaded(model: Model | str) -> Model:
    return load(model) if isinstance(model, str) else model


def _weights(model: Model | str) -> Weights:
    return read_source_weights(model) if isinstance(model, str) else model.weights
