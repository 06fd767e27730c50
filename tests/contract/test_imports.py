"""The architecture, held by walking every import: directions, fences, and names and sizes of files.

Imports inside functions and under `TYPE_CHECKING` count like any other.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "data_prep", "launch", "vitrail", "configs", "benchmarks")

# A room may import its own level and the levels before it. `stages` may not see `convert`, and so on.
DIRECTION: tuple[tuple[str, ...], ...] = (
    ("pipeline.errors",),
    ("pipeline.machine",),
    ("pipeline.ray_cluster",),
    ("pipeline.config",),
    ("pipeline.storage",),
    ("pipeline.pages",),
    ("pipeline.ranks",),
    ("pipeline.run_dir",),
    ("pipeline.data",),
    ("pipeline.models", "pipeline.losses", "pipeline.evaluate"),
    ("pipeline.pictures",),
    ("pipeline.stages",),
    ("pipeline.classes",),
    ("pipeline.convert",),
    ("pipeline.train",),
    ("pipeline.report",),
    ("pipeline.inference", "pipeline.inspection"),
    ("data_prep",),
    ("launch",),
    ("vitrail",),
    ("benchmarks",),
)
LEVEL = {room: level for level, rooms in enumerate(DIRECTION) for room in rooms}

# What data_prep may use of the library: all but these two files stop at pipeline.data.
DATA_PREP_ROOMS = (
    "pipeline.errors",
    "pipeline.machine",
    "pipeline.ray_cluster",
    "pipeline.config",
    "pipeline.storage",
    "pipeline.pages",
    "pipeline.ranks",
    "pipeline.run_dir",
    "pipeline.data",
)
DATA_PREP_FREE = ("data_prep.filters.score", "data_prep.annotate")

# Packages, and modules behind a door of ours, that only the named modules (and what lies under them) may import.
FENCES: dict[str, tuple[str, ...]] = {
    "deepspeed": ("pipeline.train.engine.deepspeed_setup",),
    "ray": ("pipeline.ray_cluster", "data_prep.partitions", "launch"),
    "tensorboard": ("pipeline.train.track",),
    "torch.utils.tensorboard": ("pipeline.train.track",),
    "wandb": ("pipeline.train.track",),
    "mlflow": ("pipeline.train.track",),
    "webdataset": ("pipeline.data", "data_prep.shards.commit", "data_prep.shards.verify"),
    "fsspec": ("pipeline.storage",),
    "s3fs": ("pipeline.storage",),
    "botocore": ("pipeline.storage",),
    "pipeline.storage.local": ("pipeline.storage",),
    "pipeline.storage.s3": ("pipeline.storage",),
    "pipeline.storage.store": ("pipeline.storage",),
    "pipeline.storage.retries": ("pipeline.storage",),
    "jinja2": ("pipeline.pages",),
}

BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
FILE_LINES_WARN, FILE_LINES_MAX, FUNCTION_LINES_MAX = 500, 550, 60


class Import(NamedTuple):
    """One imported module, as an absolute dotted name, where it stands, and whether it was written with dots."""

    importer: str
    target: str
    line: int
    relative: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports_of(source: str, importer: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every import in a source text, `from a import b` as both `a` and `a.b`, since b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, node.lineno, relative=False)
        elif isinstance(node, ast.ImportFrom):
            package = importer.split(".") if is_package else importer.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield Import(importer, base, node.lineno, relative=bool(node.level))
            for alias in node.names:
                yield Import(importer, f"{base}.{alias.name}", node.lineno, relative=bool(node.level))
        elif isinstance(node, ast.Call):
            name = _imported_by_call(node)
            if name is not None:
                yield Import(importer, name, node.lineno, relative=False)


def _imported_by_call(node: ast.Call) -> str | None:
    """`importlib.import_module("x")` and `__import__("x")` with a literal name."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called not in {"import_module", "__import__"} or not node.args:
        return None
    first = node.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def under(module: str, room: str) -> bool:
    """Whether `module` is `room` or lies in it; `room*` matches any module whose name starts so."""
    if room.endswith("*"):
        return module.startswith(room[:-1])
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> str | None:
    return next((room for room in LEVEL if under(module, room)), None)


