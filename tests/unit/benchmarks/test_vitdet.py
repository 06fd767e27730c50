"""The sides of ViTDet's comparison do the same work."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.gpu import build_vitdet, rectangles
from benchmarks.vitdet import SCORES, Way, pass_through, pixels, trunk
from pipeline.data.instances import decode_masks


@pytest.mark.parametrize("way", ["train", "infer"])
def test_folded_and_materialised_relative_positions_agree(way: Way) -> None:
    model, images = trunk("Ti", 64, relative=True), pixels(64)
    folded, materialised = (pass_through(model, images, way, scores) for scores in (None, SCORES["materialised"]))
    torch.testing.assert_close(folded, materialised, rtol=1e-3, atol=1e-4)
    without = trunk("Ti", 64, relative=False)
    without.load_state_dict(model.state_dict(), strict=False)
    assert (pass_through(without, images, way, None) - folded).abs().max() > 1e-2, "relative positions take part"


def test_the_detectors_objects_fill_their_boxes() -> None:
    objects = rectangles(3, 64)
    masks = decode_masks(objects.masks, (64, 64))
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    assert masks.flatten(1).sum(1).tolist() == sides.prod(1).tolist()
    assert (sides >= 4).all()


def test_the_detector_that_is_measured_on_gpus_is_vitdets() -> None:
    with torch.device("meta"):
        stage = build_vitdet("B", argparse.Namespace(image=1024, checkpointing=False))
    assert stage.trunk.config.global_blocks == (2, 5, 8, 11)
    num = sum(parameter.numel() for parameter in stage.parameters())
    assert 110e6 < num < 113e6  # 111 million, as the paper counts
