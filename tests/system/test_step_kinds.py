"""Steps of a chain that train nothing: index, eval, convert and export, on real tars and weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from launch.chain.graph import load_chain
from launch.chain.kinds import KINDS, step_kind
from launch.chain.kinds.base import ChainFolders
from launch.chain.records import ChainStepResult
from launch.chain.runner import ChainRunner
from launch.display import PlainDisplay
from launch.stopping import StopRequest
from pipeline import convert
from pipeline.config import validate
from pipeline.data.manifest import read_manifest
from pipeline.errors import ConfigError
from pipeline.stages import stage_class
from pipeline.stages.base import DataFacts
from tests.support.sam_batches import tiny_stage
from tests.support.stage_trial import TINY
from tests.support.tar_sets import pair_members, write_tar


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Tars of labelled pairs, and weights of two stages."""
    for number in range(2):
        write_tar(tmp_path / "tars" / f"{number}.tar", pair_members(8 * number, 8, label=True))
    torch.manual_seed(0)
    cls = stage_class("mae")
    mae = cls(validate(cls.options_class, TINY["mae"], where="test"), DataFacts())
    convert.save(mae, str(tmp_path / "mae.safetensors"), "vitrail")
    convert.save(tiny_stage(), str(tmp_path / "sam.safetensors"), "vitrail")
    return tmp_path


def run(place: Path, steps: dict[str, object], *redo: str) -> dict[str, ChainStepResult]:
    (place / "chain.yaml").write_text(yaml.safe_dump({"steps": steps}))
    chain = load_chain(str(place / "chain.yaml"), work=str(place / "work"))
    return ChainRunner(chain, stop=StopRequest(), display=PlainDisplay()).run(redo)


def test_tars_are_indexed_weights_measured_on_them_and_written_in_another_format(place: Path) -> None:
    steps: dict[str, object] = {
        "tars": {"kind": "index", "config": {"url": str(place / "tars")}},
        "neighbours": {
            "kind": "eval",
            "config": {
                "source": str(place / "mae.safetensors"),
                "sets": {"again": "@tars"},
                "train": "@tars",
                "knn": {"k": 1},
            },
        },
        "copy": {"kind": "convert", "config": {"source": str(place / "mae.safetensors")}},
    }
    results = run(place, steps)
    assert {name: result.state for name, result in results.items()} == dict.fromkeys(steps, "done"), results
    assert read_manifest(results["tars"].output).num_samples == 16
    assert not (place / "tars" / "manifest.json").exists(), "the tars' own folder is left as it was"
    written = json.loads(Path(results["neighbours"].output).read_text())
    assert written["figures"] == results["neighbours"].summary["figures"]
    assert written["figures"]["again/knn_top1"] == 1.0, "each sample's nearest neighbour in the same set is itself"
    ours, again = (convert.load(str(path), "vitrail") for path in (place / "mae.safetensors", results["copy"].output))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())
    assert {result.state for result in run(place, steps).values()} == {"skipped"}
    redone = run(place, steps, "tars")
    assert {n: result.state for n, result in redone.items()} == {
        "tars": "done",
        "neighbours": "done",
        "copy": "skipped",
    }


@pytest.mark.slow
def test_segment_anything_is_exported(place: Path) -> None:
    results = run(place, {"graphs": {"kind": "export", "config": {"source": str(place / "sam.safetensors")}}})
    assert results["graphs"].state == "done", results
    names = {path.name for path in Path(results["graphs"].output).iterdir()}
    assert names >= {"encoder.onnx", "decoder.onnx", "sam.json"}


def test_a_step_that_writes_where_its_own_configuration_says_is_not_deleted(place: Path) -> None:
    to = place / "mine"
    steps: dict[str, object] = {"tars": {"kind": "index", "config": {"url": str(place / "tars"), "to": str(to)}}}
    assert run(place, steps)["tars"].state == "done"
    with pytest.raises(ConfigError, match="writes where its own configuration says"):
        run(place, steps, "tars")
    assert (to / "manifest.json").is_file()


def test_an_unknown_kind_names_the_nearest(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"no kind of step 'indx'.*did you mean 'index'"):
        run(place, {"tars": {"kind": "indx"}})


@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_says_where_it_writes(name: str, tmp_path: Path) -> None:
    kind = step_kind(name)
    folders = ChainFolders(tmp_path / "work", str(tmp_path / "store"))
    document = kind.complete("step", {"source": "weights", "url": "tars"}, folders)
    output = kind.output("step", document, folders)
    assert Path(output).is_relative_to(tmp_path)
    assert kind.may_delete("step", document, folders)
