"""Errors of the library, which name arguments, as the command says them, which has options."""

from __future__ import annotations

import pytest

from launch.replies import mapping_of, options_named
from pipeline.errors import CheckpointError, ConfigError, UserError


@pytest.mark.parametrize(
    ("error", "where", "fix"),
    [
        (ConfigError("x", where="question.texts", fix="give texts"), "--ask.texts", "give texts"),
        (ConfigError("x", where="question: head", fix="y"), "--ask: head", "y"),
        (ConfigError("x", where="train", fix="say where it is"), "--train", "say where it is"),
        (CheckpointError("x", where="run", fix="pass attention=True, or z"), "run", "add --attention, or z"),
        (ConfigError("x", where="training", fix="leave weights out"), "training", "leave --weights out"),
        (ConfigError("x", where="a", fix="give a data set"), "a", "give a data set: FOLDER or NAME=FOLDER"),
    ],
)
def test_arguments_become_options(error: UserError, where: str, fix: str) -> None:
    with pytest.raises(type(error)) as raised, options_named():
        raise error
    assert (raised.value.where, raised.value.fix) == (where, fix)


def test_items_become_nested_values() -> None:
    assert mapping_of(["model.size=B", "model.depth=2", "texts=[a cat]"]) == {
        "model": {"size": "B", "depth": 2}, "texts": ["a cat"]
    }  # fmt: skip
    with pytest.raises(ConfigError, match="key=value"):
        mapping_of(["heads"])
