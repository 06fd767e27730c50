"""Automatic masks against `segment_anything.SamAutomaticMaskGenerator`, and what is left of odd ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_point_grid, calculate_stability_score, generate_crop_boxes

from pipeline import convert
from pipeline.models.sam.automatic import (
    AutomaticMask,
    AutomaticSettings,
    automatic_masks,
    crop_boxes,
    mask_boxes,
    point_grid,
    stability_scores,
    without_small_regions,
)
from pipeline.models.sam.predictor import Predictor
from pipeline.stages.sam import SamStage
from tests.support.sam_models import HEADS, official_sam, save_official


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sam, Predictor]:
    """With an IoU head and masks whose values spread, so that filters have something to do."""
    official = official_sam(3)
    with torch.no_grad():
        official.mask_decoder.iou_prediction_head.layers[2].bias.copy_(torch.tensor([0.5, 0.5, 0.5, 0.5]))
        for mlp in official.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[2].weight.mul_(40)
            mlp.layers[2].bias.mul_(40)
    path = save_official(official, tmp_path_factory.mktemp("sam"))
    stage = convert.load(path, "segment_anything", decoder_heads=HEADS)
    assert isinstance(stage, SamStage)
    return official, stage.predictor()


def picture(height: int, width: int) -> np.ndarray:
    """Patches of colour with noise."""
    draw = np.random.default_rng(4)
    coarse = draw.integers(0, 256, (height // 12 + 1, width // 12 + 1, 3))
    fine = coarse.repeat(12, 0).repeat(12, 1)[:height, :width] + draw.integers(-20, 20, (height, width, 3))
    return fine.clip(0, 255).astype(np.uint8)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all that is stable": (
        {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.15, "box_nms_thresh": 1.0},
        {"min_iou": 0.0, "min_stability": 0.15, "nms": 1.0},
    ),
    "by predicted IoU": (
        {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0},
        {"min_iou": 0.5, "min_stability": 0.0, "nms": 1.0},
    ),
    "crops": (
        {
            "pred_iou_thresh": 0.4,
            "stability_score_thresh": 0.1,
            "box_nms_thresh": 1.0,
            "crop_nms_thresh": 1.0,
            "crop_n_layers": 2,
            "crop_n_points_downscale_factor": 2,
        },
        {
            "min_iou": 0.4,
            "min_stability": 0.1,
            "nms": 1.0,
            "crop_nms": 1.0,
            "crop_layers": 2,
            "crop_point_divisor": 2,
        },
    ),
}
"""A model that wasn't trained answers with masks all over the image, so overlaps are allowed here, and crops, whose
masks all touch their edges, add none; `test_sam_trained.py` has a model that was."""


def matched(ours: list[AutomaticMask], theirs: list[dict[str, Any]]) -> None:
    """Equal in number, and 99 of 100 in pixels and in what is told of them; the order turns with IoUs' last bit."""
    assert len(ours) == len(theirs)
    wanted = [entry["segmentation"] for entry in theirs]
    both = coco_mask.iou([entry.segmentation for entry in ours], wanted, [0] * len(theirs))
    pairs = both.argmax(1)
    assert (both.max(1) >= 0.99).mean() >= 0.99
    assert (both.max(0) >= 0.99).mean() >= 0.99
    alike = 0
    for mine, other in zip(ours, (theirs[i] for i in pairs), strict=True):
        alike += (
            abs(mine.area - other["area"]) <= 2
            and np.abs(np.subtract(mine.bbox, other["bbox"])).max() <= 1
            and list(mine.crop_box) == other["crop_box"]
            and mine.predicted_iou == pytest.approx(other["predicted_iou"], abs=1e-5)
            and mine.stability_score == pytest.approx(other["stability_score"], abs=1e-3)
            and list(mine.point_coords) == pytest.approx(other["point_coords"][0])
        )
    assert alike >= 0.95 * len(ours), "one mask may come of several points"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(50, 70), (90, 64)])
def test_masks_are_those_of_the_original(pair: tuple[Sam, Predictor], case: str, size: tuple[int, int]) -> None:
    official, predictor = pair
    theirs, ours = CASES[case]
    image = picture(*size)
    generator = SamAutomaticMaskGenerator(
        official, points_per_side=8, points_per_batch=10, output_mode="coco_rle", **theirs
    )
    wanted = [entry for entry in generator.generate(image) if entry["area"] > 0]
    predicted = automatic_masks(predictor, image, AutomaticSettings(points_per_side=8, points_per_batch=10, **ours))
    assert len(wanted) > 3, "a comparison of nothing"
    matched(predicted, wanted)


