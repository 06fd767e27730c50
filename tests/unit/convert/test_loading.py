"""Weights whose shapes fit, but which another trunk would read otherwise, are refused."""

from __future__ import annotations

import pytest

from pipeline.convert.loading import check_same_trunk
from pipeline.errors import CheckpointError
from pipeline.models.config import ModelConfig

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
