"""Evaluation of promptable segmentation: IoU after clicks and from boxes, and recall of automatic masks.

Legend: B images, Q objects of an image at most, K clicks, D masks of an image at most, L bytes of a mask's run lengths
at most, y x pixels of the stored image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from scipy.ndimage import distance_transform_edt  # type: ignore[import-untyped]
from torch import Tensor

from pipeline import ranks
from pipeline.data.batch import Batch
from pipeline.evaluate.base import Measured, Predict, Predictions, Sweep
from pipeline.evaluate.coco import Annotation, Truth, annotations_of, proposal_recalls
from pipeline.evaluate.collect import collect

NUM_CLICKS = 9
REPORTED_CLICKS = (1, 2, 3, 5, 9)
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, math.inf)}
"""COCO's: areas in pixels of the stored image."""


ImageMasks: TypeAlias = tuple[int, Truth, list[Annotation]]
"""An image's sample id, its objects, and its automatic masks as COCO's results."""


class Click(NamedTuple):
    """A point of the stored image."""

    x: int
    y: int
    foreground: bool


def next_click(
    truth: Bool[np.ndarray, "y x"],
    predicted: Bool[np.ndarray, "y x"] | None = None,
    clicked: Iterable[Click] = (),
) -> Click:
    """The click of a simulated user: in the middle of the largest error.

    The first click is the object's pixel farthest from its boundary. Later ones are the pixel farthest from the
    boundary of a false negative or a false positive region, whichever lies deeper; the image's border counts as a
    boundary. Ties go to false negatives, then to the first pixel in reading order. As in RITM's evaluation (Sofiiuk et
    al. 2021, `Clicker`), no pixel is clicked twice; where no other pixel is wrong, the first click is repeated.
    """
    fresh = np.ones_like(truth)
    for click in clicked:
        fresh[click.y, click.x] = False
    missed = truth if predicted is None else truth & ~predicted
    place, depth = _deepest(missed, fresh)
    if predicted is not None:
        other, other_depth = _deepest(predicted & ~truth, fresh)
        if other_depth > depth:
            return Click(*other, foreground=False)
        if depth == 0:
            place, _ = _deepest(truth, np.ones_like(truth))
    return Click(*place, foreground=True)


def _deepest(region: Bool[np.ndarray, "y x"], fresh: Bool[np.ndarray, "y x"]) -> tuple[tuple[int, int], float]:
    """The pixel (x, y) of a region, not clicked yet, that lies farthest from its boundary, and that distance; 0 where
    there is none.
    """
    if not region.any():
        return (0, 0), 0.0
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    depths = distance_transform_edt(np.pad(region[box], 1))[1:-1, 1:-1] * fresh[box]
    y, x = np.unravel_index(int(depths.argmax()), depths.shape)
    return (int(x) + int(columns[0]), int(y) + int(rows[0])), float(depths[y, x])


def iou(a: Bool[np.ndarray, "y x"], b: Bool[np.ndarray, "y x"]) -> float:
    """Intersection over union of two masks; 0 where both are empty."""
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 0.0


class PromptableEvaluation:
    """Mean IoU over a set's objects, after clicks and from boxes, and the recall of automatic masks.

    - `<set>/iou_clicks_{1,2,3,5,9}`: of the mask with the highest predicted IoU;
    - `<set>/iou_oracle_1`: of the best of the three masks after one click;
    - `<set>/iou_box`: from the annotated box;
    - the same of small, medium and large objects, with the suffix `_small` and so on, where there are any;
    - `<set>/num_objects`, and `<set>/objects_left_out` that the stage skipped, where there are any;
    - where the stage predicts automatic masks, `<set>/ar1000` (see `pipeline.evaluate.coco.proposal_recalls`) and
      `<set>/masks_per_image`.

    The stage predicts `clicks` [B,Q,K], `oracle`, `box` and `area` [B,Q] (absent objects NaN) and `left_out` [B], and
    may predict `everything` [B,D,L] and `everything_scores` [B,D], as `packed_masks` makes them.
    """

    def __call__(self, predict: Predict, sweep: Sweep, names: tuple[str, ...]) -> Measured:
        """Collective."""
        figures: dict[str, float] = {}
        details: dict[str, Any] = {}
        for name in names:
            local_images: list[ImageMasks] = []

            def predict_and_record(batch: Batch, images: list[ImageMasks] = local_images) -> Predictions:
                predictions = predict(batch)
                images.extend(_automatic_masks(predictions, batch))
                return predictions

            names_of_trials = ("clicks", "oracle", "box", "area", "left_out")
            measured, curve = _click_figures(collect(predict_and_record, sweep(name), names_of_trials))
            measured |= _recall_figures(local_images)
            figures |= {f"{name}/{key}": value for key, value in measured.items()}
            if curve:
                details[f"{name}/iou_by_clicks"] = curve
        return Measured(figures, details)


