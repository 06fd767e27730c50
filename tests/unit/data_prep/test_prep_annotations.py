import json
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from data_prep.account import Refused
from data_prep.config import ImageConfig
from data_prep.samples.annotations import follow_image, parse_annotations
from data_prep.samples.images import Geometry, plan_geometry


def rectangle(x: int, y: int, w: int, h: int, size: tuple[int, int] = (80, 40)) -> dict[str, Any]:
    """A COCO annotation of a filled rectangle in an image of `size` (width, height)."""
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[y : y + h, x : x + w] = 1
    rle = coco_mask.encode(np.asfortranarray(pixels))
    segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    return {"bbox": [x, y, w, h], "category_id": 3, "iscrowd": 0, "area": w * h, "segmentation": segmentation}


def geometry(**options: Any) -> Geometry:
    return plan_geometry((80, 40), ImageConfig(**options))


def drawn(annotation: dict[str, Any]) -> np.ndarray:
    return coco_mask.decode(annotation["segmentation"])


def test_an_unchanged_image_keeps_its_annotations() -> None:
    item = rectangle(10, 5, 20, 10)
    assert follow_image([item], geometry(resize="no")) == [item]


def test_boxes_and_masks_follow_scaling() -> None:
    (item,) = follow_image([rectangle(20, 10, 40, 20)], geometry(size=20))
    assert item["bbox"] == [10, 5, 20, 10]
    expected = np.zeros((20, 40), np.uint8)
    expected[5:15, 10:30] = 1
    np.testing.assert_array_equal(drawn(item), expected)
    assert item["area"] == 200


def test_cutting_clips_objects_and_drops_those_outside() -> None:
    inside, across, outside = rectangle(30, 10, 10, 10), rectangle(10, 0, 20, 40), rectangle(0, 0, 15, 15)
    moved = follow_image([inside, across, outside], geometry(resize="center_crop", size=40))
    assert [item["bbox"] for item in moved] == [[10, 10, 10, 10], [0, 0, 10, 40]]
    assert [int(drawn(item).sum()) for item in moved] == [100, 400] == [item["area"] for item in moved]


@pytest.mark.parametrize("form", ["polygon", "uncompressed"])
def test_polygons_and_uncompressed_masks_become_compressed(form: str) -> None:
    reference = rectangle(10, 5, 20, 10)
    pixels = drawn(reference)
    if form == "polygon":
        segmentation: Any = [[10, 5, 30, 5, 30, 15, 10, 15]]
    else:
        flat = pixels.T.ravel()
        changes = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *changes, flat.size]).tolist()
        segmentation = {"size": [40, 80], "counts": counts}
    (item,) = follow_image([reference | {"segmentation": segmentation}], geometry(resize="no"))
    assert isinstance(item["segmentation"]["counts"], str)
    np.testing.assert_array_equal(drawn(item), pixels)


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"{}",
        b"[1]",
        b'[{"bbox": [1, 2, 3, 4]}]',
        b'[{"category_id": 1}]',
        b'[{"category_id": 1, "bbox": [1, 2, 3]}]',
        b'[{"category_id": 1, "bbox": [1, 2, 3, NaN]}]',
        b'[{"category_id": "cat", "bbox": [1, 2, 3, 4]}]',
        json.dumps([rectangle(1, 1, 2, 2, size=(40, 80))]).encode(),
        b'[{"category_id": 1, "bbox": [1, 2, 3, 4], "segmentation": {"size": [40, 80], "counts": "~~~"}}]',
    ],
)
def test_malformed_annotations_are_refused(raw: bytes) -> None:
    with pytest.raises(Refused) as refused:
        follow_image(parse_annotations(raw) or [], geometry(size=20))
    assert refused.value.reason == "annotations_invalid"


def test_no_annotations_are_not_an_empty_list_of_them() -> None:
    assert parse_annotations(None) is None
    assert parse_annotations(b"") is None
    assert parse_annotations(b"[]") == []
