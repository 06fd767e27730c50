"""The verbs that use trained weights: flags to the library's arguments, results to lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from launch.replies import Reply, SourceFlags, mapping_of, options_named
from pipeline import ranks
from pipeline.convert.loading import by_part
from pipeline.convert.weights import Weights
from pipeline.inference import converting, evaluating, exporting, predicting
from pipeline.inference.evaluating import KnnOptions
from pipeline.inference.images import find_images
from pipeline.inference.loading import build_model, change_options, read_source_weights
from pipeline.inference.predicting import Prediction, PredictRequest

Say = Callable[[str], None]


def predict(
    source: SourceFlags, images: Sequence[str], out: str, request: PredictRequest, say: Say
) -> tuple[dict[str, Any], list[str], bool]:
    """Write pictures and `predictions.json` on images into a folder.

    Returns:
        The document, lines about each image, and whether every image could be read.

    Raises:
        UserError: weights, options, question or images are wrong.
    """
    with options_named():
        urls = find_images(images)
        model = build_model(_weights(source))
        predictions = predicting.predict(model, urls, request)
        on = f"{len(urls)} image(s) on {ranks.device().type}"
        say(f"{model.name} from {source.url}, {model.weights.description}, {on}")
        written = predicting.write_predictions(model, _announced(predictions, say), out)
    entries = written.document["images"]
    lines = [*map(_prediction_line, entries), f"written: {written.url}"]
    return {**written.document, "written": written.url}, lines, all("error" not in entry for entry in entries)


def evaluate(
    source: SourceFlags,
    sets: Sequence[str],
    say: Say,
    *,
    train: str | None = None,
    knn: KnnOptions | None = None,
    batch: int = 64,
    workers: int = 0,
    out: str | None = None,
) -> Reply:
    """Measure weights on data sets, given as URL or name=URL; those of the run's configuration if there are none.

    Args:
        train: URL of the set that evaluations know as "train"; of a run its own, unless given.
        workers: processes that decode; 0: this one.
        out: where to write the document.

    Raises:
        UserError: weights, options or data sets are wrong, or don't fit each other.
    """
    with options_named():
        weights = _weights(source)
        measured_on = evaluating.read_sets(source.url, dict(map(_named_set, sets)), train)
        if measured_on.unreadable:
            say(f"measured without the run's training set, which is out of reach: {measured_on.unreadable}")
        named = {name: manifest for name, manifest in measured_on.manifests.items() if name != "train"}
        on = ", ".join(f"{name} ({manifest.num_samples})" for name, manifest in named.items())
        say(f"{weights.stage} from {source.url}, {weights.description}, on {on}")
        result = evaluating.evaluate(weights, measured_on.manifests, knn=knn, batch=batch, loader_workers=workers)
    lines = [f"{name:<32} {value:.4g}" for name, value in result.figures.items()]
    if not result.figures:
        lines = ["no figures: the data sets lack what the evaluations need (labels, captions)"]
    if out is not None:
        result.write(out)
        lines.append(f"written: {out}")
    return result.document(), lines


def convert(source: SourceFlags, target: str, target_format: str) -> Reply:
    """Read weights, of a file or of a run's newest checkpoint, and write them in another format.

    Raises:
        UserError: see `pipeline.inference.converting.convert`.
    """
    with options_named():
        conversion = converting.convert(
            source.url,
            target,
            target_format,
            source_format=source.format,
            known=mapping_of(source.known),
            weights=source.which,
        )
    weights, saved = conversion.weights, conversion.saved
    lines = [f"{weights.stage} from {source.url}, {weights.description}", *conversion.table.lines()]
    if saved.dropped:
        lines.append(f"  {'dropped':8s} {len(saved.dropped):4d}  {by_part(saved.dropped)}")
    lines.append(f"{saved.num_tensors} tensors in format {conversion.format}: {', '.join(saved.files)}")
    return conversion.document(), lines


def export(source: SourceFlags, target: str) -> Reply:
    """Write ONNX graphs of weights of stage sam into the folder `target`.

    Raises:
        UserError: see `pipeline.inference.exporting.export`.
    """
    with options_named():
        exported = exporting.export(_weights(source), target)
    weights, graphs = exported.weights, exported.graphs
    differences = ", ".join(f"{name} {difference:.1e}" for name, difference in graphs.differences.items())
    lines = [
        f"{weights.stage} from {source.url}, {weights.description}",
        f"largest differences from the model, over the largest values: {differences}",
        f"written: {', '.join(graphs.files)}",
    ]
    return exported.document(), lines


def _weights(source: SourceFlags) -> Weights:
    weights = read_source_weights(source.url, source.format, mapping_of(source.known), source.which)
    return change_options(weights, mapping_of(source.settings))


def _named_set(item: str) -> tuple[str, str]:
    """The name and URL of a data set; one without a name is called like its folder."""
    name, equals, url = item.partition("=")
    if equals and name.isidentifier():
        return name, url
    return item.rstrip("/").rpartition("/")[2] or item, item


def _announced(predictions: Iterable[Prediction], say: Say) -> Iterator[Prediction]:
    for prediction in predictions:
        if prediction.error:
            say(f"{prediction.image}: {prediction.error}")
        yield prediction


def _prediction_line(entry: dict[str, Any]) -> str:
    """An image's facts in one line."""
    if "error" in entry:
        return f"{entry['image']}: {entry['error']}"
    facts = [f"{key} {value:.4g}" for key, value in entry.items() if isinstance(value, float)]
    for key in ("classes", "texts"):
        if entry.get(key):
            likeliest = entry[key][0]
            facts.append(f"{likeliest.get('class', likeliest.get('text'))} ({likeliest['probability']:.1%})")
    if "detections" in entry:
        names = [detection["class"] for detection in entry["detections"]]
        counts = [f"{names.count(name)} {name}" for name in dict.fromkeys(names)]
        facts.append(", ".join(counts) or "nothing found")
    return f"{entry['image']}: {', '.join(facts) or 'see the pictures'}"