def broken_rules(found: Import) -> Iterator[str]:
    """What this import breaks, in words."""
    at = f"{found.importer}:{found.line} imports {found.target}"
    if found.relative:
        yield f"{at}: relative imports hide the direction; write the whole name"
    ours, theirs = room_of(found.importer), room_of(found.target)
    if ours and theirs and LEVEL[theirs] > LEVEL[ours]:
        yield f"{at}: {ours} may not import {theirs}, which stands to its right"
    if under(found.importer, "data_prep") and not any(under(found.importer, free) for free in DATA_PREP_FREE):
        inside = under(found.target, "pipeline") and found.target != "pipeline"
        if inside and not any(under(found.target, room) for room in DATA_PREP_ROOMS):
            yield f"{at}: data_prep may use only {', '.join(DATA_PREP_ROOMS)}"
    # Benchmarks take faulty networks and small data from where the tests have them.
    if under(found.target, "tests") and not (under(found.importer, "tests") or under(found.importer, "benchmarks")):
        yield f"{at}: the packages know nothing of their tests"
    for library, allowed in FENCES.items():
        if under(found.target, library) and not any(under(found.importer, room) for room in allowed):
            yield f"{at}: {library} is fenced to {', '.join(allowed)}"


def all_imports() -> Iterator[Import]:
    for path in source_files():
        yield from imports_of(path.read_text(), module_name(path), is_package=path.name == "__init__.py")


