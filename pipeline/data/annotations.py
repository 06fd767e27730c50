"""COCO-style annotations of a sample to `Instances`.

The `json` member of a sample may hold `annotations`, a list of {bbox [x, y, width, height], category_id,
segmentation {size [h, w], counts (compressed, a string)}, iscrowd, area} in pixels of the stored image. Category ids
are class numbers from 0; without one, as in SA-1B, whose json members are read as they are, an object is of class 0.

Rules: a box is clipped to the image; an object whose clipped box is narrower or lower than one pixel is left out, as
in detectron2's filter of empty instances; crowd regions stay and are marked, for a loss or an evaluation to pass over.
An evaluation takes every object as annotated instead, since COCO's figures count them so. Objects need a mask only
where masks are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from pipeline.data.batch import Instances, RawSample
from pipeline.data.images.decode import UnreadableSample

MIN_SIDE = 1.0  # pixels


def read_instances(
    sample: RawSample,
    height: int,
    width: int,
    *,
    as_annotated: bool = False,
    masks: bool = True,
    num_classes: int | None = None,
) -> Instances:
    """The annotated objects of a sample's stored image of `height` x `width` pixels, by the rules above.

    Args:
        as_annotated: keep every object and every box as it is, for an evaluation.
        num_classes: of the data set, among which every object's must be; None: any number will do.
        masks: read masks, which every object must have then; False: boxes alone, masks aren't looked at.

    Raises:
        UnreadableSample: there are no annotations, or they aren't as described above.
    """
    data = sample.member("json")
    if data is None:
        raise UnreadableSample("no json member, which holds the objects")
    try:
        objects = [_parse(item, height, width, as_annotated, masks) for item in json.loads(data)["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise UnreadableSample(f"damaged annotations ({reason})") from error
    present = [item for item in objects if item is not None]
    if num_classes is not None and any(item.label >= num_classes for item in present):
        highest = max(item.label for item in present)
        raise UnreadableSample(f"category_id {highest}, and the data set's {num_classes} classes are numbered from 0")
    return Instances(
        boxes=torch.tensor([item.box for item in present], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([item.label for item in present], dtype=torch.int64),
        masks=tuple(item.mask for item in present if item.mask is not None),
        crowd=torch.tensor([item.crowd for item in present], dtype=torch.int64),
        areas=torch.tensor([item.area for item in present], dtype=torch.float32),
    )


class _Object(NamedTuple):
    box: tuple[float, float, float, float]  # corners
    label: int
    mask: Mapping[str, object] | None  # None: not asked for
    crowd: int
    area: float


def _parse(item: Any, height: int, width: int, as_annotated: bool, masks: bool) -> _Object | None:
    """One annotation; None for one without area."""
    x, y, w, h = (float(number) for number in item["bbox"])
    area = float(item.get("area", w * h))
    if not all(abs(number) < 1e9 for number in (x, y, w, h)) or not 0 <= area < 1e18:
        raise ValueError("a box or an area that isn't finite")
    box = (x, y, x + w, y + h)
    if not as_annotated:
        box = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    label = item.get("category_id", 0)
    if not isinstance(label, int) or label < 0:
        raise ValueError(f"category_id {label!r} is no class number")
    mask = _mask_of(item, height, width) if masks else None
    if not as_annotated and (box[2] - box[0] < MIN_SIDE or box[3] - box[1] < MIN_SIDE):
        return None
    return _Object(box, label, mask, int(bool(item.get("iscrowd", 0))), area)


def _mask_of(item: Any, height: int, width: int) -> dict[str, object]:
    if not item.get("segmentation"):
        raise ValueError(
            "an object without segmentation, and masks are learnt or measured here; a detector of boxes alone, "
            "options.detector.masks: false, needs none"
        )
    mask = item["segmentation"]
    size, counts = mask["size"], mask["counts"]
    if list(size) != [height, width] or not isinstance(counts, str):
        raise ValueError(f"a mask of size {size} on an image of {[height, width]}, or not run-length encoded")
    return {"size": [height, width], "counts": counts.encode("ascii")}
