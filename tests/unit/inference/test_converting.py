"""The verb `convert`: from files and runs to files, and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from pipeline import convert
from pipeline.convert.loading import load_initial
from pipeline.errors import ConfigError, UserError
from pipeline.inference.loading import run_weights
from pipeline.stages import stage_class
from pipeline.stages.base import DataFacts, Stage
from pipeline.stages.classify import ClassifyOptions, ClassifyStage
from pipeline.stages.mae import MaeOptions, MaeStage
from pipeline.train.checkpoints.restore import read_weights
from tests.support.saved_run import save_checkpoint
from tests.support.weight_verbs import convert_weights
from tests.unit.data.conftest import numbered, write_data_set

MODEL = {"width": 48, "depth": 2, "heads": 3, "image_size": 32, "patch_size": 8}
OPTIONS: dict[str, Any] = {"model": MODEL, "decoder": {"width": 32, "depth": 1, "heads": 2}}


@pytest.fixture
def mae() -> MaeStage:
    torch.manual_seed(0)
    return MaeStage(MaeOptions.model_validate(OPTIONS), DataFacts())


def test_a_file_of_one_project_becomes_one_of_another(mae: MaeStage, tmp_path: Path) -> None:
    source, target = str(tmp_path / "mae.pth"), str(tmp_path / "timm.safetensors")
    convert.save(mae, source, "mae")
    known = ["heads=3", "decoder_heads=2", "norm_pix=true"]
    document, lines = convert_weights(source, target, "mae", "timm", known)
    assert document["stage"] == "mae"
    assert document["new"] == []
    assert "decoder.mask_token" in document["dropped"]
    assert document["written"] == [target]
    assert any("dropped" in line and "decoder" in line for line in lines)
    state = safetensors.torch.load_file(target)
    assert len(state) == document["num_written"]
    assert torch.equal(state["blocks.1.attn.qkv.weight"], mae.trunk.blocks[1].attn.qkv.weight)


def test_what_is_new_and_ignored_is_told(mae: MaeStage, tmp_path: Path) -> None:
    convert.save(mae, str(tmp_path / "mae.pth"), "mae")
    document, _ = convert_weights(
        str(tmp_path / "mae.pth"), str(tmp_path / "own.safetensors"), "mae_encoder", "vitrail", ["heads=3"]
    )
    assert all(name.startswith("decoder.") for name in document["new"])
    assert "decoder_pred.weight" in document["ignored"]
    assert {name.partition(".")[0] for name in safetensors.torch.load_file(tmp_path / "own.safetensors")} == {"trunk"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mae", "tim", ["heads=3"]), "'timm'"),
        (("mea", "timm", ["heads=3"]), "'mae'"),
        (("mae", "timm", ["heds=3"]), "'heds' means nothing"),
        (("mae", "timm", ["heads"]), "key=value"),
        (("mae", "timm", ["heads=many"]), "heads"),
        (("mae", "timm", []), "heads and decoder_heads and norm_pix"),
    ],
)
def test_mistakes_are_the_users_and_leave_nothing_behind(
    arguments: tuple[str, str, list[str]], words: str, mae: MaeStage, tmp_path: Path
) -> None:
    source = tmp_path / "mae.pth"
    convert.save(mae, str(source), "mae")
    with pytest.raises(UserError, match=words):
        convert_weights(str(source), str(tmp_path / "out.safetensors"), *arguments)
    assert list(tmp_path.iterdir()) == [source]


def test_the_source_is_never_overwritten(mae: MaeStage, tmp_path: Path) -> None:
    source = str(tmp_path / "mae.safetensors")
    convert.save(mae, source, "vitrail")
    with pytest.raises(ConfigError, match="overwrite"):
        convert_weights(source, source, None, "mae", [])


def test_a_run_can_start_from_a_converted_file(mae: MaeStage, tmp_path: Path) -> None:
    convert.save(mae, str(tmp_path / "mae.pth"), "mae")
    target = str(tmp_path / "own.safetensors")
    convert_weights(str(tmp_path / "mae.pth"), target, "mae_encoder", "vitrail", ["heads=3"])
    stage = classifier(2)
    report = load_initial(stage, read_weights(target), ["trunk."], where=target)
    assert sorted(report.ignored) == ["trunk.norm.bias", "trunk.norm.weight"]
    assert report.new == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert torch.equal(stage.trunk.blocks[1].attn.qkv.weight, mae.trunk.blocks[1].attn.qkv.weight)


def run_of(stage: Stage, folder: Path, *, saved: bool = True) -> str:
    """A run directory as training leaves it, with the stage's weights in its newest checkpoint."""
    run = folder / "runs" / "tuned"
    run.mkdir(parents=True)
    config = {"stage": "classify", "options": {"model": MODEL}, "data": {"train": str(folder / "train")}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "status.json").write_text('{"state": "done"}')
    if not saved:
        return str(run)
    state = {name: value.detach() for name, value in stage.state_dict().items()}
    save_checkpoint(str(run / "checkpoints"), state)
    return str(run)


