"""Pyramids: detectron2's recorded maps, and the FPN on taps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.models.detection.pyramid import SimplePyramid, TappedPyramid, quarter_taps


@pytest.mark.parametrize("name", ["tiny", "tiny_conv"])
def test_the_simple_pyramid_equals_detectron2(name: str, shared: Path) -> None:
    path = shared / "reference" / "fixtures" / f"vitdet_official_{name}.npz"
    if not path.exists():
        pytest.skip(f"no recorded outputs at {path}")
    recorded = {key: torch.from_numpy(value) for key, value in np.load(path).items() if value.size}
    prefix = "sd.backbone."
    state = {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix + "simfp")}
    pyramid = SimplePyramid(48, 32)
    pyramid.load_state_dict(state, strict=True)
    levels = pyramid((recorded["last_feat"],))
    assert len(levels) == 5
    for number, level in enumerate(levels, start=2):
        expected = recorded[f"out.p{number}"]
        assert (level - expected).abs().max() <= 1e-5 * expected.abs().max(), f"p{number}"


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_the_tapped_pyramid_has_the_same_levels_and_uses_every_tap(norm: str) -> None:
    torch.manual_seed(0)
    pyramid = TappedPyramid(16, 8, norm)
    maps = tuple(torch.randn(2, 16, 4, 6, requires_grad=True) for _ in range(4))
    levels = pyramid(maps)
    assert [tuple(level.shape[1:]) for level in levels] == [(8, 16, 24), (8, 8, 12), (8, 4, 6), (8, 2, 3), (8, 1, 2)]
    sum(level.square().sum() for level in levels).backward()
    assert all(tap.grad is not None and tap.grad.any() for tap in maps)
    assert all(parameter.grad is not None for parameter in pyramid.parameters())


def test_taps_follow_each_quarter_of_the_blocks() -> None:
    assert quarter_taps(12) == (2, 5, 8, 11)
    assert quarter_taps(24) == (5, 11, 17, 23)
    assert quarter_taps(32) == (7, 15, 23, 31)
    assert quarter_taps(2) == (0, 0, 1, 1)
