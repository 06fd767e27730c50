"""Stage vitdet: detectron2's recorded losses, gradients, detections and parameter groups, and the traps."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.config import validate
from pipeline.convert.detectron2 import Detectron2, names
from pipeline.convert.weights import Known, WeightFile, build
from pipeline.data.batch import Batch, Instances, RawSample, collate
from pipeline.data.images.views import Box, View, fitted
from pipeline.errors import ConfigError
from pipeline.evaluate.base import Predictions
from pipeline.evaluate.coco import stored_detections
from pipeline.models.detection.masks import encode_masks, paste_masks
from pipeline.models.detection.proposals import anchors_of, sample
from pipeline.models.detection.rcnn import pool
from pipeline.stages.base import DataFacts
from pipeline.stages.vitdet import VitDetOptions, VitDetStage
from pipeline.train.config import OptimConfig
from pipeline.train.optim import parameter_groups
from tests.support.vitdet_case import SIDE, shown, weights_of

RECORD = json.loads(Path(__file__).with_name("detectron2_vitdet.json").read_text())
ALL = 100_000  # samples: more than there are, so that nothing is drawn
RECORDED = {
    "rpn_samples": ALL, "box_samples": ALL, "box_positives": 1.0, "train_proposals": (200, 100),
    "test_proposals": (100, 60), "score_threshold": 0.02, "detections": 20,
}  # fmt: skip
MODEL = {
    "width": 32, "depth": 2, "heads": 2, "image_size": 64, "patch_size": 16, "cls_token": False, "final_norm": False,
}  # fmt: skip
SMALL = {
    "pyramid_channels": 8, "rpn_samples": 32, "train_proposals": (64, 32), "test_proposals": (64, 32),
    "box_samples": 16, "box_convs": 1, "box_width": 16, "mask_convs": 1, "detections": 8, "score_threshold": 0.01,
}  # fmt: skip
EVERY_ANCHOR = SMALL | {"rpn_samples": ALL}  # so that the coarsest level, of few anchors, is among the sampled


def recorded(case: str) -> VitDetStage:
    """Our stage with the weights that detectron2 was run with."""
    state = {name: weights_of(name, tuple(shape)) for name, shape in RECORD[case]["shapes"].items()}
    weights = Detectron2().read(WeightFile("record", state, {}), Known())
    detector = {**weights.options["detector"], **RECORDED}
    stage, _ = build(weights._replace(options={**weights.options, "detector": detector}))
    assert isinstance(stage, VitDetStage)
    return stage


def recorded_batch() -> Batch:
    image, boxes, classes, masks = shown()
    canvas = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    canvas[0, :, : image.shape[1], : image.shape[2]] = image
    pixels = torch.zeros(len(masks), SIDE, SIDE, dtype=torch.bool)
    pixels[:, : image.shape[1], : image.shape[2]] = masks
    view = View((192, 240), Box(0, 0, 240, 192), (image.shape[1], image.shape[2]), canvas=(SIDE, SIDE))
    return batch_of(canvas, [Instances(boxes, classes, tuple(encode_masks(pixels)), torch.zeros(3).long(), view)])


def batch_of(images: Tensor, instances: list[Instances]) -> Batch:
    number = torch.arange(len(images))
    return Batch(number, 7 * number, torch.ones(len(images)), 0, images=images, instances=tuple(instances))


def named_theirs(stage: VitDetStage) -> dict[str, str]:
    """Our name -> detectron2's."""
    detector = stage.options.detector
    return names(list(stage.state_dict()), detector.cascade, detector.box_convs, detector.mask_convs)


@pytest.mark.parametrize("case", ["mask", "cascade"])
def test_losses_and_gradients_equal_detectron2(case: str) -> None:
    """In fp32 against float64: a ReLU's kink moved a gradient's norm by 5e-4, losses are within 1e-5."""
    stage, expected = recorded(case).train(), RECORD[case]
    losses = stage.loss(recorded_batch())
    sums: dict[str, float] = {}
    for name, value in expected["losses"].items():
        ours = {"loss_cls": "class", "loss_box_reg": "box", "loss_mask": "mask", "loss_rpn_cls": "rpn_class",
                "loss_rpn_loc": "rpn_box"}[name.partition("_stage")[0]]  # fmt: skip
        sums[ours] = sums.get(ours, 0.0) + value
    assert {name: float(value) for name, value in losses.parts.items()} == pytest.approx(sums, rel=1e-5)
    losses.total.backward()
    theirs = named_theirs(stage)
    assert set(theirs[name] for name, _ in stage.named_parameters()) == set(expected["gradients"])
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.norm()) == pytest.approx(expected["gradients"][theirs[name]], rel=1e-3), name


