"""Segment Anything's checkpoints and transformers' `SamModel` in and out: the same bits. Outputs: `test_sam.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline import convert
from pipeline.errors import CheckpointError, ConfigError
from pipeline.stages.sam import SamStage
from tests.support.sam_batches import MODEL, tiny_stage
from tests.support.sam_models import HEADS, hugging_face_config, official_sam, save_official


def same(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


@pytest.fixture
def official(tmp_path: Path) -> str:
    return save_official(official_sam(), tmp_path)


def test_a_round_trip_through_ours_keeps_every_bit(official: str, tmp_path: Path) -> None:
    stage = convert.load(official, "segment_anything", decoder_heads=HEADS)
    convert.save(stage, str(tmp_path / "again.pth"), "segment_anything")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert same(again, official_sam().state_dict())
    official_sam(seed=1).load_state_dict(again, strict=True)


def test_a_round_trip_through_transformers_keeps_every_bit(official: str, tmp_path: Path) -> None:
    """From the package to `SamModel`, which takes all of it, and back."""
    from transformers import SamModel

    weights = convert.read(official, "segment_anything", decoder_heads=HEADS)
    convert.save(weights, str(tmp_path / "hub"), "hf_sam")
    theirs = SamModel.from_pretrained(tmp_path / "hub")
    written = safetensors.torch.load_file(tmp_path / "hub" / "model.safetensors")
    assert same(written, dict(theirs.state_dict()))
    theirs.save_pretrained(tmp_path / "again")
    back = convert.read(str(tmp_path / "again"), "hf_sam")
    assert back.options == weights.options
    convert.save(back, str(tmp_path / "back.pth"), "segment_anything")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), official_sam().state_dict())


def test_what_transformers_made_is_read_with_its_epsilon(tmp_path: Path) -> None:
    from transformers import SamModel

    SamModel(hugging_face_config(1e-6)).save_pretrained(tmp_path)
    stage = convert.load(str(tmp_path), "hf_sam")
    assert isinstance(stage, SamStage)
    assert stage.options.sam.norm_eps == 1e-6
    with pytest.raises(ConfigError, match="norm_eps"):
        convert.save(stage, str(tmp_path / "theirs.pth"), "segment_anything")


def test_released_checkpoints_name_their_size(tmp_path: Path) -> None:
    """ViT-B's, from its shapes alone: 93,735,472 parameters."""
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        state = sam_model_registry["vit_b"]().state_dict()
    from pipeline.convert.weights import Known, WeightFile, load_table

    weights = convert.FORMATS["segment_anything"].read(WeightFile("sam_vit_b", dict(state), {}), Known())
    model = weights.options["model"]
    assert (model["size"], model["image_size"], model["window"]) == ("B", 1024, 14)
    assert model["global_blocks"] == [2, 5, 8, 11]
    assert weights.options["sam"] == {}
    assert len(load_table(weights).loaded) == len(state)
    assert sum(value.numel() for name, value in state.items() if "gaussian" not in name) == 93_735_472


def test_a_trunk_that_segment_anything_has_none_of_is_refused(tmp_path: Path) -> None:
    stage = tiny_stage(model={**MODEL, "conv_blocks": [0]})
    with pytest.raises(ConfigError, match="convolutions between blocks"):
        convert.save(stage, str(tmp_path / "sam.pth"), "segment_anything")


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        {"position_trained": False},
        {"position_image_size": 16},
        {"relative_positions": False},
        {"relative_positions": False, "window": None, "global_blocks": []},
    ],
)
def test_what_segment_anything_always_has_is_filled_in_so_that_it_computes_the_same(
    change: dict[str, object], tmp_path: Path
) -> None:
    stage = tiny_stage(model={**MODEL, **change}).eval()
    convert.save(stage, str(tmp_path / "sam.pth"), "segment_anything")
    again = convert.load(str(tmp_path / "sam.pth"), "segment_anything", decoder_heads=2)
    assert isinstance(again, SamStage)
    assert again.options.model.relative_positions
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        again.model.embed(pixels).features, stage.model.embed(pixels).features, rtol=0, atol=1e-5
    )


def test_a_damaged_checkpoint_is_named(official: str, tmp_path: Path) -> None:
    state = torch.load(official, weights_only=True)
    state.pop("mask_decoder.iou_token.weight")
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="iou_token"):
        convert.load(str(tmp_path / "less.pth"), "segment_anything", decoder_heads=HEADS)


def test_a_stage_trained_here_leaves_as_a_checkpoint_of_segment_anything(tmp_path: Path) -> None:
    stage = tiny_stage()
    convert.save(stage, str(tmp_path / "sam.pth"), "segment_anything")
    again = convert.load(str(tmp_path / "sam.pth"), "segment_anything", decoder_heads=2)
    assert same(again.state_dict(), stage.state_dict())
