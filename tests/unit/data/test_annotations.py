"""COCO-style annotations to instances."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from pipeline.data.annotations import read_instances
from pipeline.data.batch import RawSample
from pipeline.data.images.decode import UnreadableSample


def annotation(bbox: list[float], label: int = 2, **changes: object) -> dict:
    pixels = np.zeros((20, 30), np.uint8, order="F")
    x, y, w, h = (int(max(0, number)) for number in bbox)
    pixels[y : y + h, x : x + w] = 1
    rle = coco_mask.encode(pixels)
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    return {"bbox": bbox, "category_id": label, "segmentation": segmentation, "iscrowd": 0, "area": w * h} | changes


def sample(*annotations: object) -> RawSample:
    return RawSample(0, "key", {"json": json.dumps({"annotations": annotations}).encode()})


def test_boxes_are_corners_and_masks_stay_encoded() -> None:
    instances = read_instances(sample(annotation([3, 4, 10, 5]), annotation([0, 0, 2, 2], 5, iscrowd=1)), 20, 30)
    assert instances.boxes.tolist() == [[3, 4, 13, 9], [0, 0, 2, 2]]
    assert instances.labels.tolist() == [2, 5]
    assert instances.crowd.tolist() == [0, 1]
    assert coco_mask.area(dict(instances.masks[0])) == 50


def test_boxes_are_clipped_and_those_without_area_left_out() -> None:
    outside, thin = annotation([40, 4, 10, 5]), annotation([3, 4, 10, 0.5])
    instances = read_instances(sample(outside, annotation([25, -2, 10, 5]), thin), 20, 30)
    assert instances.boxes.tolist() == [[25, 0, 30, 3]]
    assert len(instances.masks) == 1


def test_sa_1b_is_read_as_it_is() -> None:
    """Its annotations have no class, and much that nobody asks for."""
    mask = annotation([3, 4, 10, 5])["segmentation"]
    theirs = {
        "image": {"image_id": 1, "width": 30, "height": 20, "file_name": "sa_1.jpg"},
        "annotations": [
            {
                "id": 7,
                "segmentation": mask,
                "bbox": [3.0, 4.0, 9.0, 4.0],
                "area": 50,
                "predicted_iou": 0.93,
                "stability_score": 0.97,
                "crop_box": [0.0, 0.0, 30.0, 20.0],
                "point_coords": [[7.5, 6.0]],
            }
        ],
    }
    instances = read_instances(RawSample(0, "sa_1", {"json": json.dumps(theirs).encode()}), 20, 30)
    assert instances.labels.tolist() == [0]
    assert coco_mask.area(dict(instances.masks[0])) == 50


def test_boxes_alone_need_no_masks_and_look_at_none() -> None:
    plain = {"bbox": [3, 4, 10, 5], "category_id": 2}
    damaged = annotation([0, 0, 4, 4]) | {"segmentation": "no mask"}
    instances = read_instances(sample(plain, damaged), 20, 30, masks=False)
    assert instances.boxes.tolist() == [[3, 4, 13, 9], [0, 0, 4, 4]]
    assert instances.masks == ()
    assert instances.areas is not None
    assert instances.areas.tolist() == [50, 16]


def test_a_class_that_the_data_set_has_none_of_is_told() -> None:
    """COCO's own ids, from 1 to 90 for 80 classes, would otherwise end deep in a loss."""
    here = sample(annotation([3, 4, 10, 5], 90))
    assert read_instances(here, 20, 30).labels.tolist() == [90]
    for as_annotated in (True, False):
        with pytest.raises(UnreadableSample, match="category_id 90, and the data set's 80 classes are numbered from 0"):
            read_instances(here, 20, 30, as_annotated=as_annotated, num_classes=80)


def test_an_image_without_objects() -> None:
    instances = read_instances(sample(), 20, 30)
    assert instances.boxes.shape == (0, 4)
    assert instances.labels.dtype == torch.int64
    assert instances.masks == ()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (annotation([1, 2, 3, 4]) | {"bbox": [1, 2, 3]}, "expected 4"),
        (annotation([1, 2, 3, 4]) | {"bbox": [1, 2, float("nan"), 3]}, "isn't finite"),
        (annotation([1, 2, 3, 4], label=-1), "no class number"),
        (annotation([1, 2, 3, 4], segmentation=[[1, 2, 3]]), "indices"),
        (annotation([1, 2, 3, 4], segmentation={"size": [5, 5], "counts": "x"}), "a mask of size"),
        ("no mapping", "indices"),
        ({"bbox": [1, 2, 3, 4], "category_id": 1}, "an object without segmentation.*detector.masks: false"),
    ],
)
def test_damaged_annotations_are_unreadable(item: object, message: str) -> None:
    with pytest.raises(UnreadableSample, match=message):
        read_instances(sample(item), 20, 30)
    with pytest.raises(UnreadableSample, match="no json member"):
        read_instances(RawSample(0, "key", {}), 20, 30)
