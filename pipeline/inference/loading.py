"""From a run, a weight file of ours or one of another project to a stage that is ready for use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline import config as configs
from pipeline import convert, ranks, storage
from pipeline.classes import checkpoint_classes
from pipeline.config import Document
from pipeline.convert.files import PICKLES, SAFETENSORS
from pipeline.convert.weights import Format, Weights, build
from pipeline.errors import CheckpointError, ConfigError
from pipeline.run_dir import RunDir
from pipeline.stages.base import Stage
from pipeline.train.checkpoints.restore import WHICH, read_saved

NATIVE = "vitrail"
"""Our own format, which a source has that isn't said to be of another."""


class Model(NamedTuple):
    """A trained stage, fp32, in eval mode, on this process's device.

    Attributes:
        stage: a torch module; its `predict`, `answer` and `evaluations` are the stage's.
        weights: where they come from, the stage's name and options, its classes; `state` are the stage's own tensors.
    """

    stage: Stage
    weights: Weights

    @property
    def name(self) -> str:
        """The stage's name in `pipeline.stages.STAGES`."""
        return self.weights.stage

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes it learnt, () for none."""
        return self.weights.classes

    @property
    def complete(self) -> bool:
        """Whether the weights held all of the stage, rather than its trunk alone."""
        return is_complete(self.stage, self.weights)


def load(
    source: str,
    format: str | None = None,
    known: Mapping[str, Any] = {},
    options: Mapping[str, Any] = {},
    weights: str = "auto",
) -> Model:
    """The stage of a run's newest checkpoint, of a weight file of ours, or of another project's.

        >>> model = vitrail.load("runs/mae")
        >>> model.name
        'mae'

    Args:
        source: a run directory, one checkpoint's folder, or a weight file or folder; local or s3://.
        format: one of `pipeline.convert.FORMATS`; None for a run or a file of ours.
        known: what the file's tensors can't tell, such as {"heads": 12}; see `pipeline.convert.weights.Known`.
        options: changes of the stage's options by dotted key, such as {"model.image_size": 384}.
        weights: of a run: "ema" for the moving average, "raw" as trained, "auto": the average where there is one.

    Raises:
        CheckpointError: the source can't be read, or its weights don't fit the changed options.
        ConfigError: an option is wrong, or something must be known.
    """
    return build_model(change_options(read_source_weights(source, format, known, weights), options))


def build_model(weights: Weights) -> Model:
    """The stage with these weights, on this process's device."""
    stage, _ = build(weights)
    stage = stage.to(ranks.device())
    held = {name: value.detach() for name, value in stage.state_dict().items() if name.startswith(weights.parts)}
    return Model(stage, weights._replace(state=held))


def is_complete(stage: Stage, weights: Weights) -> bool:
    """Whether weights hold all of a stage."""
    return all(name.startswith(weights.parts) for name in stage.state_dict())


def read_source_weights(
    source: str, format: str | None = None, known: Mapping[str, Any] = {}, which: str = "auto"
) -> Weights:
    """The weights of a run's newest valid checkpoint, or of a file; for the arguments see `load`.

    Raises:
        CheckpointError: the source can't be read.
        ConfigError: no such format, or a fact that is wrong or missing.
    """
    if format is None and is_run(source):
        return run_weights(source, which)
    if which != "auto":
        raise ConfigError("only a run keeps a moving average", where=source, fix="leave weights out")
    form = convert.format_named(format or NATIVE)
    check_known(known, form)
    return convert.read(source, form.name, **known)


def is_run(url: str) -> bool:
    """Whether `url` is a run directory, or one checkpoint of a run, rather than a weight file or folder."""
    return not url.endswith((SAFETENSORS, *PICKLES)) and any(
        storage.exists(storage.join(url, name)) for name in ("status.json", "commit.json")
    )


def run_weights(url: str, which: str = "auto") -> Weights:
    """The weights of a run's newest valid checkpoint, or of the one checkpoint whose folder `url` is. Needs no GPU.

    Args:
        which: "ema" for the moving average, "raw" for the weights as trained, "auto": the average where there is one.

    Raises:
        CheckpointError: it has none (or no moving average, when that is asked for), or no configuration.
    """
    if which not in WHICH:
        raise ConfigError(f"no weights {which!r}", where="weights", fix=f"use one of {', '.join(WHICH)}")
    saved = read_saved(url, WHICH[which])
    config = RunDir(url).config() or {**saved.info, "data": {"train": saved.info.get("train", "")}}
    if "stage" not in config or "options" not in config:
        raise CheckpointError("nothing here names the stage and its options", where=url, fix="give a run directory")
    classes = checkpoint_classes(config, saved.info, saved.tensors, where=saved.url)
    options = dict(config.get("options") or {})
    return Weights(url, str(config["stage"]), options, saved.tensors, classes, description=saved.describe())


def check_known(known: Mapping[str, Any], *formats: Format) -> None:
    """Raise ConfigError for a fact that means nothing in any of these formats."""
    takes = list(dict.fromkeys(name for form in formats for name in form.takes))
    names = " to ".join(repr(form.name) for form in formats)
    for name in known:
        if name not in takes:
            between = f"from format {names}" if len(formats) > 1 else f"in format {names}"
            raise ConfigError(
                f"{name!r} means nothing {between}", where="known", fix=f"it takes {', '.join(takes) or 'none'}"
            )


def change_options(weights: Weights, changes: Mapping[str, Any]) -> Weights:
    """The weights with changed options of their stage, by dotted key. A table of positions keeps the grid it was
    trained for when the image's size changes.
    """
    if not changes:
        return weights
    before = weights.options
    options: Document = dict(before)
    for key, value in changes.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        options = configs.merge(options, nested)
    old_model, model = before.get("model", {}), options.get("model", {})
    if model.get("image_size") != old_model.get("image_size") and model.get("position_image_size") is None:
        options["model"] = {**model, "position_image_size": old_model.get("image_size", 224)}
    return weights._replace(options=options)