def import_graph(imports: Iterable[Import]) -> dict[str, set[str]]:
    """Each module of ours with the ones that it imports."""
    modules = set(map(module_name, source_files()))
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for item in imports:
        if item.target in modules and item.target != item.importer:
            graph.setdefault(item.importer, set()).add(item.target)
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or over others."""
    reached = {module: _reachable(graph, module) for module in graph}
    groups = {
        frozenset(other for other in reached[module] if module in reached.get(other, set()))
        for module in graph
        if module in reached[module]
    }
    return sorted(sorted(group) for group in groups)


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """The modules that `start` imports, directly or over others."""
    seen: set[str] = set()
    pending = [start]
    while pending:
        for target in graph.get(pending.pop(), set()) - seen:
            seen.add(target)
            pending.append(target)
    return seen


def test_every_import_keeps_direction_and_fences() -> None:
    broken = sorted({rule for found in all_imports() if found.importer for rule in broken_rules(found)})
    # The comparison benches measure against other people's packages, fenced ones among them.
    assert not [rule for rule in broken if not (rule.startswith("benchmarks") and "fenced" in rule)]


def test_every_module_of_the_library_stands_in_a_room() -> None:
    """A new folder in pipeline/ must be given its place in the direction before it can be imported."""
    homeless = [name for name in map(module_name, source_files()) if name != "pipeline" and name.startswith("pipeline")]
    assert not [name for name in homeless if room_of(name) is None]


def test_pipeline_itself_imports_nothing_of_ours() -> None:
    """`import pipeline` stays free, so that no import of a low room drags a higher one in."""
    assert not [found for found in all_imports() if found.importer == "pipeline" and room_of(found.target)]


@pytest.mark.parametrize(
    ("importer", "source", "word"),
    [
        ("pipeline.data.loader", "from pipeline.train import loop", "may not import pipeline.train"),
        ("pipeline.stages.mae", "import pipeline.train.loop", "may not import pipeline.train"),
        ("pipeline.losses.masks", "def f():\n    from pipeline import stages", "may not import pipeline.stages"),
        ("pipeline.pictures.patches", "from pipeline.stages.base import Stage", "may not import pipeline.stages"),
        (
            "pipeline.models.trunk.vit",
            "import importlib\nimportlib.import_module('launch.cli')",
            "may not import launch",
        ),
        ("pipeline.data.loader", "from ..train import loop", "relative imports"),
        ("pipeline.run_dir", "from pipeline.data.batch import Batch", "may not import pipeline.data"),
        ("data_prep.build", "from pipeline.models.trunk.vit import ViT", "data_prep may use only"),
        ("pipeline.train.loop", "import deepspeed.ops", "deepspeed is fenced"),
        ("launch.worker", "import deepspeed", "deepspeed is fenced"),
        ("pipeline.train.engine.layout", "import deepspeed", "deepspeed is fenced"),
        ("data_prep.build", "import ray", "ray is fenced"),
        ("pipeline.train.loop", "from torch.utils.tensorboard import SummaryWriter", "is fenced"),
        ("pipeline.stages.mae", "import webdataset as wds", "webdataset is fenced"),
        (
            "pipeline.train.checkpoints.saving",
            "from pipeline.storage.s3 import client",
            "is fenced",
        ),
        ("data_prep.build", "from pipeline.storage import local", "pipeline.storage.local is fenced"),
        ("pipeline.data.images.decode", "import tests.conftest", "know nothing of their tests"),
        (
            "pipeline.data.batch",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pipeline.stages.base import Stage",
            "may not import pipeline.stages",
        ),
    ],
)
def test_a_planted_breach_is_found(importer: str, source: str, word: str) -> None:
    rules = [rule for found in imports_of(source, importer) for rule in broken_rules(found)]
    assert any(word in rule for rule in rules), rules


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("pipeline.stages.mae", "from pipeline.models.trunk.vit import ViT"),
        ("pipeline.train.engine.deepspeed_setup", "import deepspeed"),
        ("pipeline.run_dir", "from pipeline.storage import Entry, read"),
        ("data_prep.partitions", "import ray"),
        ("launch.workers.agent", "import ray"),
        ("launch.cli", "from data_prep.build import build"),
        ("pipeline.models.trunk.vit", "import torch\nfrom pipeline.models.trunk.position import sincos"),
        ("pipeline.train.track", "from torch.utils.tensorboard import SummaryWriter"),
    ],
)
def test_a_rightful_import_passes(importer: str, source: str) -> None:
    assert not [rule for found in imports_of(source, importer) for rule in broken_rules(found)]


def test_no_modules_import_each_other() -> None:
    """A table of names ("module:Class") that are imported when they are picked takes the place of such imports."""
    assert circles(import_graph(all_imports())) == []


@pytest.mark.parametrize(
    "source",
    [
        "from data_prep import build",
        "def f():\n    import data_prep.build",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from data_prep.build import Build",
    ],
)
def test_a_planted_circle_is_found(source: str) -> None:
    planted = imports_of(source, "data_prep.plan.spill")  # which `build` imports over `plan.planning`
    found = circles(import_graph([*all_imports(), *planted]))
    assert len(found) == 1
    assert {"data_prep.build", "data_prep.plan.planning", "data_prep.plan.spill"} <= set(found[0])


def test_files_are_named_after_concepts() -> None:
    assert not [str(path.relative_to(ROOT)) for path in source_files() if path.stem in BANNED_NAMES]
    folders = {folder for path in source_files() for folder in path.relative_to(ROOT).parts[:-1]}
    assert not folders & BANNED_NAMES


def test_files_stay_readable_in_length() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in source_files()}
    for name, lines in lengths.items():
        if lines > FILE_LINES_WARN:
            warnings.warn(f"{name} has {lines} lines: split it by concept", stacklevel=1)
    assert not {name: lines for name, lines in lengths.items() if lines > FILE_LINES_MAX}


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield node.name, lines


def test_functions_stay_readable_in_length() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{name}": lines
        for path in source_files()
        for name, lines in long_functions(path.read_text())
    }
    assert not long


def test_a_long_function_is_found() -> None:
    body = "\n".join(f"    x = {number}" for number in range(FUNCTION_LINES_MAX + 1))
    assert list(long_functions(f"def endless():\n{body}\n")) == [("endless", FUNCTION_LINES_MAX + 2)]
