"""Files that are damaged, hostile or misnamed, and our own format."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline import convert
from pipeline.convert.weights import WeightFile
from pipeline.errors import CheckpointError, ConfigError, UserError
from pipeline.stages.base import DataFacts
from pipeline.stages.classify import ClassifyOptions, ClassifyStage
from pipeline.stages.mae import MaeOptions, MaeStage
from tests.support.convert_peers import shaken

MODEL = {"width": 48, "depth": 2, "heads": 3, "image_size": 32, "patch_size": 8}
KNOWN: dict[str, Any] = {"heads": 3, "decoder_heads": 2, "norm_pix": True}


class Hostile:
    """Unpickled without care, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def stage() -> MaeStage:
    options = MaeOptions.model_validate({"model": MODEL, "decoder": {"width": 32, "depth": 1, "heads": 2}})
    built: MaeStage = shaken(MaeStage(options, DataFacts()))
    return built


@pytest.mark.parametrize("how", ["torch", "torch before 1.6", "pickle"])
def test_a_hostile_file_is_refused_and_nothing_in_it_runs(how: str, tmp_path: Path) -> None:
    path, proof = tmp_path / "weights.pth", tmp_path / "executed"
    content = {"model": {"cls_token": torch.zeros(1, 1, 4)}, "extra": Hostile(proof)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match="could execute code"):
        convert.load(str(path), "mae", heads=3)
    assert not proof.exists()


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_named(ending: str, share: float, stage: MaeStage, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{ending}"
    convert.save(stage, str(path), "mae")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        convert.load(str(path), "mae", **KNOWN)
    assert caught.value.where == str(path)


def test_damage_anywhere_in_the_header_gives_one_message(stage: MaeStage, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    convert.save(stage, str(path), "mae")
    content = bytearray(path.read_bytes())
    for place in range(0, 400, 37):
        damaged = content.copy()
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            convert.load(str(path), "mae", **KNOWN)


@pytest.mark.parametrize(
    ("content", "words"),
    [([1, 2], "no tensors by name"), ({"a": 1}, "a are no tensors"), ({}, "no tensors by name"), (3, "no tensors")],
)
def test_a_pickle_of_something_else_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=words):
        convert.load(str(tmp_path / "weights.pth"), "mae", heads=3)


def test_nothing_there_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        convert.load(str(tmp_path / "none.pth"), "mae", heads=3)
    with pytest.raises(CheckpointError, match="no weights there"):
        convert.load(str(tmp_path), "mae", heads=3)


def test_a_wrong_name_of_a_format_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'hf_vit_mae'"):
        convert.load("x.pth", "hf_vitmae")


def test_a_fact_that_means_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'heads'"):
        convert.format_named("mae") and convert.known_for(convert.FORMATS["mae"], {"head": 3})
    with pytest.raises(ConfigError, match="norm_pix means nothing"):
        convert.known_for(convert.FORMATS["timm"], {"norm_pix": True})
    with pytest.raises(ConfigError, match="heads"):
        convert.known_for(convert.FORMATS["timm"], {"heads": "twelve"})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("blocks.1.mlp.fc2.weight", lambda t: t[:, :-1], r"fc2\.weight is 48x191 there and 48x192 here"),
        ("blocks.1.norm1.weight", None, r"lacks trunk\.blocks\.1\.norm1\.weight"),
        ("patch_embed.proj.weight", lambda t: t[:, :1], "colour"),
        ("patch_embed.proj.weight", lambda t: t.flatten(1), "2-dimensional"),
        ("pos_embed", lambda t: t[:, :-1], "image_size"),
        ("pos_embed", lambda t: t[..., :-4], "position table"),
        ("decoder_embed.weight", None, "decoder_embed"),
    ],
)
def test_weights_of_another_shape_are_named(
    name: str, change: Callable[[torch.Tensor], torch.Tensor] | None, words: str, stage: MaeStage, tmp_path: Path
) -> None:
    path = str(tmp_path / "weights.pth")
    convert.save(stage, path, "mae")
    state = torch.load(path, weights_only=True)["model"]
    if change is None:
        del state[name]
    else:
        state[name] = change(state[name])
    torch.save({"model": state}, path)
    with pytest.raises(UserError, match=words):
        convert.load(path, "mae", **KNOWN)