def classifier(num_classes: int) -> ClassifyStage:
    return ClassifyStage(ClassifyOptions.model_validate({"model": MODEL}), DataFacts(("class",) * num_classes))


def test_a_runs_newest_weights_are_converted(tmp_path: Path) -> None:
    write_data_set(str(tmp_path / "train"), numbered([4]))  # names 7 classes
    stage = classifier(7)
    run, target = run_of(stage, tmp_path), str(tmp_path / "own.safetensors")
    convert_weights(run, target, None, "vitrail", [])
    again = convert.load(target, "vitrail")
    assert again.data.classes == tuple(f"class {i}" for i in range(7))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in stage.state_dict().items())


def test_classes_that_the_data_do_not_name_are_numbered(tmp_path: Path) -> None:
    write_data_set(str(tmp_path / "train"), numbered([4]))
    run, target = run_of(classifier(3), tmp_path), str(tmp_path / "own.safetensors")
    convert_weights(run, target, None, "vitrail", [])
    assert convert.load(target, "vitrail").data.classes == ("0", "1", "2")
    shutil.rmtree(tmp_path / "train")
    convert_weights(run, target, None, "vitrail", [])
    assert convert.load(target, "vitrail").data.classes == ("0", "1", "2")


@pytest.mark.parametrize(("name", "classes"), [("mp3", ()), ("segment", tuple(f"class {i}" for i in range(7)))])
def test_a_run_tells_the_classes_that_its_stage_learnt(tmp_path: Path, name: str, classes: tuple[str, ...]) -> None:
    """A head over the places of an image says nothing of classes; one over pixels' classes has a background beside."""
    write_data_set(str(tmp_path / "train"), numbered([4]))
    cls = stage_class(name)
    model = MODEL if name == "mp3" else MODEL | {"cls_token": False, "final_norm": False}
    stage = cls(cls.options_class.model_validate({"model": model}), DataFacts(classes))
    run = run_of(stage, tmp_path)
    config = {"stage": name, "options": {"model": model}, "data": {"train": [{"url": str(tmp_path / "train")}]}}
    (Path(run) / "config.yaml").write_text(yaml.safe_dump(config))
    assert run_weights(run).classes == classes


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    run = run_of(classifier(2), tmp_path, saved=False)
    with pytest.raises(UserError, match="no checkpoint"):
        convert_weights(run, str(tmp_path / "out.safetensors"), None, "timm", [])
    with pytest.raises(ConfigError, match="leave --from out"):
        convert_weights(run, str(tmp_path / "out.safetensors"), "mae", "timm", [])


def test_the_command_replies_with_the_table(mae: MaeStage, tmp_path: Path) -> None:
    convert.save(mae, str(tmp_path / "mae.safetensors"), "mae")
    words = "convert mae.safetensors hub/ --from mae --to hf_vit_mae"
    command = [sys.executable, "-m", "launch", *words.split()]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    heads = [line.split()[0] for line in done.stdout.splitlines()]
    assert heads == ["mae", "loaded", "resized", "new", "ignored", "62"]
    assert (tmp_path / "hub" / "config.json").is_file()