def test_small_regions_are_cleaned_as_by_the_original(pair: tuple[Sam, Predictor]) -> None:
    pytest.importorskip("cv2", reason="the original cleans by opencv")
    official, predictor = pair
    image = picture(50, 70)
    generator = SamAutomaticMaskGenerator(
        official,
        points_per_side=8,
        output_mode="coco_rle",
        pred_iou_thresh=0.4,
        stability_score_thresh=0.1,
        box_nms_thresh=1.0,
        crop_nms_thresh=1.0,
        min_mask_region_area=30,
    )
    settings = AutomaticSettings(
        points_per_side=8, min_iou=0.4, min_stability=0.1, nms=1.0, crop_nms=1.0, min_region_area=30
    )
    wanted = generator.generate(image)
    assert len(wanted) > 3, "a comparison of nothing"
    matched(automatic_masks(predictor, image, settings), wanted)


@pytest.mark.parametrize("size", [(480, 640), (301, 77), (3, 2), (1, 1)])
def test_crops_and_grids_are_the_originals(size: tuple[int, int]) -> None:
    boxes, layers = generate_crop_boxes(size, 2, 512 / 1500)
    assert list(crop_boxes(size, 2, 512 / 1500)) == list(zip(layers, map(tuple, boxes), strict=True))
    np.testing.assert_array_equal(point_grid(7).numpy(), build_point_grid(7))


def test_stability_is_the_originals_and_zero_where_that_is_undefined() -> None:
    logits = 3 * torch.randn(5, 9, 9, generator=torch.Generator().manual_seed(0))
    logits[4] = -10
    theirs = calculate_stability_score(logits, 0.0, 1.0)
    assert theirs[4].isnan()
    assert stability_scores(logits, 1.0).tolist() == pytest.approx([*theirs[:4].tolist(), 0.0])


def test_boxes_reach_from_the_first_to_the_last_pixel() -> None:
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 2:4, 3:7] = True
    masks[1, 5, 0] = True
    assert mask_boxes(masks).tolist() == [[3, 2, 6, 3], [0, 5, 0, 5]]


def test_small_holes_are_filled_and_small_islands_removed() -> None:
    mask = np.zeros((12, 12), bool)
    mask[1:8, 1:8] = True
    mask[3, 3] = mask[4, 4] = False  # one hole of two, joined at a corner
    mask[10, 10] = True
    filled, changed = without_small_regions(mask, 3, holes=True)
    assert changed
    assert filled[1:8, 1:8].all()
    same, changed = without_small_regions(mask, 2, holes=True)
    assert not changed
    assert same is mask
    cleaned, changed = without_small_regions(mask, 2, holes=False)
    assert changed
    assert not cleaned[10, 10]
    assert cleaned[1, 1]


def test_of_islands_that_are_all_small_the_largest_stays() -> None:
    mask = np.zeros((5, 9), bool)
    mask[0, 0] = mask[2, 4:7] = True
    without_islands, _ = without_small_regions(mask, 100, holes=False)
    assert without_islands.sum() == 3


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2)])
def test_an_image_of_few_pixels_has_masks_or_none(pair: tuple[Sam, Predictor], size: tuple[int, int]) -> None:
    settings = AutomaticSettings(points_per_side=2, min_iou=0.0, min_stability=0.0, crop_layers=1, min_region_area=5)
    for mask in automatic_masks(pair[1], picture(*size), settings):
        assert 0 < mask.area <= size[0] * size[1]


def test_masks_of_nearly_everything_can_be_left_out(pair: tuple[Sam, Predictor], tmp_path: Path) -> None:
    image = picture(40, 40)
    loose = {"points_per_side": 6, "min_iou": 0.0, "min_stability": 0.0, "nms": 1.0}
    every = automatic_masks(pair[1], image, AutomaticSettings(**loose))
    some = automatic_masks(pair[1], image, AutomaticSettings(**loose, max_area=0.6))
    assert [entry for entry in every if entry.area <= 960] == some
    assert 0 < len(some) < len(every)
