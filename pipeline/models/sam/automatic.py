"""Automatic masks of everything in an image: prompts from a grid of points, filters, and removal of duplicates.

Legend: H W pixels of the image, P points decoded at a time, M masks that remain, K = 3 masks of a point, h w of a crop,
y x of a mask at the decoder's resolution.

Gives the same masks as segment-anything's `SamAutomaticMaskGenerator`, but filters by predicted IoU first, and draws,
enlarges and encodes only the masks that pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field
from scipy.ndimage import label  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.models.detection.masks import encode_masks
from pipeline.models.sam.decoder import MASKS_ONE_PROMPT
from pipeline.models.sam.predictor import EmbeddedImages, ImagePrompts, Predictor, model_prompts, stored_logits

EDGE = 20.0  # pixels; a mask that ends this close to a crop's edge was probably cut off by it
_PIXELS_AT_ONCE = 2**25  # of logits enlarged at a time: 128 MB in fp32


class AutomaticSettings(Config):
    """How masks are made and filtered. The defaults are segment-anything's."""

    points_per_side: int = Field(default=32, gt=0)
    points_per_batch: int = Field(default=64, gt=0)
    min_iou: float = Field(default=0.88, ge=0, lt=1)  # masks need a predicted IoU above this
    min_stability: float = Field(default=0.95, ge=0, le=1)  # IoU of the mask at a lower and a higher threshold
    stability_offset: float = Field(default=1.0, ge=0)  # of these thresholds, in logits
    nms: float = Field(default=0.7, gt=0, le=1)  # IoU of boxes above which the worse mask is dropped
    crop_layers: int = Field(default=0, ge=0)  # layer i cuts the image into 4 ** i crops
    crop_nms: float = Field(default=0.7, gt=0, le=1)  # the same between crops, where smaller crops' masks win
    crop_overlap: float = Field(default=512 / 1500, ge=0, lt=1)  # of crops, as a share of the image's shorter side
    crop_point_divisor: int = Field(default=1, gt=0)  # each layer divides points_per_side by it once more
    min_region_area: int = Field(default=0, ge=0)  # pixels; smaller holes are filled and islands removed
    max_area: float = Field(default=1.0, gt=0, le=1)  # masks that cover a larger share of the image are dropped


class AutomaticMask(NamedTuple):
    """One mask, with the fields of SA-1B's annotations."""

    segmentation: dict[str, object]  # COCO's compressed run lengths
    area: int  # pixels
    bbox: tuple[int, int, int, int]  # x, y of the first pixel; distance to the last one in x and y
    predicted_iou: float
    point_coords: tuple[float, float]
    stability_score: float
    crop_box: tuple[int, int, int, int]  # x, y, width, height


