"""Class names and prompt templates for zero-shot classification, including open_clip's."""

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


def templates(configured: str | Sequence[str]) -> tuple[str, ...]:
    """The templates themselves, or open_clip's by name: `openai_imagenet` (80 of them), `simple_imagenet` (7).

    Raises:
        ConfigError: no list of that name.
    """
    if not isinstance(configured, str):
        return tuple(configured)
    if configured not in TEMPLATES:
        raise ConfigError(
            f"no list of templates is called {configured!r}",
            where="options.templates",
            fix=f"use one of {', '.join(TEMPLATES)}, or list the prompts, each with {{}} for the class",
        )
    return tuple(template("{}") for template in getattr(_metadata(), TEMPLATES[configured]))


def class_names(configured: str | Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """The class names used in prompts, in the order of the labels.

    Args:
        configured: the names; or `imagenet` for open_clip's 1000; or a file with one name a line or a JSON list; empty
            for the data's names.
        labels: the data's names; () when it has no labels.

    Raises:
        ConfigError: there are more or fewer names than classes, or no such file.
    """
    if not configured or not labels:
        return tuple(labels)
    names, where = _names(configured)
    if len(names) != len(labels):
        raise ConfigError(
            f"{len(names)} names for the data's {len(labels)} classes",
            where=f"options.class_names: {where}",
            fix="give one name for each class, in the order of the labels",
        )
    return names


def names_of_sets(
    configured: str | Sequence[str] | Mapping[str, str | Sequence[str]], labels: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Each set's class names used in prompts, in the order of its labels; see `class_names`.

    Args:
        configured: as `class_names` takes it, for sets that all have the same labels; or a mapping by set, where sets
            that aren't listed keep the names of their data.
        labels: the data's names for each set; () for a set without labels. The key "" stands for any set.

    Raises:
        ConfigError: see `class_names`; or one list of names was configured for sets with different classes.
    """
    if isinstance(configured, Mapping):
        strange = sorted(configured.keys() - labels.keys())
        if strange and "" not in labels:
            log.warning("options.class_names: no evaluation set is called %s", " or ".join(strange))
        return {name: class_names(configured.get(name, ()), set_labels) for name, set_labels in labels.items()}
    lists = {tuple(set_labels): name for name, set_labels in labels.items() if set_labels}
    if configured and len(lists) > 1:
        sets = " and ".join(sorted(lists.values()))
        raise ConfigError(
            f"one list of names, but sets {sets} have different classes",
            where="options.class_names",
            fix="give names by set, `{SET: imagenet}`; sets left out keep the names of their data",
        )
    return {name: class_names(configured, set_labels) for name, set_labels in labels.items()}


def _names(configured: str | Sequence[str]) -> tuple[tuple[str, ...], str]:
    if not isinstance(configured, str):
        return tuple(configured), "the list"
    if configured == IMAGENET:
        return tuple(_metadata().IMAGENET_CLASSNAMES), IMAGENET
    try:
        content = storage.read(configured).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "no such file", where=f"options.class_names: {configured}", fix=f"check the path, or use {IMAGENET}"
        ) from None
    if not configured.endswith(".json"):
        return tuple(line.strip() for line in content.splitlines() if line.strip()), configured
    names = json.loads(content)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            "the file holds no list of names",
            where=f"options.class_names: {configured}",
            fix='write ["cat", "dog", ...]',
        )
    return tuple(names), configured


@functools.cache
def _metadata() -> Any:
    """open_clip's module `zero_shot_metadata`."""
    return open_clip_file("zero_shot_metadata")
