"""Translating weights between formats, a run's among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.look import Told
from pipeline import config as configs
from pipeline import convert, storage
from pipeline.classes import checkpoint_classes
from pipeline.convert.files import PICKLES, SAFETENSORS
from pipeline.convert.loading import by_part
from pipeline.convert.weights import Format, Weights, load_table
from pipeline.errors import CheckpointError, ConfigError
from pipeline.run_dir import RunDir
from pipeline.train.checkpoints.restore import WHICH, read_saved

OWN = "vitrail"


def convert_weights(
    source: str, target: str, source_format: str | None, target_format: str, known: Sequence[str], which: str = "auto"
) -> Told:
    """Read weights, of a file or of a run's newest checkpoint, and write them in another format.

    Args:
        source_format: None for a run directory or our own format.
        known: "name=value" items.
        which: of a run's weights, see `run_weights`.

    Raises:
        CheckpointError: the source can't be read.
        ConfigError: a format or a fact is wrong or missing, or the target can't express the model.
    """
    facts: dict[str, Any] = {}
    for item in known:
        facts = configs.override(facts, item)
    form = convert.format_named(source_format or OWN)
    to = convert.format_named(target_format)
    _refuse_strange(facts, form, to)
    if target.rstrip("/") == source.rstrip("/"):
        raise ConfigError("it would overwrite what it reads", where=target, fix="write to another place")
    if is_run(source):
        if form.name != OWN:
            raise ConfigError("that is a run directory of ours", where=source, fix="leave --from out")
        weights = run_weights(source, which)
    elif which != "auto":
        raise ConfigError("only a run keeps a moving average", where=source, fix="leave --weights out")
    else:
        weights = convert.read(source, form.name, **_taken(facts, form))
    table = load_table(weights)
    saved = convert.save(weights, target, to.name, **_taken(facts, to))
    document = {
        "source": source,
        "stage": weights.stage,
        "options": weights.options,
        "weights": weights.told,
        **table._asdict(),
        "dropped": list(saved.dropped),
        "num_written": saved.num_tensors,
        "written": saved.files,
    }
    lines = [f"{weights.stage} from {source}, {weights.told}", *table.lines()]
    if saved.dropped:
        lines.append(f"  {'dropped':8s} {len(saved.dropped):4d}  {by_part(saved.dropped)}")
    return document, [*lines, f"{saved.num_tensors} tensors in format {to.name}: {', '.join(saved.files)}"]


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
        raise ConfigError(f"no weights {which!r}", where="--weights", fix=f"use one of {', '.join(WHICH)}")
    saved = read_saved(url, WHICH[which])
    config = RunDir(url).config() or {**saved.info, "data": {"train": saved.info.get("train", "")}}
    if "stage" not in config or "options" not in config:
        raise CheckpointError("nothing here names the stage and its options", where=url, fix="give a run directory")
    options, state = dict(config.get("options") or {}), saved.tensors
    classes = checkpoint_classes(config, saved.info, state, where=saved.url)
    return Weights(url, str(config["stage"]), options, state, classes, told=saved.describe())


def _taken(facts: dict[str, Any], form: Format) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name in form.takes}


def _refuse_strange(facts: dict[str, Any], form: Format, to: Format) -> None:
    """Facts that mean something on one side are fine; the others are mistakes."""
    takes = [*form.takes, *(name for name in to.takes if name not in form.takes)]
    for name in facts:
        if name not in takes:
            raise ConfigError(
                f"{name!r} means nothing from format {form.name!r} to {to.name!r}",
                where="--known",
                fix=f"it takes {', '.join(takes) or 'none'}",
            )
