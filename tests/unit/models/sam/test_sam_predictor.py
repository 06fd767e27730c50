"""Asking about whole images, against `segment_anything.SamPredictor`, and prompts that make no sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from pipeline import convert
from pipeline.errors import ConfigError
from pipeline.models.sam.predictor import EmbeddedImages, ImagePrompts, Predictor
from pipeline.stages.sam import SamStage
from tests.support.sam_models import HEADS, official_sam, save_official

POINTS = np.array([[12.5, 30.0], [60.0, 3.0]])
BOX = np.array([5.0, 8.0, 60.0, 44.0])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[SamPredictor, Predictor]:
    official = official_sam()
    path = save_official(official, tmp_path_factory.mktemp("sam"))
    stage = convert.load(path, "segment_anything", decoder_heads=HEADS)
    assert isinstance(stage, SamStage)
    return SamPredictor(official), stage.predictor()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PROMPTS: dict[str, tuple[dict[str, Any], ImagePrompts]] = {
    "points": (
        {"point_coords": POINTS, "point_labels": np.array([1, 0])},
        ImagePrompts(torch.tensor(POINTS)[None], torch.tensor([[1, 0]])),
    ),
    "box": ({"box": BOX}, ImagePrompts(boxes=torch.tensor(BOX)[None])),
    "both": (
        {"point_coords": POINTS, "point_labels": np.array([1, 0]), "box": BOX},
        ImagePrompts(torch.tensor(POINTS)[None], torch.tensor([[1, 0]]), torch.tensor(BOX)[None]),
    ),
}


@pytest.mark.parametrize("size", [(48, 80), (130, 90), (64, 64)])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("multimask", [True, False])
def test_masks_scores_and_logits_are_the_originals(
    pair: tuple[SamPredictor, Predictor], size: tuple[int, int], kind: str, multimask: bool
) -> None:
    theirs, ours = pair
    image = picture(*size)
    theirs.set_image(image)
    official_prompts, prompts = PROMPTS[kind]
    masks, iou, low = theirs.predict(**official_prompts, multimask_output=multimask, return_logits=True)
    predicted = ours.predict(ours.embed([image]), [prompts], multimask=multimask)[0]
    np.testing.assert_allclose(predicted.logits[0].numpy(), masks, rtol=0, atol=1e-5)
    np.testing.assert_allclose(predicted.iou[0].numpy(), iou, rtol=0, atol=1e-5)
    np.testing.assert_allclose(predicted.low[0].numpy(), low, rtol=0, atol=1e-5)
    again, _, _ = theirs.predict(**official_prompts, mask_input=low[:1], multimask_output=multimask, return_logits=True)
    refined = ours.predict(ours.embed([image]), [prompts._replace(masks=predicted.low[:, :1])], multimask=multimask)[0]
    np.testing.assert_allclose(refined.logits[0].numpy(), again, rtol=0, atol=2e-5)


def test_images_of_any_sizes_are_asked_about_in_one_batch(pair: tuple[SamPredictor, Predictor]) -> None:
    _, ours = pair
    images = [picture(48, 80), picture(130, 90, 1), picture(20, 33, 2)]
    points = ImagePrompts(torch.tensor([[[3.0, 4.0]], [[9.0, 19.0]]]))
    all_prompts = [
        points,
        ImagePrompts(boxes=torch.tensor([[1.0, 1, 50, 60]])),
        ImagePrompts(boxes=torch.tensor([[2.0, 2, 30, 18]] * 3)),
    ]
    together = ours.predict(ours.embed(images), all_prompts)
    for image, prompts, predicted in zip(images, all_prompts, together, strict=True):
        alone = ours.predict(ours.embed([image]), [prompts])[0]
        assert predicted.logits.shape[2:] == image.shape[:2]
        torch.testing.assert_close(predicted.logits, alone.logits, rtol=0, atol=2e-5)
        torch.testing.assert_close(predicted.iou, alone.iou, rtol=0, atol=1e-5)


def test_three_masks_answer_a_lone_point_and_one_answers_more(pair: tuple[SamPredictor, Predictor]) -> None:
    _, ours = pair
    embedded = ours.embed([picture(40, 40)])
    single, several = ImagePrompts(torch.tensor([[[3.0, 4.0]]])), ImagePrompts(torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]))
    assert ours.predict(embedded, [single])[0].iou.shape == (1, 3)
    assert ours.predict(embedded, [several])[0].iou.shape == (1, 1)
    best = ours.predict(embedded, [single])[0].best()
    assert best.iou.shape == (1, 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (300, 1)])
def test_an_image_of_one_pixel_is_an_image(pair: tuple[SamPredictor, Predictor], size: tuple[int, int]) -> None:
    predicted = pair[1].predict(pair[1].embed([picture(*size)]), [ImagePrompts(torch.tensor([[[0.5, 0.5]]]))])[0]
    assert predicted.logits.shape == (1, 3, *size)
    assert predicted.logits.isfinite().all()


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (ImagePrompts(), "there are no prompts"),
        (ImagePrompts(torch.tensor([[[90.0, 4.0]]])), r"point \(90, 4\) is outside of an image of 80x48"),
        (ImagePrompts(torch.tensor([[[float("nan"), 4.0]]])), "outside"),
        (ImagePrompts(boxes=torch.tensor([[50.0, 8, 10, 40]])), "inside out"),
        (ImagePrompts(boxes=torch.tensor([[90.0, 8, 95, 40]])), "outside of an image"),
        (ImagePrompts(boxes=torch.tensor([[float("inf"), 8, 95, 40]])), "isn't finite"),
        (ImagePrompts(torch.zeros(2, 1, 2), boxes=torch.tensor([[5.0, 8, 60, 44]])), "unequal numbers of prompts"),
        (ImagePrompts(torch.zeros(1, 2, 2), torch.ones(1, 3)), "one for each point"),
        (ImagePrompts(torch.zeros(1, 1, 2), torch.tensor([[7]])), "unknown label"),
    ],
)
def test_impossible_prompts_are_refused_by_name(
    pair: tuple[SamPredictor, Predictor], prompts: ImagePrompts, words: str
) -> None:
    embedded: EmbeddedImages = pair[1].embed([picture(48, 80)])
    with pytest.raises(ConfigError, match=words):
        pair[1].predict(embedded, [prompts])


def test_a_box_that_reaches_beyond_the_image_is_clipped(pair: tuple[SamPredictor, Predictor]) -> None:
    _, ours = pair
    embedded = ours.embed([picture(48, 80)])
    beyond = ours.predict(embedded, [ImagePrompts(boxes=torch.tensor([[-10.0, -3, 200, 30]]))])[0]
    clipped = ours.predict(embedded, [ImagePrompts(boxes=torch.tensor([[0.0, 0, 80, 30]]))])[0]
    assert torch.equal(beyond.logits, clipped.logits)
