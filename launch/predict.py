"""Looking at what a trained stage makes of images: pictures, and facts as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from launch.convert import is_run, run_weights
from launch.images import find_images, read_image
from pipeline import config as configs
from pipeline import convert, ranks, storage
from pipeline.convert.weights import Weights, build
from pipeline.data.batch import Example, RawSample, collate, derive_seed
from pipeline.data.images.decode import UnreadableSample, read_header
from pipeline.errors import CheckpointError, ConfigError
from pipeline.pictures.attention import attention_pictures
from pipeline.pictures.picture import Picture
from pipeline.report.sheet import sheet
from pipeline.stages.base import Stage
from pipeline.stages.images import ImageOptions
from pipeline.stages.questions import QUESTION, Answer

FORMAT, FORMAT_VERSION = "vitrail.predictions", 1
DOCUMENT = "predictions.json"
COCO_RESULTS = "coco_results.json"


class Asked(NamedTuple):
    """What is wanted of a prediction beside the images."""

    settings: Sequence[str] = ()  # key=value changes of the stage's options
    questions: Sequence[str] = ()  # key=value answers to the stage's `question`
    attention: bool = False
    block: int = -1
    batch: int = 16
    seed: int = 0
    which: str = "auto"  # of a run's weights, see `run_weights`


class Shown(NamedTuple):
    """An image that could be read."""

    url: str
    size: tuple[int, int]  # height, width in pixels
    example: Example


def load_stage(
    source: str,
    source_format: str | None = None,
    known: Sequence[str] = (),
    settings: Sequence[str] = (),
    which: str = "auto",
) -> tuple[Stage, Weights]:
    """The stage of a run's newest checkpoint, of a file of ours, or of another project's; fp32, in eval mode, on this
    process's device.

    Args:
        source_format: None for a run or a file of ours.
        known: name=value items that the file's tensors don't tell.
        settings: key=value changes of the stage's options.
        which: of a run's weights, see `run_weights`.

    Raises:
        CheckpointError: the source can't be read, or its weights don't fit the changed options.
        ConfigError: an option is wrong, or something must be known.
    """
    weights = read_weights_of(source, source_format, known, which)
    if settings:
        weights = weights._replace(options=changed_options(weights.options, settings))
    stage, _ = build(weights)
    return stage.to(ranks.device()), weights


def predict_images(
    stage: Stage, urls: Sequence[str], asked: Asked, say: Callable[[str], None], *, trunk_only: bool = False
) -> Iterator[tuple[str, dict[str, Any], tuple[Picture, ...]]]:
    """Each image's URL, its facts (`error` for one that can't be read) and its pictures, in the order given.

    Args:
        trunk_only: the rest of the stage is untrained: show attention alone.
    """
    question = configs.validate(stage.question_class, _mapping(asked.questions), where="--ask")
    for start in range(0, len(urls), asked.batch):
        some = urls[start : start + asked.batch]
        read = {url: _read(stage, url, asked.seed) for url in some}
        shown = [one for one in read.values() if isinstance(one, Shown)]
        answers = dict(
            zip(
                (one.url for one in shown), _answers(stage, shown, None if trunk_only else question, asked), strict=True
            )
        )
        for url in some:
            one = read[url]
            if isinstance(one, str):
                say(f"{url}: {one}")
                yield url, {"error": one}, ()
            else:
                facts, pictures = answers[url]
                yield url, {"height": one.size[0], "width": one.size[1], **facts}, pictures


def predict(
    source: str,
    images: Sequence[str],
    out: str,
    asked: Asked,
    say: Callable[[str], None],
    *,
    source_format: str | None = None,
    known: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str], bool]:
    """Write pictures and `predictions.json` on images into a folder.

    Returns:
        The document, lines about each image, and whether every image could be read.

    Raises:
        UserError: weights, options, question or images are wrong.
    """
    urls = find_images(images)
    stage, weights = load_stage(source, source_format, known, asked.settings, asked.which)
    if not _whole(stage, weights) and not asked.attention:
        raise CheckpointError(
            f"only {' and '.join(weights.parts)}* is there, which shows where it looks but predicts nothing",
            where=source,
            fix="add --attention, or give weights with their head or decoder",
        )
    say(f"{weights.stage} from {source}, {weights.told}, {len(urls)} image(s) on {ranks.device().type}")
    told: list[dict[str, Any]] = []
    names: set[str] = set()
    for url, facts, pictures in predict_images(stage, urls, asked, say, trunk_only=not _whole(stage, weights)):
        name = _name(url, names)
        written = []
        for number, picture in enumerate(pictures):
            written.append(f"{name}.png" if number == 0 else f"{name}.{number}.png")
            storage.write(storage.join(out, written[-1]), sheet(picture))
        told.append({"image": url, **facts, "pictures": written})
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": source,
        "stage": weights.stage,
        "weights": weights.told,
        "options": weights.options,
        "classes": list(weights.classes),
        "images": told,
    }
    if any("detections" in one for one in told):
        storage.write(storage.join(out, COCO_RESULTS), (json.dumps(coco_results(told)) + "\n").encode())
    where = storage.join(out, DOCUMENT)
    storage.write(where, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    lines = [_line(one) for one in told]
    return {**document, "written": where}, [*lines, f"written: {where}"], all("error" not in one for one in told)


def read_weights_of(source: str, source_format: str | None, known: Sequence[str], which: str) -> Weights:
    """A run's newest valid weights, or a file's; see `load_stage`."""
    if source_format is None and is_run(source):
        return run_weights(source, which)
    if which != "auto":
        raise ConfigError("only a run keeps a moving average", where=source, fix="leave --weights out")
    form = convert.format_named(source_format or "vitrail")
    facts = _mapping(known)
    for name in facts:
        if name not in form.takes:
            raise ConfigError(
                f"{name!r} means nothing in format {form.name!r}",
                where="--known",
                fix=f"it takes {', '.join(form.takes) or 'none'}",
            )
    return convert.read(source, form.name, **facts)


def changed_options(options: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Options with changes; a table of positions keeps the grid it was trained for when the image's size changes."""
    changed: dict[str, Any] = dict(options)
    for item in settings:
        changed = configs.override(changed, item)
    before, after = options.get("model", {}), changed.get("model", {})
    if after.get("image_size") != before.get("image_size") and after.get("position_image_size") is None:
        native = before.get("image_size", 224)
        changed["model"] = {**after, "position_image_size": native}
    return changed


