"""Options, freezing and hooks are part of the Stage contract: nobody reads past it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from torch import nn

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.stages import STAGES, stage_class
from pipeline.stages.base import DataFacts, Stage
from tests.support.stage_trial import CLASSES, TINY

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "data_prep", "launch", "vitrail", "benchmarks")
CONTRACT = {"options", "text_options", "schedule_changes", "frozen", "question_class", "options_class", "class_rows"}
FREEZING: dict[str, tuple[dict[str, Any], str]] = {
    "flip": ({"freeze": ["trunk."]}, "trunk"),
    "probe": ({}, "trunk"),
    "segment": ({"freeze_trunk": True}, "trunk"),
    "sam": ({"freeze": ["trunk", "neck"]}, "trunk"),
}


def breaches(source: str) -> Iterator[str]:
    """Where a source text asks an object by name for what the contract declares, or a stage keeps its options twice."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"getattr", "hasattr"}:
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and name.value in CONTRACT | {"config"}:
                yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.ClassDef) and any("Stage" in ast.unparse(base) for base in node.bases):
            for part in ast.walk(node):
                if isinstance(part, ast.Assign | ast.AnnAssign):
                    targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                    value = ast.unparse(part.value) if part.value is not None else ""
                    if value == "options" and any(isinstance(target, ast.Attribute) for target in targets):
                        yield f"line {part.lineno}: {ast.unparse(part)}"


def test_nobody_reads_a_stages_options_past_the_base() -> None:
    base = ROOT / "pipeline" / "stages" / "base.py"
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path != base]
    assert not [f"{path.relative_to(ROOT)} {breach}" for path in files for breach in breaches(path.read_text())]


@pytest.mark.parametrize(
    "source",
    [
        'options = getattr(stage, "config", None)',
        'changes = getattr(stage, "schedule_changes", ())',
        "class NewStage(Stage[NewOptions]):\n    def __init__(self, options, data):\n        self.config = options",
    ],
)
def test_a_planted_breach_is_found(source: str) -> None:
    assert list(breaches(source))


def build(name: str, **options: Any) -> Stage:
    cls = stage_class(name)
    settings = validate(cls.options_class, TINY[name] | options, where="test")
    return cls(settings, DataFacts(CLASSES, num_samples=48))


@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_keeps_the_options_it_was_built_from(name: str) -> None:
    stage = build(name)
    assert type(stage.options) is stage.options_class


@pytest.mark.parametrize("name", list(FREEZING))
def test_what_is_frozen_is_not_trained_and_works_as_in_evaluation(name: str) -> None:
    options, part = FREEZING[name]
    model = TINY[name]["model"] | {"drop_path": 0.5}
    stage = build(name, **options, model=model).train()
    frozen = [key for key, _ in stage.named_parameters() if not stage.trainable(key)]
    assert any(key.startswith(f"{part}.") for key in frozen)
    assert all(parameter.requires_grad == stage.trainable(key) for key, parameter in stage.named_parameters())
    modules = dict(stage.named_modules())
    assert not any(module.training for key, module in modules.items() if f"{key}.".startswith(f"{part}."))
    assert stage.training
    assert any(module.training for key, module in modules.items() if key and not f"{key}.".startswith(f"{part}."))


def test_a_stage_that_freezes_nothing_trains_everything() -> None:
    stage = build("classify").train()
    assert all(cast("nn.Module", module).training for module in stage.modules())
    assert all(parameter.requires_grad for parameter in stage.parameters())


def test_freezing_what_isnt_there_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no parameter's name begins with 'trnk\.'.*trunk\."):
        build("flip", freeze=["trnk."])


@pytest.mark.parametrize("jitter", [[2.0, 0.5], [0.0, 1.0], [-1.0, 1.0]])
@pytest.mark.parametrize("name", ["vitdet", "segment", "sam"])
def test_a_range_of_jitter_that_makes_no_sense_is_refused(name: str, jitter: list[float]) -> None:
    with pytest.raises(ConfigError, match="jitter must be 0 < low <= high"):
        validate(stage_class(name).options_class, TINY[name] | {"jitter": jitter}, where="test")
