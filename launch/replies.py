"""From flags to the library's arguments and back: values of `KEY=VALUE` items, and errors that name options."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pipeline import config as configs
from pipeline.errors import UserError

Reply = tuple[dict[str, Any], list[str]]
"""What a verb answers: a document for `--json`, and lines for people."""

_OPTIONS = {
    "question": "--ask",
    "known": "--known",
    "weights": "--weights",
    "train": "--train",
    "pooling": "--pooling",
    "block": "--block",
}
"""The library's arguments, where an error may lie, and the command's options for them."""
_ADVICE = {
    "pass attention=True": "add --attention",
    "pass knn=KnnOptions()": "add --knn",
    "leave weights out": "leave --weights out",
    "leave source_format out": "leave --from out",
    "a labelled data set as train": "a labelled data set as --train",
    "give a data set": "give a data set: FOLDER or NAME=FOLDER",
}
"""The library's advice, and what it means on the command line."""


class SourceFlags(NamedTuple):
    """How a command names weights."""

    url: str
    format: str | None = None
    known: Sequence[str] = ()  # name=value items
    settings: Sequence[str] = ()  # key=value changes of the stage's options
    which: str = "auto"  # of a run's weights


def mapping_of(items: Sequence[str]) -> dict[str, Any]:
    """The values of "a.b=c" items, nested by key; each `c` is parsed as YAML.

    Raises:
        ConfigError: an item has another form.
    """
    document: dict[str, Any] = {}
    for item in items:
        document = configs.override(document, item)
    return document


@contextlib.contextmanager
def options_named() -> Iterator[None]:
    """Let errors of the library name the command's options instead of its arguments."""
    try:
        yield
    except UserError as error:
        name = error.where.partition(".")[0].partition(":")[0]
        where = error.where.replace(name, _OPTIONS[name], 1) if name in _OPTIONS else error.where
        fix = error.fix
        for advice, on_command_line in _ADVICE.items():
            if advice in fix and on_command_line not in fix:
                fix = fix.replace(advice, on_command_line)
        if (where, fix) == (error.where, error.fix):
            raise
        raise type(error)(error.what, where=where, fix=fix) from error
