"""COCO annotations that follow their image through scaling and cutting.

In: a JSON list as COCO's `annotations`, in pixels of the upright source: `bbox` [x, y, w, h], `category_id`,
`iscrowd`, `area`, and a `segmentation` as polygons, uncompressed or compressed RLE. Out: the same in pixels of the
stored image, masks as compressed RLE. Objects outside the cut are dropped; an unchanged image keeps its
annotations, except for the masks' form.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from data_prep.account import Refused
from data_prep.samples.images import Geometry

_PASSED_ON = ("id", "predicted_iou", "stability_score")  # SA-1B's judgement of its masks
_FARTHEST = 100_000  # pixels; rasterising takes memory in proportion to a polygon's length


def parse_annotations(raw: bytes | None) -> list[dict[str, Any]] | None:
    """A row's annotations; None where it has none.

    Raises:
        Refused: annotations_invalid.
    """
    if raw is None or not raw.strip():
        return None
    try:
        annotations = json.loads(raw)
    except ValueError as error:
        raise Refused("annotations_invalid", f"not JSON ({error})") from None
    if annotations is None:
        return None
    if not isinstance(annotations, list) or not all(isinstance(item, dict) for item in annotations):
        raise Refused("annotations_invalid", "not a JSON list of objects")
    return annotations


def follow_image(annotations: list[dict[str, Any]], geometry: Geometry) -> list[dict[str, Any]]:
    """The annotations in pixels of the stored image.

    Raises:
        Refused: annotations_invalid, also where a mask doesn't fit the source's size.
    """
    try:
        moved = (_follow_one(item, geometry) for item in annotations)
        return [item for item in moved if item is not None]
    except Refused:
        raise
    except Exception as error:  # pycocotools raises anything on malformed masks
        raise Refused("annotations_invalid", f"{type(error).__name__}: {error}") from None


def _follow_one(item: dict[str, Any], geometry: Geometry) -> dict[str, Any] | None:
    category = 0 if _PASSED_ON[1] in item else item["category_id"]  # SA-1B's objects have no category
    if isinstance(category, bool) or not isinstance(category, int):
        raise Refused("annotations_invalid", f"category_id {category!r} is not an integer")
    result: dict[str, Any] = {"category_id": category, "iscrowd": int(item.get("iscrowd", 0))}
    result |= {name: item[name] for name in _PASSED_ON if name in item}
    mask = _compressed(item["segmentation"], geometry.source) if item.get("segmentation") else None
    if geometry.unchanged:
        box = _numbers(item["bbox"])
        area = item.get("area")
        return result | {"bbox": box, "area": area if area is not None else box[2] * box[3]} | _segmentation(mask)
    moved = _move_box(_numbers(item["bbox"]), geometry)
    if moved is None:
        return None
    area = item.get("area", item["bbox"][2] * item["bbox"][3]) * _area_scale(geometry)
    if mask is not None:
        mask = _move_mask(mask, geometry)
        if mask is None:
            return None
        from pycocotools import mask as coco_mask

        area = int(coco_mask.area(mask))
    else:
        area = round(min(area, moved[2] * moved[3]), 2)
    return result | {"bbox": moved, "area": area} | _segmentation(mask)


def _numbers(box: Any) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(math.isfinite(float(v)) for v in box):
        raise Refused("annotations_invalid", f"bbox {box!r} isn't four numbers")
    return box


def _move_box(box: list[float], geometry: Geometry) -> list[float] | None:
    """[x, y, w, h] after scaling and cutting, to a hundredth of a pixel; None where nothing remains."""
    sx, sy = (new / old for new, old in zip(geometry.scaled, geometry.source, strict=True))
    left = max(0.0, box[0] * sx - geometry.left)
    top = max(0.0, box[1] * sy - geometry.top)
    right = min(float(geometry.width), (box[0] + box[2]) * sx - geometry.left)
    bottom = min(float(geometry.height), (box[1] + box[3]) * sy - geometry.top)
    if right <= left or bottom <= top:
        return None
    return [round(value, 2) for value in (left, top, right - left, bottom - top)]


def _area_scale(geometry: Geometry) -> float:
    return geometry.scaled[0] * geometry.scaled[1] / (geometry.source[0] * geometry.source[1])


def _compressed(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Polygons or an RLE as one compressed RLE."""
    from pycocotools import mask as coco_mask

    width, height = size
    if isinstance(segmentation, list):
        if any(abs(value) > _FARTHEST for polygon in segmentation for value in polygon):
            raise Refused("annotations_invalid", "a polygon with corners far outside the image")
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = {"size": segmentation["size"], "counts": segmentation["counts"].encode("ascii")}
    if list(rle["size"]) != [height, width]:
        raise Refused("annotations_invalid", f"a mask of {rle['size']} for an upright image of {[height, width]}")
    # pycocotools doesn't check runs, so those that don't fill the mask exactly must not reach it.
    if not isinstance(segmentation, list):
        runs = segmentation["counts"] if isinstance(segmentation["counts"], list) else run_lengths(rle["counts"])
        if min(runs, default=-1) < 0 or sum(runs) != width * height:
            raise Refused("annotations_invalid", f"a mask whose runs sum to {sum(runs)}, not {width * height}")
    return dict(rle)


def run_lengths(counts: bytes) -> list[int]:
    """Runs of COCO's compressed RLE: 5 bits a character, little end first, from the third on relative to the last but
    one (cocoapi, maskApi.c, rleFrString).
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        digit = character - 48
        value |= (digit & 0x1F) << shift
        shift += 5
        if digit & 0x20:
            continue
        if digit & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs


def _move_mask(rle: dict[str, Any], geometry: Geometry) -> dict[str, Any] | None:
    from pycocotools import mask as coco_mask

    pixels = Image.fromarray(coco_mask.decode(rle) * np.uint8(255))
    if geometry.scaled != geometry.source:
        pixels = pixels.resize(geometry.scaled, Image.Resampling.BILINEAR)
    box = (geometry.left, geometry.top, geometry.left + geometry.width, geometry.top + geometry.height)
    cut: Shaped[np.ndarray, "h w"] = np.asarray(pixels.crop(box)) >= 128
    if not cut.any():
        return None
    return dict(coco_mask.encode(np.asfortranarray(cut.astype(np.uint8))))


def _segmentation(rle: dict[str, Any] | None) -> dict[str, Any]:
    if rle is None:
        return {}
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"segmentation": {"size": [int(v) for v in rle["size"]], "counts": text}}