class _Masks(NamedTuple):
    """Candidate masks, in pixels of the whole image."""

    boxes: Int[Tensor, "m 4"]  # first and last pixel
    iou: Float[Tensor, " m"]
    stability: Float[Tensor, " m"]
    points: Float[Tensor, "m 2"]
    crops: Int[Tensor, "m 4"]
    encoded: list[dict[str, object]]

    def only(self, rows: Tensor) -> _Masks:
        """The masks at `rows`, in this order; or those where `rows` is True."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        encoded = [self.encoded[i] for i in rows.tolist()]
        return _Masks(
            self.boxes[rows], self.iou[rows], self.stability[rows], self.points[rows], self.crops[rows], encoded
        )


@torch.no_grad()
def automatic_masks(
    predictor: Predictor,
    image: UInt8[np.ndarray, "H W 3"] | EmbeddedImages,
    settings: AutomaticSettings | None = None,
) -> list[AutomaticMask]:
    """Masks of everything in an image, in the order of segment-anything's generator.

    An empty mask is never returned: its stability is 0, where the original computes NaN.

    Args:
        image: pixels, or one image that was embedded already and can't be cropped.

    Raises:
        ConfigError: the settings ask for crops of an embedded image.
    """
    settings = settings or AutomaticSettings()
    if isinstance(image, EmbeddedImages):
        if settings.crop_layers:
            raise ConfigError(
                "an embedded image can't be cropped", where="crop_layers", fix="set it to 0, or pass the pixels"
            )
        size = image.views[0].source
    else:
        size = (image.shape[0], image.shape[1])
    crops = [
        _crop_masks(predictor, image, size, crop, points, settings)
        for crop, points in _crops_with_points(size, settings)
    ]
    masks = _joined(crops)
    if len(crops) > 1:
        sides = masks.crops[:, 2:] - masks.crops[:, :2]
        masks = masks.only(nms(masks.boxes.float(), 1 / sides.prod(1).float(), settings.crop_nms))
    if settings.min_region_area > 0:
        masks = _cleaned(masks, settings)
    if settings.max_area < 1:
        areas = torch.tensor([_area(encoded) for encoded in masks.encoded])
        masks = masks.only(areas <= settings.max_area * size[0] * size[1])
    return _records(masks)


def crop_boxes(size: tuple[int, int], layers: int, overlap: float) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """(layer, (x0, y0, x1, y1)) of the whole image, then of every crop, column by column."""
    height, width = size
    yield 0, (0, 0, width, height)
    for layer in range(1, layers + 1):
        count = 2**layer
        shared = int(overlap * min(size) * (2 / count))
        w, h = (math.ceil((shared * (count - 1) + side) / count) for side in (width, height))
        for i, j in itertools.product(range(count), repeat=2):
            x, y = (w - shared) * i, (h - shared) * j
            yield layer, (x, y, min(x + w, width), min(y + h, height))


def point_grid(per_side: int) -> Float[Tensor, "n 2"]:
    """Centres of the cells of a grid over the unit square, row by row."""
    side = torch.from_numpy(np.linspace(1 / (2 * per_side), 1 - 1 / (2 * per_side), per_side))
    return torch.stack([side.repeat(per_side), side.repeat_interleave(per_side)], dim=1)


def _crops_with_points(
    size: tuple[int, int], settings: AutomaticSettings
) -> Iterator[tuple[tuple[int, int, int, int], Float[Tensor, "n 2"]]]:
    """Each crop with its points, in pixels of the crop. Crops without area are left out."""
    for layer, box in crop_boxes(size, settings.crop_layers, settings.crop_overlap):
        w, h = box[2] - box[0], box[3] - box[1]
        if w > 0 and h > 0:
            per_side = max(1, settings.points_per_side // settings.crop_point_divisor**layer)
            yield box, point_grid(per_side) * torch.tensor([w, h], dtype=torch.float64)


def _crop_masks(
    predictor: Predictor,
    image: UInt8[np.ndarray, "H W 3"] | EmbeddedImages,
    size: tuple[int, int],
    crop: tuple[int, int, int, int],
    points: Float[Tensor, "n 2"],
    settings: AutomaticSettings,
) -> _Masks:
    """The masks of one crop, without duplicates."""
    x0, y0, x1, y1 = crop
    if isinstance(image, EmbeddedImages):
        embedded = image
    else:
        embedded = predictor.embed([np.ascontiguousarray(image[y0:y1, x0:x1])])
    view = embedded.views[0]
    parts = []
    at_once = max(1, _PIXELS_AT_ONCE // max(view.shape[0] * view.shape[1], view.source[0] * view.source[1]))
    for first in range(0, len(points), settings.points_per_batch):
        chunk = points[first : first + settings.points_per_batch]
        prompts = model_prompts(ImagePrompts(chunk.unsqueeze(1)), view).to(predictor.model.device)
        attended = predictor.model.attend(embedded.embedded, prompts)
        guess = attended.iou[:, MASKS_ONE_PROMPT].float()
        good = guess > settings.min_iou if settings.min_iou > 0 else torch.ones_like(guess, dtype=torch.bool)
        rows = good.any(1).nonzero().flatten()
        if not len(rows):  # with ZeRO-3, all ranks must call the same modules the same number of times
            rows = torch.zeros(1, dtype=torch.int64, device=good.device)
        promising = type(attended)(*(part[rows] for part in attended))
        low = predictor.model.draw(embedded.embedded, promising, MASKS_ONE_PROMPT)[good[rows]]
        iou, origin = guess[good], chunk.repeat_interleave(good.sum(1).cpu(), dim=0)
        for start in range(0, len(low), at_once):
            part = slice(start, start + at_once)
            logits = stored_logits(low[part].unsqueeze(0), view)[0]
            parts.append(_filtered(logits, iou[part], origin[part], crop, size, settings))
    masks = _joined(parts)
    return masks.only(nms(masks.boxes.float(), masks.iou, settings.nms))


def _filtered(
    logits: Float[Tensor, "m h w"],
    iou: Float[Tensor, " m"],
    points: Float[Tensor, "m 2"],
    crop: tuple[int, int, int, int],
    size: tuple[int, int],
    settings: AutomaticSettings,
) -> _Masks:
    """The masks that are stable, not empty and not cut by the crop's edge, placed in the whole image."""
    stability = stability_scores(logits, settings.stability_offset)
    masks = logits > 0
    good = (stability >= settings.min_stability) & masks.flatten(1).any(1)
    masks = masks[good]
    offset = torch.tensor(crop[:2] * 2)
    boxes = mask_boxes(masks).cpu() + offset
    whole = torch.tensor([0, 0, size[1], size[0]])
    cut = ((boxes - torch.tensor(crop)).abs() <= EDGE) & ~((boxes - whole).abs() <= EDGE)
    inside = ~cut.any(1)
    masks, good = masks.cpu()[inside], good.cpu()
    x0, y0, x1, y1 = crop
    placed = F.pad(masks, (x0, size[1] - x1, y0, size[0] - y1))
    return _Masks(
        boxes[inside],
        iou.cpu()[good][inside],
        stability.cpu()[good][inside],
        points[good][inside] + torch.tensor(crop[:2]),
        torch.tensor(crop).expand(len(masks), 4),
        encode_masks(placed) if len(placed) else [],
    )


