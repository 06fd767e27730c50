"""Weights whose shapes fit, but which another trunk would read otherwise, are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config import validate
from pipeline.convert.loading import check_same_trunk, load_initial, reaches
from pipeline.errors import CheckpointError
from pipeline.models.trunk.config import ModelConfig
from pipeline.models.trunk.position import interpolate
from pipeline.stages import stage_class
from pipeline.stages.base import DataFacts, Stage

OURS = ModelConfig(width=12, depth=1, heads=2, image_size=16, patch_size=8)


def dumped(**changes: object) -> dict[str, object]:
    return {**OURS.model_dump(mode="json"), **changes}


def test_the_same_trunk_and_an_unknown_one_pass() -> None:
    check_same_trunk(dumped(), dumped(), where="there")
    check_same_trunk(dumped(), {}, where="there")


def test_a_size_by_name_is_the_same_as_its_heads() -> None:
    named = ModelConfig(size="Ti").model_dump(mode="json")
    spelt = ModelConfig(width=192, depth=12, heads=3).model_dump(mode="json")
    check_same_trunk(named, spelt, where="there")


@pytest.mark.parametrize(
    ("key", "theirs"), [("heads", 4), ("gelu", "tanh"), ("norm_eps", 1e-5), ("position", "learned")]
)
def test_what_no_shape_tells_is_compared(key: str, theirs: object) -> None:
    with pytest.raises(CheckpointError, match=f"{key} {theirs} there and .* here.*options.model"):
        check_same_trunk(dumped(), dumped(**{key: theirs}), where="runs/mae")


def test_a_trunk_trained_without_positions_may_be_given_any() -> None:
    for ours in ("none", "sincos2d", "learned"):
        check_same_trunk(dumped(position=ours), dumped(position="none"), where="runs/mp3")


def test_a_trunk_trained_with_positions_cannot_go_without() -> None:
    with pytest.raises(CheckpointError, match="position sincos2d there and none here"):
        check_same_trunk(dumped(position="none"), dumped(), where="runs/mae")


MAE = {"model": {"width": 12, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8}}
DENSE = {
    "width": 12, "depth": 2, "heads": 2, "image_size": 64, "patch_size": 8, "cls_token": False, "final_norm": False,
    "position_trained": True, "position_image_size": 32, "window": 3, "global_blocks": [1], "conv_blocks": [0],
    "relative_positions": True,
}  # fmt: skip


def built(name: str, options: dict[str, Any]) -> Stage:
    torch.manual_seed(0)
    cls = stage_class(name)
    return cls(validate(cls.options_class, options, where="test"), DataFacts(("a", "b")))


def detector(**changes: Any) -> Stage:
    return built("vitdet", {"model": DENSE | changes, "detector": {"pyramid_channels": 8, "box_width": 8}})


def test_a_detector_starts_from_an_autoencoders_trunk_and_computes_the_same() -> None:
    """Windows aside, which change what the weights compute: here they are as large as the grid."""
    decoder = {"width": 8, "depth": 1, "heads": 2}
    mae = built("mae", MAE | {"decoder": decoder})
    stage = detector(image_size=32, window=4)
    report = load_initial(stage, mae.state_dict(), ("trunk.",), where="runs/mae")
    assert all(name.startswith("trunk.") for name in report.loaded)
    assert report.resized == []
    new = [name for name in report.new if name.startswith("trunk.")]
    assert "trunk.pos_embed" in new
    assert all("rel_pos" in name or "residual" in name or name == "trunk.pos_embed" for name in new)
    assert {"trunk.cls_token", "trunk.norm.weight", "trunk.norm.bias"} <= set(report.ignored)
    images = torch.randn(1, 3, 32, 32)
    plain = built("mae", {"model": MAE["model"] | {"cls_token": False, "final_norm": False}, "decoder": decoder})
    load_initial(plain, mae.state_dict(), ("trunk.",), where="runs/mae")
    torch.testing.assert_close(stage.trunk(images).patches, plain.trunk(images).patches, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [2, 4, 7])
def test_a_trained_table_loses_its_cls_row_and_takes_the_native_grid(side: int) -> None:
    stage = detector()
    weights = detector().state_dict()
    table = torch.randn(1, side**2, 12)
    weights["trunk.pos_embed"] = torch.cat([torch.full((1, 1, 12), 1e6), table], dim=1)
    report = load_initial(stage, weights, ("trunk.",), where="there")
    assert report.resized == ["trunk.pos_embed"]
    expected = interpolate(table[0], (side, side), (4, 4), "bicubic")
    torch.testing.assert_close(stage.trunk.pos_embed[0], expected)


def test_patches_of_another_size_are_resized_where_the_stage_allows_it() -> None:
    """MAE's ViT-H has patches of 14 pixels, ViTDet's of 16."""
    stage, weights = detector(), detector().state_dict()
    narrow = torch.ones(12, 3, 7, 7)
    weights["trunk.patch_embed.proj.weight"] = narrow
    assert load_initial(stage, weights, ("trunk.",), where="there").resized == ["trunk.patch_embed.proj.weight"]
    torch.testing.assert_close(stage.trunk.patch_embed.proj.weight, torch.ones(12, 3, 8, 8))
    classifier = built("classify", {"model": MAE["model"]})
    weights = built("classify", {"model": MAE["model"]}).state_dict() | {"trunk.patch_embed.proj.weight": narrow}
    with pytest.raises(CheckpointError, match="12x3x7x7 there and 12x3x8x8 here"):
        load_initial(classifier, weights, ("trunk.",), where="there")


def test_a_missing_block_is_no_new_parameter() -> None:
    stage, weights = detector(), detector().state_dict()
    del weights["trunk.blocks.1.attn.qkv.weight"]
    with pytest.raises(CheckpointError, match=r"trunk.blocks.1.attn.qkv.weight"):
        load_initial(stage, weights, ("trunk.",), where="there")


@pytest.mark.parametrize(
    ("prefixes", "reached"),
    [(["text."], True), (["text.blocks."], True), ([""], True), (["te"], True), (["trunk."], False), ([], False)],
)
def test_a_text_tower_is_compared_whatever_part_of_it_is_taken(prefixes: list[str], reached: bool) -> None:
    assert reaches(prefixes, "text.") is reached