@pytest.mark.parametrize("case", ["mask", "cascade"])
def test_detections_equal_detectron2_in_pixels_of_the_stored_image(case: str) -> None:
    stage, expected, batch = recorded(case).eval(), RECORD[case], recorded_batch()
    with torch.no_grad():
        detections = stored_detections(stage.predict(batch), batch)[0]
    assert [result["category_id"] for result in detections] == expected["classes"]
    assert [result["score"] for result in detections] == pytest.approx(expected["scores"], abs=1e-5)
    corners = [[x, y, x + w, y + h] for x, y, w, h in (result["bbox"] for result in detections)]
    torch.testing.assert_close(torch.tensor(corners), torch.tensor(expected["boxes"]), rtol=0, atol=1e-3)
    from pycocotools import mask as coco_mask

    areas = [int(coco_mask.area(result["segmentation"])) for result in detections]
    assert areas == pytest.approx(expected["mask_areas"], abs=1)


@pytest.mark.parametrize(("record", "decay_norms"), [("optimizer", False), ("optimizer_huge", True)])
def test_rates_and_weight_decay_are_detectron2s_for_every_parameter(record: str, decay_norms: bool) -> None:
    stage = recorded("cascade")
    object.__setattr__(stage, "options", stage.options.model_copy(update={"decay_norms": decay_norms}))
    theirs = named_theirs(stage)
    config = OptimConfig(lr=1e-4, weight_decay=0.1, layer_decay=0.7)
    ours = {
        theirs[name]: [group["lr_scale"], group["weight_decay"]]
        for group in parameter_groups(stage, config)
        for name in group["names"]
    }
    assert ours == RECORD["cascade"][record]
    decayed = {decay for _, decay in ours.values()}
    assert decayed == ({0.1} if decay_norms else {0.0, 0.1})


def small(**changes: Any) -> VitDetStage:
    torch.manual_seed(0)
    document = {"model": MODEL, "detector": SMALL} | changes
    return VitDetStage(validate(VitDetOptions, document, where="test"), DataFacts(("a", "b")))


def squares(num: int) -> Batch:
    """Images with an object of either class."""
    images = torch.randint(0, 255, (num, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = torch.zeros(2, 64, 64, dtype=torch.bool)
    pixels[0, 4:40, 4:40] = True
    pixels[1, 20:60, 30:60] = True
    boxes = torch.tensor([[4.0, 4, 40, 40], [30, 20, 60, 60]])
    instances = Instances(boxes, torch.tensor([0, 1]), tuple(encode_masks(pixels)), torch.zeros(2).long())
    return batch_of(images, [instances] * num)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "pyramid": "fpn",
            "detector": EVERY_ANCHOR | {"head_norm": "batch"},
            "model": MODEL | {"window": 3, "global_blocks": [1], "relative_positions": "shared"},
        },
        {"detector": EVERY_ANCHOR | {"cascade": True, "head_norm": "none"}},
        {"detector": EVERY_ANCHOR | {"masks": False}},
    ],
)
def test_every_parameter_of_every_variant_gets_a_gradient(changes: dict[str, Any]) -> None:
    stage = small(**changes)
    batch = squares(2)
    stage.loss(batch).total.backward()
    without = [n for n, p in stage.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    with torch.no_grad():
        predictions = stage.eval().predict(batch)
    assert ("masks" in predictions) == stage.options.detector.masks


def test_a_detector_of_boxes_alone_trains_evaluates_and_is_drawn_on_data_without_masks() -> None:
    stage = small(detector=SMALL | {"masks": False, "score_threshold": 0.0})
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (90, 120, 30)).save(buffer, "PNG")
    objects = [{"bbox": [5, 6, 30, 24], "category_id": 1}, {"bbox": [0, 0, 64, 48], "category_id": 0, "iscrowd": 1}]
    members = {"png": buffer.getvalue(), "json": json.dumps({"annotations": objects}).encode()}
    sample = RawSample(0, "key", members)
    train, evaluate = (collate([stage.transform(way)(sample, 3)], [0], [3], [1.0], 0) for way in (True, False))
    losses = stage.loss(train)
    assert torch.isfinite(losses.total)
    assert "mask" not in losses.parts

    def predict(batch: Batch) -> Predictions:
        predictions = {name: value.detach() for name, value in stage.eval().predict(batch).items()}
        predictions["boxes"][0, 0], predictions["classes"][0, 0], predictions["scores"][0, 0] = (
            torch.tensor([5.0, 6, 35, 30]),
            1,
            1.0,
        )
        return {**predictions, "counts": torch.ones(1, dtype=torch.int64)}

    (evaluation,) = stage.evaluations().values()
    figures = evaluation(predict, lambda _: [evaluate], ("heldout",))
    assert figures["heldout/box_ap"] > 0.9
    assert not any("mask" in name for name in figures)
    (picture,) = stage.pictures(evaluate, predict(evaluate))
    assert [caption for caption, _ in picture.panels] == ["annotated", "detected"]