def stability_scores(logits: Float[Tensor, "m h w"], offset: float) -> Float[Tensor, " m"]:
    """IoU of each mask at the thresholds `offset` and -`offset`; 0 where both are empty."""
    high = (logits > offset).flatten(1).sum(1)
    low = (logits > -offset).flatten(1).sum(1)
    return high / low.clamp(min=1)


def mask_boxes(masks: Bool[Tensor, "m h w"]) -> Int[Tensor, "m 4"]:
    """x, y of the first and of the last column and row of each mask; masks must not be empty."""
    columns, rows = masks.any(1).to(torch.uint8), masks.any(2).to(torch.uint8)
    if not len(masks):
        return torch.zeros(0, 4, dtype=torch.int64, device=masks.device)
    x0, y0 = columns.argmax(1), rows.argmax(1)
    x1 = columns.shape[1] - 1 - columns.flip(1).argmax(1)
    y1 = rows.shape[1] - 1 - rows.flip(1).argmax(1)
    return torch.stack([x0, y0, x1, y1], dim=1)


def without_small_regions(
    mask: Bool[np.ndarray, "H W"], min_area: int, *, holes: bool
) -> tuple[Bool[np.ndarray, "H W"], bool]:
    """The mask with small holes filled, or without small islands (the largest stays), and whether anything changed.

    Pixels that touch at a corner are connected, in holes as in islands.
    """
    regions, count = label(~mask if holes else mask, structure=np.ones((3, 3)))
    sizes = np.bincount(regions.ravel(), minlength=count + 1)[1:]
    small = sizes < min_area
    if not small.any():
        return mask, False
    if holes:
        return np.isin(regions, [0, *(np.flatnonzero(small) + 1)]), True
    large = np.flatnonzero(~small) + 1
    return np.isin(regions, large if len(large) else [int(sizes.argmax()) + 1]), True


def _cleaned(masks: _Masks, settings: AutomaticSettings) -> _Masks:
    """The masks without small holes and islands, and without the duplicates this makes; unchanged masks win."""
    from pycocotools import mask as coco_mask

    pixels, untouched = [], []
    for encoded_mask in masks.encoded:
        mask = coco_mask.decode(encoded_mask).astype(bool)
        mask, filled = without_small_regions(mask, settings.min_region_area, holes=True)
        mask, removed = without_small_regions(mask, settings.min_region_area, holes=False)
        pixels.append(torch.from_numpy(np.ascontiguousarray(mask)))
        untouched.append(not filled and not removed)
    if not pixels:
        return masks
    stacked = torch.stack(pixels)
    boxes = mask_boxes(stacked)
    same = torch.tensor(untouched)
    encoded = [
        old if keep else encode_masks(new[None])[0]
        for old, new, keep in zip(masks.encoded, stacked, untouched, strict=True)
    ]
    changed = masks._replace(boxes=torch.where(same[:, None], masks.boxes, boxes), encoded=encoded)
    return changed.only(nms(boxes.float(), same.float(), max(settings.nms, settings.crop_nms)))


def _joined(parts: list[_Masks]) -> _Masks:
    if not parts:
        none = torch.zeros(0)
        return _Masks(torch.zeros(0, 4).long(), none, none, torch.zeros(0, 2).double(), torch.zeros(0, 4).long(), [])
    return _Masks(
        torch.cat([part.boxes for part in parts]),
        torch.cat([part.iou for part in parts]),
        torch.cat([part.stability for part in parts]),
        torch.cat([part.points for part in parts]),
        torch.cat([part.crops for part in parts]),
        list(itertools.chain.from_iterable(part.encoded for part in parts)),
    )


def _area(encoded: dict[str, object]) -> int:
    from pycocotools import mask as coco_mask

    return int(coco_mask.area(encoded))


def _records(masks: _Masks) -> list[AutomaticMask]:
    records = []
    for i, encoded in enumerate(masks.encoded):
        x0, y0, x1, y1 = masks.boxes[i].tolist()
        left, top, right, bottom = masks.crops[i].tolist()
        counts = encoded["counts"]
        segmentation = {"size": encoded["size"], "counts": counts.decode() if isinstance(counts, bytes) else counts}
        x, y = masks.points[i].tolist()
        records.append(
            AutomaticMask(
                segmentation,
                _area(encoded),
                (x0, y0, x1 - x0, y1 - y0),
                float(masks.iou[i]),
                (x, y),
                float(masks.stability[i]),
                (left, top, right - left, bottom - top),
            )
        )
    return records
