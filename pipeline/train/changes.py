"""Which settings of a run that has begun were changed, though what it learns depends on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline import config as configs
from pipeline.config import Config, Document, keys_that_change
from pipeline.errors import ConfigError, UserError
from pipeline.run_dir import RunDir
from pipeline.train.config import TrainConfig


def check_unchanged(run_dir: RunDir, document: Document, options_class: type[Config]) -> None:
    """Compare a configuration with that of the run in a directory, once the run has begun.

    The earlier one may have been written by an earlier version: former keys are taken under today's names, and those
    that didn't exist have their defaults.

    Args:
        document: a `TrainConfig`, dumped.
        options_class: of the stage.

    Raises:
        ConfigError: a setting differs that isn't marked `ChangesOnResume`.
    """
    earlier = run_dir.config()
    if earlier is None or not run_dir.status().get("attempt"):  # refused before its first attempt: nothing to protect
        return
    may_change = [*keys_that_change(TrainConfig), *keys_that_change(options_class, "options.")]
    changed = [
        f"{key}: {_shown(old)} -> {_shown(new)}"
        for key, old, new in _differences(_completed(earlier, options_class), _completed(document, options_class))
        if not any(key == changeable or key.startswith(f"{changeable}.") for changeable in may_change)
    ]
    if changed:
        raise ConfigError(
            "the run exists with another configuration (" + "; ".join(changed) + ")",
            where=run_dir.url,
            fix="give the new run a name of its own (name=...), or undo the change to resume this one",
        )


def _completed(document: Document, options_class: type[Config]) -> Document:
    """A configuration under today's keys, with all defaults; as it is where it isn't valid any more."""
    completed = _dumped(TrainConfig, document)
    return {**completed, "options": _dumped(options_class, completed.get("options", {}))}


def _dumped(cls: type[Config], document: Document) -> Document:
    try:
        return configs.validate(cls, document, where="config.yaml").model_dump(mode="json")
    except UserError:
        return document


def _differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        differing = []
        for key in [*old, *(key for key in new if key not in old)]:
            differing += _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        return differing
    old, new = _as_lists(old), _as_lists(new)
    return [] if old == new else [(prefix, old, new)]


def _as_lists(value: Any) -> Any:
    """Tuples as lists, as YAML has it."""
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False, default=str)
