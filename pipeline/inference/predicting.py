"""What a trained stage makes of images: facts, and pictures to look at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from pipeline import config as configs
from pipeline import ranks, storage
from pipeline.config import Config
from pipeline.data.batch import Batch, Example, RawSample, collate, derive_seed
from pipeline.data.images.decode import UnreadableSample, read_header
from pipeline.errors import CheckpointError, ConfigError
from pipeline.inference.images import ImageInput, image_bytes, image_names
from pipeline.inference.loading import Model
from pipeline.pictures.attention import attention_pictures
from pipeline.pictures.picture import Picture
from pipeline.report.sheet import sheet
from pipeline.stages.base import Stage
from pipeline.stages.images import ImageOptions
from pipeline.stages.questions import QUESTION, Answer

FORMAT, FORMAT_VERSION = "vitrail.predictions", 1
DOCUMENT = "predictions.json"
COCO_RESULTS = "coco_results.json"


class PredictRequest(NamedTuple):
    """What is wanted of a prediction beside the images.

    Args:
        question: what the stage is to be asked, by the fields of its `question_class`, such as {"texts": ["a cat"]}.
        attention: show where the trunk looks, head by head.
        block: whose attention is shown; -1 is the last.
        batch: images at a time.
        seed: of masks and whatever else is drawn.
    """

    question: Mapping[str, Any] = {}
    attention: bool = False
    block: int = -1
    batch: int = 16
    seed: int = 0


class Prediction(NamedTuple):
    """What a stage makes of one image."""

    image: str  # its path or URL, or a number for one that was given as pixels
    facts: dict[str, Any]  # height and width in pixels, and the stage's answer; JSON-able; {} where there is an error
    pictures: tuple[Picture, ...] = ()
    error: str = ""  # why the image can't be read


class PredictionFiles(NamedTuple):
    """What `write_predictions` wrote."""

    document: dict[str, Any]  # the content of predictions.json
    url: str  # where that is


class _ReadImage(NamedTuple):
    """An image that could be read."""

    name: str
    size: tuple[int, int]  # height, width in pixels
    example: Example


def predict(model: Model, images: Sequence[ImageInput], request: PredictRequest) -> Iterator[Prediction]:
    """A prediction for each image, in the order of the images. A model without its head shows attention alone.

    Args:
        images: paths and URLs (folders and globs: see `find_images`), encoded bytes, PIL images, uint8 arrays [H,W,3]
            or uint8 tensors [3,H,W].

    Raises:
        CheckpointError: the weights lack the head or decoder, and no attention is asked for.
        ConfigError: the question can't be answered.
    """
    if not model.complete and not request.attention:
        raise CheckpointError(
            f"only {' and '.join(model.weights.parts)}* is there, which shows where it looks but predicts nothing",
            where=model.weights.where,
            fix="pass attention=True, or give weights with their head or decoder",
        )
    question = configs.validate(model.stage.question_class, dict(request.question), where=QUESTION)
    return _predictions(model.stage, images, question if model.complete else None, request)


def _predictions(
    stage: Stage, images: Sequence[ImageInput], question: Config | None, request: PredictRequest
) -> Iterator[Prediction]:
    names = image_names(images)
    for start in range(0, len(images), request.batch):
        chunk = range(start, min(start + request.batch, len(images)))
        read = {i: _read(stage, images[i], names[i], request.seed) for i in chunk}
        readable = {i: image for i, image in read.items() if isinstance(image, _ReadImage)}
        answers = dict(zip(readable, _answers(stage, list(readable.values()), question, request), strict=True))
        for i, image in read.items():
            if isinstance(image, str):
                yield Prediction(names[i], {}, error=image)
            else:
                height, width = image.size
                facts = {"height": height, "width": width, **answers[i].facts}
                yield Prediction(names[i], facts, answers[i].pictures)


def write_predictions(model: Model, predictions: Iterable[Prediction], folder: str) -> PredictionFiles:
    """Write pictures, `predictions.json` and, of a detector, COCO's results into a folder, local or s3://.

    Raises:
        StorageError: the folder can't be written.
    """
    entries: list[dict[str, Any]] = []
    taken: set[str] = set()
    for prediction in predictions:
        if prediction.error:
            entries.append({"image": prediction.image, "error": prediction.error, "pictures": []})
            continue
        name = _file_name(prediction.image, taken)
        files = [f"{name}.{number}.png" if number else f"{name}.png" for number in range(len(prediction.pictures))]
        for file, picture in zip(files, prediction.pictures, strict=True):
            storage.write(storage.join(folder, file), sheet(picture))
        entries.append({"image": prediction.image, **prediction.facts, "pictures": files})
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": model.weights.where,
        "stage": model.name,
        "weights": model.weights.description,
        "options": model.weights.options,
        "classes": list(model.classes),
        "images": entries,
    }
    if any("detections" in entry for entry in entries):
        storage.write(storage.join(folder, COCO_RESULTS), (json.dumps(coco_results(entries)) + "\n").encode())
    url = storage.join(folder, DOCUMENT)
    storage.write(url, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return PredictionFiles(document, url)


def coco_results(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Detections as COCO's tools read them. An image is named by the number its file is called, as COCO's are; where
    any file is called otherwise, by its place among the images, from 0.

    Args:
        entries: the `images` of predictions.json.
    """
    stems = [entry["image"].rstrip("/").rpartition("/")[2].partition(".")[0] for entry in entries]
    numbers = [int(stem) for stem in stems] if all(map(str.isdecimal, stems)) else list(range(len(entries)))
    return [
        {"image_id": number, **{key: value for key, value in detection.items() if key != "class"}}
        for number, entry in zip(numbers, entries, strict=True)
        for detection in entry.get("detections", ())
    ]


def _read(stage: Stage, image: ImageInput, name: str, seed: int) -> _ReadImage | str:
    """The image, or why it can't be read."""
    try:
        data = image_bytes(image)
        header = read_header(data)
        sample = RawSample(0, name, {"png" if header.format == "png" else "jpg": data})
        example = stage.view()(sample, derive_seed("predict", seed, name))
        return _ReadImage(name, (header.height, header.width), example)
    except UnreadableSample as error:
        return error.reason


@torch.no_grad()
def _answers(
    stage: Stage, images: Sequence[_ReadImage], question: Config | None, request: PredictRequest
) -> list[Answer]:
    if not images:
        return []
    batch = _batch(images, request.seed).to(ranks.device())
    answers = [Answer({}) for _ in images] if question is None else stage.answer(batch, question)
    options = stage.options
    if not request.attention or not isinstance(options, ImageOptions):
        return answers
    assert batch.images is not None
    try:
        maps = attention_pictures(stage.trunk, batch.images, options.pixels, request.block)
    except ValueError as error:
        raise ConfigError(str(error), where="block", fix="ask for another block") from error
    return [answer._replace(pictures=(*answer.pictures, map_)) for answer, map_ in zip(answers, maps, strict=True)]


def _batch(images: Sequence[_ReadImage], seed: int) -> Batch:
    seeds = [derive_seed("predict", seed, image.name) for image in images]
    examples = [image.example for image in images]
    return collate(examples, list(range(len(images))), seeds, [1.0] * len(images), 0)


def _file_name(image: str, taken: set[str]) -> str:
    """A file name for an image's pictures, which no other image has."""
    stem = image.rstrip("/").rpartition("/")[2].partition("?")[0]
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in stem).strip(".") or "image"
    name, number = stem.rpartition(".")[0] or stem, 2
    candidate = name
    while candidate in taken:
        candidate, number = f"{name}-{number}", number + 1
    taken.add(candidate)
    return candidate