def coco_results(told: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Detections as COCO's tools read them. An image is named by the number its file is called, as COCO's are; where
    any file is called otherwise, by its place among the images, from 0.
    """
    stems = [one["image"].rstrip("/").rpartition("/")[2].partition(".")[0] for one in told]
    numbers = [int(stem) for stem in stems] if all(map(str.isdecimal, stems)) else list(range(len(told)))
    return [
        {"image_id": number, **{key: value for key, value in found.items() if key != "class"}}
        for number, one in zip(numbers, told, strict=True)
        for found in one.get("detections", ())
    ]


def _whole(stage: Stage, weights: Weights) -> bool:
    return all(name.startswith(weights.parts) for name in stage.state_dict())


def _mapping(items: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        found = configs.override(found, item)
    return found


def _read(stage: Stage, url: str, seed: int) -> Shown | str:
    """The image, or why it can't be read."""
    try:
        data = read_image(url)
        header = read_header(data)
        sample = RawSample(0, url, {"png" if header.format == "png" else "jpg": data})
        return Shown(url, (header.height, header.width), stage.view()(sample, derive_seed("predict", seed, url)))
    except UnreadableSample as error:
        return error.reason


@torch.no_grad()
def _answers(stage: Stage, shown: Sequence[Shown], question: Any, asked: Asked) -> list[Answer]:
    if not shown:
        return []
    seeds = [derive_seed("predict", asked.seed, one.url) for one in shown]
    ids = list(range(len(shown)))
    batch = collate([one.example for one in shown], ids, seeds, [1.0] * len(shown), 0).to(ranks.device())
    try:
        answers = [Answer({}) for _ in shown] if question is None else stage.answer(batch, question)
    except ConfigError as error:
        if error.where.partition(".")[0] != QUESTION:
            raise
        raise ConfigError(error.what, where=error.where.replace(QUESTION, "--ask", 1), fix=error.fix) from error
    options = stage.options
    if not asked.attention or not isinstance(options, ImageOptions):
        return answers
    assert batch.images is not None
    try:
        maps = attention_pictures(stage.trunk, batch.images, options.pixels, asked.block)
    except ValueError as error:
        raise ConfigError(str(error), where="--block", fix="ask for another block") from error
    return [answer._replace(pictures=(*answer.pictures, one)) for answer, one in zip(answers, maps, strict=True)]


def _name(url: str, taken: set[str]) -> str:
    """A file name of the image's own."""
    stem = url.rstrip("/").rpartition("/")[2].partition("?")[0]
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in stem).strip(".") or "image"
    name, number = stem.rpartition(".")[0] or stem, 2
    candidate = name
    while candidate in taken:
        candidate, number = f"{name}-{number}", number + 1
    taken.add(candidate)
    return candidate


def _line(one: Mapping[str, Any]) -> str:
    if "error" in one:
        return f"{one['image']}: {one['error']}"
    told = [f"{key} {value:.4g}" for key, value in one.items() if isinstance(value, float)]
    for key in ("classes", "texts"):
        if one.get(key):
            first = one[key][0]
            told.append(f"{first.get('class', first.get('text'))} ({first['probability']:.1%})")
    if "detections" in one:
        names = [found["class"] for found in one["detections"]]
        told.append(", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "nothing found")
    return f"{one['image']}: {', '.join(told) or 'see the pictures'}"
