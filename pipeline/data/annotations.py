"""COCO-style annotations of a sample to `Instances`.

The `json` member of a sample may hold `annotations`, a list of {bbox [x, y, width, height], category_id,
segmentation {size [h, w], counts (compressed, a string)}, iscrowd, area} in pixels of the stored image. Category ids
are class numbers from 0.

Rules: a box is clipped to the image; an object whose clipped box is narrower or lower than one pixel is left out, as
in detectron2's filter of empty instances; crowd regions stay and are marked, for a loss or an evaluation to pass over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from pipeline.data.batch import Instances, RawSample
from pipeline.data.images import UnreadableSample

MIN_SIDE = 1.0  # pixels


def read_instances(sample: RawSample, height: int, width: int) -> Instances:
    """The annotated objects of a sample's stored image of `height` x `width` pixels, those of no area left out.

    Raises:
        UnreadableSample: there are no annotations, or they aren't as described above.
    """
    data = sample.members.get("json")
    if data is None:
        raise UnreadableSample("no json member")
    try:
        objects = [_parse(item, height, width) for item in json.loads(data)["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise UnreadableSample(f"damaged annotations ({reason})") from error
    kept = [item for item in objects if item is not None]
    return Instances(
        boxes=torch.tensor([box for box, _, _, _ in kept], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([label for _, label, _, _ in kept], dtype=torch.int64),
        masks=tuple(mask for _, _, mask, _ in kept),
        crowd=torch.tensor([crowd for _, _, _, crowd in kept], dtype=torch.int64),
    )


def _parse(
    item: Any, height: int, width: int
) -> tuple[tuple[float, float, float, float], int, Mapping[str, object], int] | None:
    """(box as corners, label, mask, crowd) of one annotation, None for one without area."""
    x, y, w, h = (float(number) for number in item["bbox"])
    if not all(abs(number) < 1e9 for number in (x, y, w, h)):
        raise ValueError("a box that isn't finite")
    box = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    label = item["category_id"]
    if not isinstance(label, int) or label < 0:
        raise ValueError(f"category_id {label!r} is no class number")
    mask = item["segmentation"]
    size, counts = mask["size"], mask["counts"]
    if list(size) != [height, width] or not isinstance(counts, str):
        raise ValueError(f"a mask of size {size} on an image of {[height, width]}, or not run-length encoded")
    if box[2] - box[0] < MIN_SIDE or box[3] - box[1] < MIN_SIDE:
        return None
    return box, label, {"size": [height, width], "counts": counts.encode("ascii")}, int(bool(item.get("iscrowd", 0)))