def _click_figures(trials: Mapping[str, Tensor]) -> tuple[dict[str, float], list[float]]:
    """Figures of clicks and boxes, and the mean IoU after each click; both empty where there are no objects."""
    area = trials["area"].flatten() if trials else torch.zeros(0)
    present = ~area.isnan()
    if not present.any():
        return {}, []
    clicks = trials["clicks"].flatten(0, 1)[present].double()
    columns = {f"iou_clicks_{k}": clicks[:, k - 1] for k in REPORTED_CLICKS}
    columns["iou_oracle_1"] = trials["oracle"].flatten()[present].double()
    columns["iou_box"] = trials["box"].flatten()[present].double()
    area = area[present]
    figures = {"num_objects": float(len(area))}
    if left_out := float(trials["left_out"].sum()):
        figures["objects_left_out"] = left_out
    for title, values in columns.items():
        figures[title] = values.mean().item()
        for size, (low, high) in SIZES.items():
            of_size = (area >= low) & (area < high)
            if of_size.any():
                figures[f"{title}_{size}"] = values[of_size].mean().item()
    return figures, clicks.mean(0).tolist()


def _recall_figures(local_images: list[ImageMasks]) -> dict[str, float]:
    """Figures of automatic masks. Collective: every rank's images are gathered, and the first rank measures."""
    images = sorted((image for part in ranks.gather(local_images) for image in part), key=lambda image: image[0])
    if not images:
        return {}
    truth = {number: objects for number, objects, _ in images}
    masks = [mask for _, _, image_masks in images for mask in image_masks]
    recalls = ranks.from_first(lambda: proposal_recalls(truth, masks))
    return recalls | {"masks_per_image": len(masks) / len(images)}


def _automatic_masks(predictions: Predictions, batch: Batch) -> list[ImageMasks]:
    """The automatic masks of each present image, where the stage predicts any."""
    if "everything" not in predictions:
        return []
    assert batch.instances is not None
    images = []
    for i in (batch.weight > 0).nonzero().flatten().tolist():
        number, instances = int(batch.ids[i]), batch.instances[i]
        assert instances.view is not None
        size = instances.view.source
        results = unpacked_masks(predictions["everything"][i], predictions["everything_scores"][i], size)
        masks = [{"image_id": number, **result} for result in results]
        images.append((number, Truth(size, annotations_of(instances, number)), masks))
    return images


def packed_masks(
    images: Sequence[Sequence[tuple[str, float]]],
) -> tuple[UInt8[Tensor, "b d l"], Float[Tensor, "b d"]]:
    """Masks of images as tensors: the characters of COCO's compressed run lengths, padded with zeros, and scores,
    padded with NaN.

    Args:
        images: (run lengths, score) of each image's masks.
    """
    most = max((len(masks) for masks in images), default=0)
    longest = max((len(counts) for masks in images for counts, _ in masks), default=0)
    bytes_of = torch.zeros(len(images), most, longest, dtype=torch.uint8)
    scores = torch.full((len(images), most), math.nan, dtype=torch.float64)
    for i, masks in enumerate(images):
        for j, (counts, score) in enumerate(masks):
            bytes_of[i, j, : len(counts)] = torch.frombuffer(bytearray(counts, "ascii"), dtype=torch.uint8)
            scores[i, j] = score
    return bytes_of, scores


def unpacked_masks(
    packed: UInt8[Tensor, "d l"], scores: Float[Tensor, " d"], size: tuple[int, int]
) -> list[Annotation]:
    """One image's masks as COCO's results, without `image_id`."""
    present = (~scores.isnan()).nonzero().flatten().tolist()
    counts = [bytes(packed[j].cpu().numpy()).rstrip(b"\0") for j in present]
    return [
        {"category_id": 0, "segmentation": {"size": list(size), "counts": text}, "score": float(scores[j])}
        for j, text in zip(present, counts, strict=True)
    ]


def padded_rows(rows: list[list[float]], width: int) -> Float[Tensor, "b width"]:
    """Rows of unequal length as a tensor, padded with NaN."""
    return torch.tensor([row + [math.nan] * (width - len(row)) for row in rows])
