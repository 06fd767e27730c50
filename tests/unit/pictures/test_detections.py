"""What a detector's pictures show."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.batch import Batch, Instances
from pipeline.pictures.detections import detection_pictures

NOTHING = torch.zeros(0, dtype=torch.int64)
NOBODY = Instances(boxes=torch.zeros(0, 4), labels=NOTHING, masks=(), crowd=NOTHING)


def detected_panel(scores: list[float], min_score: float | None) -> tuple[Tensor, Tensor]:
    """The picture of a gray image with detections of such scores, and the image as large as it."""
    image = torch.full((1, 3, 256, 256), 128, dtype=torch.uint8)
    batch = Batch(
        ids=torch.arange(1), seeds=torch.arange(1), weight=torch.ones(1), position=0, images=image, instances=(NOBODY,)
    )
    corner = torch.arange(len(scores)).view(-1, 1) * 40.0
    predictions = {
        "boxes": (torch.tensor([[10.0, 10.0, 40.0, 40.0]]) + corner).unsqueeze(0),
        "scores": torch.tensor([scores]),
        "classes": torch.zeros(1, len(scores), dtype=torch.int64),
        "counts": torch.tensor([len(scores)]),
    }
    (picture,) = detection_pictures(batch, predictions, ("thing",), most=1, min_score=min_score)
    return dict(picture.panels)["detected"], image[0]


def drawn(picture: Tensor, image: Tensor, corner: int) -> bool:
    """Whether there is a box from (corner, corner)."""
    return not torch.equal(picture[:, corner : corner + 20, corner], image[:, corner : corner + 20, corner])


def test_sure_detections_are_drawn_and_no_others() -> None:
    picture, image = detected_panel([0.9, 0.3], None)
    assert drawn(picture, image, 10)
    assert not drawn(picture, image, 50)


def test_an_unsure_detector_shows_its_best_guess() -> None:
    picture, image = detected_panel([0.3, 0.2], None)
    assert drawn(picture, image, 10)
    assert not drawn(picture, image, 50)


def test_a_threshold_that_was_asked_for_holds() -> None:
    picture, image = detected_panel([0.3, 0.2], 0.5)
    assert torch.equal(picture, image)


def test_nothing_found_is_nothing_drawn() -> None:
    picture, image = detected_panel([], None)
    assert torch.equal(picture, image)