SPOILT: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda t: None,
    "flat": lambda t: t.flatten() if t.ndim > 1 else t[None],
    "a number": lambda t: t.new_zeros(()),
    "empty": lambda t: t[:0],
    "longer": lambda t: torch.cat([t, t]),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("format_name", ["mae", "timm", "hf_vit_mae"])
def test_whichever_tensor_is_spoilt_the_message_is_for_the_user(format_name: str, how: str, stage: MaeStage) -> None:
    form = convert.FORMATS[format_name]
    written = form.write(convert.weights.of_stage(stage), convert.weights.Known())
    known = convert.weights.Known(**{name: value for name, value in KNOWN.items() if name in form.takes})
    inside = [name for name in written.state if re.search(r"\.\d+\.", name)]
    survivors = []
    for name in [name for name in written.state if name not in inside] + inside[::3]:
        spoilt = SPOILT[how](written.state[name])
        state = {k: v for k, v in written.state.items() if k != name}
        state |= {} if spoilt is None else {name: spoilt}
        try:
            convert.weights.load_table(form.read(WeightFile("file", state, written.config), known))
        except UserError:
            continue
        survivors.append(name)
    assert survivors == []


def test_the_wrong_formats_name_is_told_by_what_the_file_holds(stage: MaeStage, tmp_path: Path) -> None:
    path = str(tmp_path / "weights.pth")
    convert.save(stage, path, "mae")
    with pytest.raises(CheckpointError, match="format"):
        convert.load(path, "vitrail")
    convert.save(stage, str(tmp_path / "hf"), "hf_vit_mae")
    with pytest.raises(CheckpointError, match="check the format's name"):
        convert.load(str(tmp_path / "hf"), "timm", heads=3)


def test_heads_that_cannot_be_are_the_users_error(stage: MaeStage, tmp_path: Path) -> None:
    path = str(tmp_path / "weights.pth")
    convert.save(stage, path, "mae")
    with pytest.raises(ConfigError, match=r"heads \(5\) must divide width"):
        convert.load(path, "mae", **{**KNOWN, "heads": 5})


def test_a_target_of_no_known_kind_is_refused(stage: MaeStage, tmp_path: Path) -> None:
    for name in ("weights.safetensor", "weights"):
        with pytest.raises(ConfigError, match="ending"):
            convert.save(stage, str(tmp_path / name), "mae")
    with pytest.raises(ConfigError, match="ending"):
        convert.save(stage, str(tmp_path / "weights.pth"), "vitrail")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["own.safetensors", "own/"])
def test_our_own_format_says_all_there_is_to_know(target: str, tmp_path: Path) -> None:
    options = ClassifyOptions.model_validate({"model": MODEL, "label_smoothing": 0.1})
    stage = shaken(ClassifyStage(options, DataFacts(("cat", "dog"))))
    convert.save(stage, str(tmp_path / target), "vitrail")
    again = convert.load(str(tmp_path / target), "vitrail")
    assert isinstance(again, ClassifyStage)
    assert again.options == options
    assert again.data.classes == ("cat", "dog")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in stage.state_dict().items())


def test_a_header_of_a_later_version_is_refused(stage: MaeStage, tmp_path: Path) -> None:
    header = '{"format_version": 2, "stage": "mae", "options": {}}'
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "own.safetensors", {"vitrail": header})
    with pytest.raises(CheckpointError, match="version 2"):
        convert.load(str(tmp_path / "own.safetensors"), "vitrail")


def test_files_keep_their_precision_and_stages_are_fp32(stage: MaeStage, tmp_path: Path) -> None:
    state = {name: value.half() for name, value in convert.weights.of_stage(stage).state.items()}
    weights = convert.weights.of_stage(stage)._replace(state=state)
    convert.save(weights, str(tmp_path / "half.safetensors"), "vitrail")
    again = convert.read(str(tmp_path / "half.safetensors"), "vitrail")
    assert {value.dtype for value in again.state.values()} == {torch.float16}
    assert {value.dtype for value in convert.build(again)[0].parameters()} == {torch.float32}


def test_our_own_description_of_a_file_answers_for_what_tensors_do_not_tell(stage: MaeStage, tmp_path: Path) -> None:
    convert.save(stage, str(tmp_path / "mae.safetensors"), "mae")
    again = convert.load(str(tmp_path / "mae.safetensors"), "mae")
    assert isinstance(again, MaeStage)
    assert again.options.decoder == stage.options.decoder
    assert all(torch.equal(again.state_dict()[name], value) for name, value in stage.state_dict().items())
