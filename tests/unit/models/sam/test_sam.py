"""Segment Anything against the package segment-anything and transformers, on the same random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from pipeline import convert
from pipeline.models.sam.model import Embedded
from pipeline.models.sam.prompts import Prompts, join_prompts, prompts_of
from pipeline.stages.sam import SamStage
from tests.support.sam_models import HEADS, PATCH, SIDE, hugging_face_config, official_sam, save_official

TOLERANCE = 1e-5  # fp32, sums in another order


@pytest.fixture(scope="module")
def official() -> Sam:
    return official_sam()


@pytest.fixture(scope="module")
def stage(official: Sam, tmp_path_factory: pytest.TempPathFactory) -> SamStage:
    path = save_official(official, tmp_path_factory.mktemp("sam"))
    loaded = convert.load(path, "segment_anything", decoder_heads=HEADS)
    assert isinstance(loaded, SamStage)
    return loaded


def images(num: int = 2, side: int = SIDE) -> Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(5))


def given(kind: str, num: int = 3) -> dict[str, Tensor | None]:
    """Points, labels, boxes and masks of a mixture by name."""
    draw = torch.Generator().manual_seed(len(kind))
    corner = torch.rand(num, 2, generator=draw) * SIDE / 2
    return {
        "points": torch.rand(num, 4, 2, generator=draw) * SIDE if "points" in kind else None,
        "labels": torch.tensor([[1, 0, 1, -1]]).expand(num, 4) if "points" in kind else None,
        "boxes": torch.cat([corner, corner + SIDE / 3], dim=1) if "boxes" in kind else None,
        "masks": 5 * torch.randn(num, 1, SIDE // 2, SIDE // 2, generator=draw) if "masks" in kind else None,
    }


KINDS = ("points", "boxes", "masks", "points boxes", "points masks", "boxes masks", "points boxes masks")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_segment_anything(official: Sam, stage: SamStage, kind: str) -> None:
    ask = given(kind)
    pixels = images(1)
    features = official.image_encoder(pixels)
    points = None if ask["points"] is None else (ask["points"], ask["labels"])
    sparse, dense = official.prompt_encoder(points=points, boxes=ask["boxes"], masks=ask["masks"])
    masks, iou = official.mask_decoder.predict_masks(features, official.prompt_encoder.get_dense_pe(), sparse, dense)
    embedded = stage.model.embed(pixels)
    answers = stage.model.decode(embedded, prompts_of(**ask))
    torch.testing.assert_close(embedded.features, features, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(answers.logits, masks, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(answers.iou, iou, rtol=0, atol=TOLERANCE)
    assert masks.std() > 100 * TOLERANCE, "a comparison of nothing"


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "masks"])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_answers_are_those_of_transformers(tmp_path: Path, kind: str, eps: float) -> None:
    """Which takes a mask of one prompt only, and never a mask alone."""
    from transformers import SamModel

    torch.manual_seed(1)
    theirs = SamModel(hugging_face_config(eps)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    stage = convert.load(str(tmp_path), "hf_sam")
    assert isinstance(stage, SamStage)
    ask = given(kind, 1 if "masks" in kind else 3)
    wanted = theirs(
        pixel_values=images(1),
        input_points=None if ask["points"] is None else ask["points"][None],
        input_labels=None if ask["labels"] is None else ask["labels"][None],
        input_boxes=None if ask["boxes"] is None else ask["boxes"][None],
        input_masks=ask["masks"],
        multimask_output=True,
    )
    answers = stage.model.decode(stage.model.embed(images(1)), prompts_of(**ask))
    torch.testing.assert_close(answers.logits[:, 1:], wanted.pred_masks[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(answers.iou[:, 1:], wanted.iou_scores[0], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_mixed_batch_of_images_and_prompts_equals_one_by_one(stage: SamStage) -> None:
    """Any number of prompts for each image, of any kinds, padded: the original fails from two images on."""
    kinds: list[Prompts] = [
        prompts_of(**given(kind, num), image=number % 3)
        for number, (kind, num) in enumerate(zip(KINDS, (1, 4, 2, 3, 1, 2, 3), strict=True))
    ]
    pixels = images(3)
    together = stage.model.decode(stage.model.embed(pixels), join_prompts(kinds))
    start = 0
    for part in kinds:
        embedded = stage.model.embed(pixels[part.image[:1]])
        for row in range(part.num):
            alone_prompts = part.rows(row, row + 1)
            alone = stage.model.decode(embedded, alone_prompts._replace(image=torch.zeros_like(alone_prompts.image)))
            torch.testing.assert_close(together.logits[start + row], alone.logits[0], rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(together.iou[start + row], alone.iou[0], rtol=0, atol=TOLERANCE)
        start += part.num


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (40, 96), (64, 8)])
def test_any_input_size_that_patches_divide_is_taken(stage: SamStage, size: tuple[int, int]) -> None:
    pixels = torch.randn(1, 3, *size)
    embedded = stage.model.embed(pixels)
    answers = stage.model.decode(embedded, prompts_of(torch.tensor([[[4.0, 4.0]]]), torch.tensor([[1]])))
    assert answers.logits.shape == (1, 4, size[0] // PATCH * 4, size[1] // PATCH * 4)
    assert answers.logits.isfinite().all()


@torch.no_grad()
def test_another_input_size_equals_the_original_built_for_it(tmp_path: Path, official: Sam, stage: SamStage) -> None:
    """With its tables interpolated as the original interpolates them; its global block's table linearly."""
    import torch.nn.functional as F

    larger = official_sam(side=2 * SIDE)
    state = official.state_dict()
    table = state["image_encoder.pos_embed"].permute(0, 3, 1, 2)
    state["image_encoder.pos_embed"] = F.interpolate(table, scale_factor=2, mode="bicubic").permute(0, 2, 3, 1)
    for name in ("rel_pos_h", "rel_pos_w"):
        key = f"image_encoder.blocks.1.attn.{name}"
        length = 2 * (2 * SIDE // PATCH) - 1
        state[key] = F.interpolate(state[key].T[None], size=length, mode="linear")[0].T
    larger.load_state_dict(state)
    pixels = images(1, 2 * SIDE)
    torch.testing.assert_close(stage.model.embed(pixels).features, larger.image_encoder(pixels), rtol=0, atol=TOLERANCE)
    boxes = torch.tensor([[10.0, 20, 100, 90]])
    sparse, dense = larger.prompt_encoder(points=None, boxes=boxes, masks=None)
    features = larger.image_encoder(pixels)
    masks, _ = larger.mask_decoder.predict_masks(features, larger.prompt_encoder.get_dense_pe(), sparse, dense)
    answers = stage.model.decode(Embedded(features, (2 * SIDE, 2 * SIDE)), prompts_of(boxes=boxes))
    torch.testing.assert_close(answers.logits, masks, rtol=0, atol=TOLERANCE)


def test_positions_keep_their_precision_in_bf16(stage: SamStage) -> None:
    """In bf16, places of a 64 x 64 grid would fall together."""
    low = SamStage(stage.options, stage.data).to(torch.bfloat16)
    low.prompt_encoder.load_state_dict(stage.prompt_encoder.state_dict())
    places = torch.rand(50, 2)
    assert torch.equal(low.prompt_encoder.pe_layer(places), stage.prompt_encoder.pe_layer(places))
