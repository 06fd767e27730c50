"""Class names and prompt templates of zero-shot classification, open_clip's among them."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.models.text.open_clip_file import open_clip_file

TEMPLATES = {"openai_imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple_imagenet": "SIMPLE_IMAGENET_TEMPLATES"}
IMAGENET = "imagenet"

log = logging.getLogger("vitrail")


def templates(wanted: str | Sequence[str]) -> tuple[str, ...]:
    """Templates as given, or open_clip's by name: `openai_imagenet` (80 of them), `simple_imagenet` (7).

    Raises:
        ConfigError: no list of that name.
    """
    if not isinstance(wanted, str):
        return tuple(wanted)
    if wanted not in TEMPLATES:
        raise ConfigError(
            f"no list of templates {wanted!r}",
            where="options.templates",
            fix=f"use one of {', '.join(TEMPLATES)}, or list the prompts, each with {{}} for the class",
        )
    return tuple(template("{}") for template in getattr(_metadata(), TEMPLATES[wanted]))


def class_names(wanted: str | Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """What classes are called in prompts, in the order of the labels.

    Args:
        wanted: names; `imagenet` for open_clip's 1000; a file, one name a line or a JSON list; empty for the data's.
        labels: the data's own names; () when it has no labels.

    Raises:
        ConfigError: there are more or fewer names than classes, or no such file.
    """
    if not wanted or not labels:
        return tuple(labels)
    names, where = _names(wanted)
    if len(names) != len(labels):
        raise ConfigError(
            f"{len(names)} names for the data's {len(labels)} classes",
            where=f"options.class_names: {where}",
            fix="give one name for each class, in the order of the labels",
        )
    return names


def names_of_sets(
    wanted: str | Sequence[str] | Mapping[str, str | Sequence[str]], labels: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """What each set's classes are called in prompts, in the order of its labels; see `class_names`.

    Args:
        wanted: as `class_names` takes it, for sets that have the same labels; or by the set's name, the others' classes
            being called as their data call them.
        labels: each set's own names; () of a set that has no labels. "" stands for any set.

    Raises:
        ConfigError: see `class_names`; or one list of names is given for several lists of classes.
    """
    if isinstance(wanted, Mapping):
        strange = sorted(wanted.keys() - labels.keys())
        if strange and "" not in labels:
            log.warning("options.class_names: none of the sets measured is called %s", " or ".join(strange))
        return {name: class_names(wanted.get(name, ()), own) for name, own in labels.items()}
    lists = {tuple(own): name for name, own in labels.items() if own}
    if wanted and len(lists) > 1:
        sets = " and ".join(sorted(lists.values()))
        raise ConfigError(
            f"one list of names, and sets {sets} have classes of their own",
            where="options.class_names",
            fix="give names by set, `{SET: imagenet}`; sets left out keep the names their data give",
        )
    return {name: class_names(wanted, own) for name, own in labels.items()}


def _names(wanted: str | Sequence[str]) -> tuple[tuple[str, ...], str]:
    if not isinstance(wanted, str):
        return tuple(wanted), "the list"
    if wanted == IMAGENET:
        return tuple(_metadata().IMAGENET_CLASSNAMES), IMAGENET
    try:
        content = storage.read(wanted).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "no such file", where=f"options.class_names: {wanted}", fix=f"check the path, or use {IMAGENET}"
        ) from None
    if not wanted.endswith(".json"):
        return tuple(line.strip() for line in content.splitlines() if line.strip()), wanted
    found = json.loads(content)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConfigError("no list of names", where=f"options.class_names: {wanted}", fix='write ["cat", "dog", ...]')
    return tuple(found), wanted


@functools.cache
def _metadata() -> Any:
    """open_clip's `zero_shot_metadata`."""
    return open_clip_file("zero_shot_metadata")
