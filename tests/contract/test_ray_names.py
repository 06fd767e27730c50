"""The private names of Ray that pipeline/ray_cluster.py leans on, and that nothing else uses any."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "data_prep", "launch", "vitrail", "benchmarks")
COVERED = {"ray._private.state"}


def private_imports(source: str) -> Iterator[str]:
    """Modules of Ray with an underscore in their path that a source text imports."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] == "ray" and "._" in name)


def test_every_private_name_in_use_is_covered() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert {name for path in files for name in private_imports(path.read_text())} == COVERED


@pytest.mark.parametrize("source", ["from ray._private import state", "import ray._private.worker as worker"])
def test_a_planted_name_is_found(source: str) -> None:
    assert list(private_imports(source))


def test_what_is_free_and_what_drains_is_told_by_machine() -> None:
    from ray._private import state

    assert callable(state.available_resources_per_node)
    assert callable(state.state.get_draining_nodes)
