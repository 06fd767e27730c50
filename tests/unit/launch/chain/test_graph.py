"""How a chain's YAML is read: references, matrix, order, fingerprints, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launch.chain.graph import Chain, load_chain
from pipeline.errors import ConfigError

PREP = {"kind": "prep", "config": {"source": {"url": "pairs.csv"}}}
TRAIN = {"kind": "train", "config": {"stage": "mae", "data": {"train": "@pairs/train"}}}


def chain(folder: Path, document: dict[str, Any], *overrides: str, **places: str) -> Chain:
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return load_chain(str(path), overrides, **{"work": "w", **places})


def test_a_reference_stands_for_the_output_and_puts_the_step_after_the_other(tmp_path: Path) -> None:
    probe = {"kind": "train", "config": {"data": {"train": "@pairs/train"}, "init_from": "@mae"}}
    loaded = chain(tmp_path, {"steps": {"probe": probe, "mae": TRAIN, "pairs": PREP}})
    assert list(loaded.steps) == ["pairs", "mae", "probe"]
    assert loaded.steps["probe"].document["data"]["train"] == "w/store/data/pairs/train"
    assert loaded.steps["probe"].document["init_from"] == "w/runs/mae"
    assert loaded.steps["probe"].after == {"pairs", "mae"}


def test_checkpoints_go_to_the_store_when_it_is_remote(tmp_path: Path) -> None:
    document = {"steps": {"pairs": PREP, "mae": TRAIN}}
    remote = chain(tmp_path, document, store="s3://bucket/x").steps
    assert remote["mae"].document["checkpoint"] == {"url": "s3://bucket/x/checkpoints/mae"}
    assert remote["pairs"].document["output"] == "s3://bucket/x/data/pairs"
    assert "checkpoint" not in chain(tmp_path, document).steps["mae"].document


def test_set_takes_dotted_keys_and_mappings(tmp_path: Path) -> None:
    step = {**TRAIN, "set": {"optim.lr": 0.1, "data": {"global_batch": 8}}}
    document = chain(tmp_path, {"steps": {"pairs": PREP, "mae": step}}).steps["mae"].document
    assert document["optim"] == {"lr": 0.1}
    assert document["data"] == {"train": "w/store/data/pairs/train", "global_batch": 8}


def test_command_line_overrides_reach_into_a_node(tmp_path: Path) -> None:
    loaded = chain(tmp_path, {"steps": {"pairs": PREP}}, "steps.pairs.set.shard.samples=7")
    assert loaded.steps["pairs"].document["shard"] == {"samples": 7}


def test_a_steps_file_is_found_beside_the_chain(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("source: {url: here.csv}\n")
    loaded = chain(tmp_path, {"steps": {"pairs": {"kind": "prep", "config": "mine.yaml"}}})
    assert loaded.steps["pairs"].document["source"] == {"url": "here.csv"}


def test_a_matrix_repeats_steps_and_binds_references_to_the_same_values(tmp_path: Path) -> None:
    mae = {**TRAIN, "matrix": ["seed"], "set": {"seed": "$seed"}}
    probe = {"kind": "train", "matrix": ["seed", "lr"], "config": {"init_from": "@mae", "optim": {"lr": "$lr"}}}
    report = {"kind": "report", "config": {"runs": {"all": "@mae", "data": "@pairs"}}}
    loaded = chain(
        tmp_path,
        {"matrix": {"seed": [0, 1], "lr": [0.5]}, "steps": {"pairs": PREP, "mae": mae, "probe": probe, "out": report}},
    )
    assert set(loaded.steps) == {"pairs", "mae-seed0", "mae-seed1", "probe-seed0-lr0.5", "probe-seed1-lr0.5", "out"}
    assert loaded.steps["mae-seed1"].document["seed"] == 1
    assert loaded.steps["probe-seed1-lr0.5"].document["init_from"] == "w/runs/mae-seed1"
    assert loaded.steps["probe-seed1-lr0.5"].document["optim"] == {"lr": 0.5}
    assert loaded.steps["out"].document["runs"] == {
        "all": ["w/runs/mae-seed0", "w/runs/mae-seed1"],
        "data": "w/store/data/pairs",
    }


@given(st.permutations(["a", "b", "c", "d"]))
def test_steps_come_after_what_they_refer_to_however_the_file_orders_them(
    tmp_path_factory: Any, order: list[str]
) -> None:
    refers = {"a": [], "b": ["@a"], "c": ["@a"], "d": ["@b", "@c"]}
    steps = {name: {"kind": "report", "config": {"runs": refers[name]}} for name in order}
    names = list(chain(tmp_path_factory.mktemp("chain"), {"steps": steps}).steps)
    assert all(names.index(other[1:]) < names.index(name) for name, others in refers.items() for other in others)


def test_a_fingerprint_follows_the_configuration_and_that_of_steps_before_but_not_places(tmp_path: Path) -> None:
    document = {"steps": {"pairs": PREP, "mae": TRAIN}}
    first = chain(tmp_path, document).steps
    elsewhere = chain(tmp_path, document, work="other", store="s3://bucket").steps
    changed = chain(tmp_path, document, "steps.pairs.set.seed=1").steps
    later = chain(tmp_path, document, "steps.mae.set.seed=1").steps
    assert first["mae"].fingerprint == elsewhere["mae"].fingerprint
    assert first["pairs"].fingerprint != changed["pairs"].fingerprint
    assert first["mae"].fingerprint != changed["mae"].fingerprint
    assert first["pairs"].fingerprint == later["pairs"].fingerprint
    assert first["mae"].fingerprint != later["mae"].fingerprint


def test_doing_a_step_over_takes_everything_built_on_it(tmp_path: Path) -> None:
    report = {"kind": "report", "config": {"runs": {"m": "@mae"}}}
    loaded = chain(tmp_path, {"steps": {"pairs": PREP, "mae": TRAIN, "out": report}})
    assert loaded.downstream(["mae"]) == {"mae", "out"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"steps": {"a": {"kind": "tain"}}}, r"steps\.a\.kind"),
        ({"steps": {"a": {"kind": "train", "rank": 2}}}, r"unknown key 'rank'.*did you mean 'ranks'"),
        ({"steps": {"a": {"kind": "train", "ranks": "two"}}}, r"steps\.a\.ranks.*'two'"),
        ({"steps": {"pairs": PREP, "a": {"kind": "train", "config": {"x": "@pair/train"}}}}, r"did you mean 'pairs'"),
        ({"steps": {"a b": PREP}}, "no valid step name"),
        ({"steps": {"a": {**PREP, "matrix": ["seeds"]}}, "matrix": {"seed": [1]}}, r"no axis 'seeds'.*'seed'"),
        ({"steps": {"a": {"kind": "train", "config": "none.yaml"}}}, "no such file"),
        ({"steps": {}}, "steps"),
        ({"step": {}}, "did you mean 'steps'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chain(tmp_path, document)


def test_a_circle_is_named(tmp_path: Path) -> None:
    steps = {
        "a": {"kind": "train", "config": {"init_from": "@b"}},
        "b": {"kind": "train", "config": {"init_from": "@a"}},
    }
    with pytest.raises(ConfigError, match=r"wait for each other: (a -> b -> a|b -> a -> b)"):
        chain(tmp_path, {"steps": steps})


@pytest.mark.parametrize("name", ["demo/demo", "demo/quick", "demo/own", "demo/own_quick", "chains/study"])
def test_shipped_chains_are_sound(name: str, repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pipeline.config import validate
    from pipeline.report.spec import ReportSpec
    from pipeline.train.config import TrainConfig

    monkeypatch.chdir(tmp_path)  # the file comes out of the installed package
    loaded = load_chain(f"configs/{name}.yaml")
    for step in loaded.steps.values():
        if step.kind == "train":
            validate(TrainConfig, step.document, where=step.where)
        if step.kind == "report":
            validate(ReportSpec, step.document, where=step.where)


def test_steps_stand_in_the_files_order_where_nothing_forbids_it(tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(
        "steps:\n"
        "  second: {kind: report, config: {title: x, runs: {a: '@first'}}}\n"
        "  first: {kind: scenes}\n"
        "  third: {kind: scenes}\n"
    )
    assert list(load_chain(str(path), work=str(tmp_path / "work")).steps) == ["first", "second", "third"]


@pytest.mark.parametrize("steps", ["nodes", "steps"])
@pytest.mark.parametrize("override", ["nodes.mae.set.length_samples=1000", "steps.mae.set.length_samples=1000"])
def test_an_override_wins_whichever_name_file_and_override_use(tmp_path: Path, steps: str, override: str) -> None:
    document = {steps: {"pairs": PREP, "mae": {**TRAIN, "set": {"length_samples": 500}}}}
    assert chain(tmp_path, document, override).steps["mae"].document["length_samples"] == 1000


@pytest.mark.parametrize("written", [{"workers": 3, "nodes": 2}, {"ranks": 3, "machines": 2}])
@pytest.mark.parametrize("names", [("workers", "nodes"), ("ranks", "machines")])
def test_ranks_and_machines_are_overridden_under_either_name(
    tmp_path: Path, written: dict[str, int], names: tuple[str, str]
) -> None:
    document = {"steps": {"pairs": PREP, "mae": {**TRAIN, **written}}}
    changed = chain(tmp_path, document, f"steps.mae.{names[0]}=5", f"nodes.mae.{names[1]}=4")
    assert changed.steps["mae"].request[:2] == (4, 5)
