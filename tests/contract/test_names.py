"""Names say what they hold, and stand for one thing: words that say nothing aren't used, class names stand once."""

from __future__ import annotations

import ast
import collections
from collections.abc import Iterator

import pytest

from tests.contract.test_imports import ROOT, source_files

EMPTY_WORDS = {"found", "told", "one", "own", "given", "kept", "here"}
"""Of variables and parameters: each stood for a dozen unlike things before it was given up."""


def empty_names(source: str) -> Iterator[str]:
    """Variables, parameters and functions whose name says nothing."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in EMPTY_WORDS:
            yield f"line {node.lineno}: {node.id}"
        elif isinstance(node, ast.arg) and node.arg in EMPTY_WORDS:
            yield f"line {node.lineno}: {node.arg}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.strip("_") in EMPTY_WORDS:
            yield f"line {node.lineno}: {node.name}"


def test_variables_are_called_after_what_they_hold() -> None:
    empty = {str(path.relative_to(ROOT)): list(empty_names(path.read_text())) for path in source_files()}
    assert not {name: names for name, names in empty.items() if names}


@pytest.mark.parametrize(
    "source", ["found = 1", "for one in x: pass", "def f(own): pass", "def _told(): pass", "y = [here for here in x]"]
)
def test_a_planted_empty_name_is_found(source: str) -> None:
    assert list(empty_names(source))


def test_a_class_name_stands_once() -> None:
    places: dict[str, list[str]] = collections.defaultdict(list)
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not {name: lines for name, lines in places.items() if len(lines) > 1}


MOST_PARAMETERS, MOST_OPTIONS = 12, 16
"""Of a function, and of a verb of the command line, each of whose parameters is an option."""


def test_signatures_stay_readable() -> None:
    long = {}
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
                if count > (MOST_OPTIONS if path.is_relative_to(ROOT / "launch" / "cli") else MOST_PARAMETERS):
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = count
    assert not long