def test_images_without_objects_train_the_background() -> None:
    """Also where every image of a rank is such: ZeRO-3 needs the same modules called on every rank."""
    stage = small()
    empty = Instances(torch.zeros(0, 4), torch.zeros(0).long(), (), torch.zeros(0).long())
    losses = stage.loss(batch_of(squares(2).images, [empty, empty]))
    assert torch.isfinite(losses.total)
    assert losses.parts["mask"] == losses.parts["box"] == losses.parts["rpn_box"] == 0
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in stage.parameters())


def test_a_crowd_region_is_nobodys_target() -> None:
    stage, batch = small(), squares(1)
    assert batch.instances is not None
    instances = batch.instances[0]
    crowd = instances._replace(crowd=torch.tensor([0, 1]))
    single = instances._replace(
        boxes=instances.boxes[:1], labels=instances.labels[:1], masks=instances.masks[:1], crowd=torch.zeros(1).long()
    )
    assert batch.images is not None
    losses = [
        float(stage.loss(batch_of(batch.images, [objects])).total.detach()) for objects in (crowd, single, instances)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_an_absent_image_takes_no_part() -> None:
    stage, batch = small(), squares(2)
    weighed = Batch(batch.ids, batch.seeds, torch.tensor([1.0, 0.0]), 0, images=batch.images, instances=batch.instances)
    assert batch.instances is not None
    alone = batch_of(batch.images[:1], [batch.instances[0]])
    torch.testing.assert_close(stage.loss(weighed).total, stage.loss(alone).total)


def test_padding_is_zero_after_normalising_whatever_its_colour() -> None:
    stage, batch = small().eval(), squares(1)
    assert batch.images is not None
    assert batch.instances is not None
    cut = [batch.instances[0]._replace(view=fitted(48, 64, (64, 64)))]
    dark, bright = batch.images.clone(), batch.images.clone()
    dark[:, :, 48:], bright[:, :, 48:] = 0, 255
    with torch.no_grad():
        first, second = (stage.levels(batch_of(images, cut))[2] for images in (dark, bright))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL | {"cls_token": True}}, "cls_token"),
        ({"model": MODEL | {"image_size": 80}}, "a multiple of 4 patches, 64 pixels"),
        ({"crop_scale": (0.5, 1.0)}, "doesn't use crop_scale"),
        ({"jitter": (0.0, 1.0)}, "jitter"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**changes)


def test_anchors_are_centred_on_the_cells_corners_and_not_rounded() -> None:
    anchors = anchors_of((1, 2), 4.0, 32.0, (0.5, 1.0, 2.0), torch.device("cpu"))
    assert anchors.shape == (6, 4)
    torch.testing.assert_close(anchors[1], torch.tensor([-16.0, -16, 16, 16]))
    torch.testing.assert_close(anchors[4], torch.tensor([-12.0, -16, 20, 16]))
    sides = anchors[:3, 2:] - anchors[:3, :2]
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(sides.prod(1), torch.full((3,), 1024.0))


def test_sampling_takes_the_smallest_draws_and_fills_up_with_background() -> None:
    positive = torch.tensor([True, False, True, False, False, True])
    draws = torch.tensor([0.9, 0.1, 0.2, 0.3, 0.8, 0.4])
    chosen, rest = sample(positive, ~positive, 4, 0.5, draws)
    assert sorted(chosen.tolist()) == [2, 5]
    assert sorted(rest.tolist()) == [1, 3]
    chosen, rest = sample(positive & (draws > 0.5), ~positive, 4, 0.5, draws)
    assert (chosen.tolist(), sorted(rest.tolist())) == ([0], [1, 3, 4])


def test_a_region_is_pooled_from_the_level_of_its_size() -> None:
    levels = [torch.full((1, 1, side, side), float(i)) for i, side in enumerate((64, 32, 16, 8))]
    sides = [10.0, 56.0, 111.9, 112.1, 224.1, 500.0]
    boxes = torch.tensor([[0, 0, side, side] for side in sides]).clamp(max=255)
    pooled = pool(levels, [boxes], (4.0, 8.0, 16.0, 32.0), 2)
    # Clipping to the image makes the last one 255 pixels: one level above 224.
    assert pooled[:, 0, 0, 0].tolist() == [0.0, 0.0, 0.0, 1.0, 2.0, 2.0]


def test_masks_are_pasted_at_the_pixels_whose_centres_they_cover() -> None:
    full = torch.ones(1, 28, 28)
    pasted = paste_masks(full, torch.tensor([[2.4, 3.0, 7.6, 9.0]]), (12, 12))[0]
    rows, columns = pasted.nonzero().unbind(1)
    assert (rows.min(), rows.max()) == (3, 8)  # centres 3.5 ... 8.5
    assert (columns.min(), columns.max()) == (2, 7)  # centre 2.5 lies right of 2.4, 7.5 left of 7.6
    assert not paste_masks(full, torch.tensor([[5.0, 5, 5, 5]]), (12, 12)).any()  # a box of no area
