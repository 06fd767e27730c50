"""Stage segment: classes of pixels, their losses and their mean intersection over union."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from pipeline.config import validate
from pipeline.data.batch import Batch, Instances
from pipeline.data.images.views import View, fitted
from pipeline.errors import ConfigError
from pipeline.evaluate.base import Predictions
from pipeline.evaluate.segmentation import SegmentationEvaluation, class_map, stored_map
from pipeline.models.detection.masks import encode_masks
from pipeline.stages.base import DataFacts
from pipeline.stages.segment import SegmentOptions, SegmentStage

MODEL = {
    "width": 16, "depth": 4, "heads": 2, "image_size": 32, "patch_size": 8, "cls_token": False, "final_norm": False,
}  # fmt: skip


def build(**changes: Any) -> SegmentStage:
    torch.manual_seed(0)
    options = validate(SegmentOptions, {"model": MODEL, "channels": 8} | changes, where="test")
    return SegmentStage(options, DataFacts(("a", "b")))


def squares(view: View | None = None) -> Instances:
    """A large object of class b, a small one of class a on it."""
    height, width = (32, 32) if view is None else view.source
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 4:8, 4:8] = True
    masks[1, 2:20, 2:20] = True
    boxes = torch.tensor([[4.0, 4, 8, 8], [2, 2, 20, 20]])
    return Instances(boxes, torch.tensor([0, 1]), tuple(encode_masks(masks)), torch.zeros(2).long(), view)


def batch_of(instances: list[Instances]) -> Batch:
    number = torch.arange(len(instances))
    noise = torch.randint(0, 255, (len(instances), 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return Batch(number, number, torch.ones(len(number)), 0, images=noise.to(torch.uint8), instances=tuple(instances))


def test_smaller_objects_lie_above_larger_and_the_rest_is_background() -> None:
    classes = class_map(squares(), (32, 32))
    assert (int(classes[5, 5]), int(classes[10, 10]), int(classes[30, 30])) == (1, 2, 0)
    assert torch.bincount(classes.flatten()).tolist() == [32 * 32 - 18 * 18, 16, 18 * 18 - 16]


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_every_parameter_gets_a_gradient_and_the_loss_falls(head: str) -> None:
    stage = build(head=head)
    batch = batch_of([squares(), squares(fitted(32, 32, (32, 32)))])
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    losses = []
    for step in range(25):
        loss = stage.loss(batch).total
        loss.backward()
        if step == 0:
            assert [n for n, p in stage.named_parameters() if p.grad is None or not p.grad.any()] == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_the_linear_protocol_trains_the_head_alone() -> None:
    stage = build(freeze_trunk=True)
    assert {name.split(".")[0] for name, _ in stage.named_parameters() if stage.trainable(name)} == {"head"}


def test_padding_takes_no_part_in_the_loss() -> None:
    stage = build()
    cut = View((32, 32), fitted(32, 32, (32, 32)).box, (16, 32), canvas=(32, 32))
    whole = squares()
    below = torch.zeros(1, 32, 32, dtype=torch.bool)
    below[0, 20:] = True
    more = Instances(
        torch.cat([whole.boxes, torch.tensor([[0.0, 20, 32, 32]])]), torch.tensor([0, 1, 0]),
        (*whole.masks, *encode_masks(below)), torch.zeros(3).long(),
    )  # fmt: skip
    first, second = (stage.loss(batch_of([objects._replace(view=cut)])).total for objects in (whole, more))
    assert float(first.detach()) == float(second.detach())


def test_figures_equal_scikit_learn_in_pixels_of_the_stored_images() -> None:
    view = fitted(20, 40, (32, 32))
    truth = [squares(view), squares(view)]
    batch = batch_of(truth)
    maps = torch.randint(0, 3, (2, 32, 32), generator=torch.Generator().manual_seed(1))

    def predict(_: Batch) -> Predictions:
        return {"map": maps}

    measured = SegmentationEvaluation(("background", "a", "b"))(predict, lambda _: [batch], ("heldout",))
    true = np.concatenate([class_map(objects, (20, 40)).numpy().ravel() for objects in truth])
    predicted = np.concatenate([stored_map(shown, view).numpy().ravel() for shown in maps])
    expected = jaccard_score(true, predicted, average="macro")
    assert measured["heldout/miou"] == pytest.approx(expected, abs=1e-12)
    assert measured["heldout/pixel_accuracy"] == pytest.approx((true == predicted).mean(), abs=1e-12)
    assert measured.details["heldout/iou"]["iou"] == pytest.approx(
        jaccard_score(true, predicted, average=None).tolist()
    )


def test_a_map_comes_back_as_a_resize_to_the_nearest_pixel_would_bring_it() -> None:
    view = fitted(20, 40, (32, 32))
    shown = torch.arange(16).view(16, 1) * 100 + torch.arange(32)
    canvas = torch.cat([shown, torch.full((16, 32), -1)])
    expected = torch.nn.functional.interpolate(shown[None, None].double(), (20, 40), mode="nearest-exact")[0, 0].long()
    assert torch.equal(stored_map(canvas, view), expected)


def test_a_trunk_with_a_cls_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="cls_token"):
        build(model=MODEL | {"cls_token": True})
