"""Pictures of annotated and detected objects, drawn over the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from pipeline.data.batch import Batch, Instances
from pipeline.data.instances import decode_masks, view_mask
from pipeline.evaluate.base import Predictions
from pipeline.models.detection.masks import paste_masks
from pipeline.pictures.picture import PALETTE, Picture, enlarge, first_present, sample_title

MIN_SCORE = 0.5  # of a detection that is drawn
MIN_SIDE = 256  # pixels; smaller images are enlarged, so that labels can be read


def detection_pictures(
    batch: Batch, predictions: Predictions, classes: Sequence[str], *, most: int, min_score: float | None = None
) -> list[Picture]:
    """The first present images of an evaluation batch, with their annotated objects and with the detections.

    Args:
        predictions: stage `vitdet`'s.
        min_score: of a detection that is drawn; None: `MIN_SCORE`, and the best detection of an image without any above
            it, so that an early detector shows where it looks.
    """
    assert batch.images is not None
    assert batch.instances is not None
    pictures = []
    for i in first_present(batch, most):
        image = batch.images[i].cpu()
        objects = batch.instances[i]
        panels = [("detected", _detected(image, predictions, i, classes, min_score))]
        if len(objects.labels):
            panels.insert(0, ("annotated", _annotated(image, objects, classes)))
        pictures.append(Picture(sample_title(batch, i), tuple(panels)))
    return pictures


def _detected(
    image: Tensor, predictions: Predictions, row: int, classes: Sequence[str], min_score: float | None
) -> Tensor:
    count = int(predictions["counts"][row])
    scores = predictions["scores"][row, :count].cpu()
    shown = scores > (MIN_SCORE if min_score is None else min_score)
    if min_score is None and count and not shown.any():
        shown[0] = True  # the best come first
    boxes = predictions["boxes"][row, :count].float().cpu()[shown]
    numbers = predictions["classes"][row, :count].cpu()[shown].tolist()
    labels = [f"{classes[int(c)]} {s:.2f}" for c, s in zip(numbers, scores[shown].tolist(), strict=True)]
    masks = None
    if "masks" in predictions:
        pixels = predictions["masks"][row, :count].float().cpu()[shown]
        masks = paste_masks(pixels, boxes, (image.shape[1], image.shape[2]))
    return overlay(image, boxes, labels, masks)


def _annotated(image: Tensor, instances: Instances, classes: Sequence[str]) -> Tensor:
    """The annotated objects; those in pixels of the stored image are moved to where the batch's image shows them."""
    view = instances.view
    labels = [
        classes[label] + (" (crowd)" if crowd else "")
        for label, crowd in zip(instances.labels.tolist(), instances.crowd.tolist(), strict=True)
    ]
    boxes, masks = instances.boxes, instances.masks
    size = (image.shape[1], image.shape[2])
    if view is not None and instances.areas is not None and not masks:  # only stored objects come with areas
        boxes = view.shown(boxes)
    elif view is not None and all(mask["size"] == list(view.source) for mask in masks):
        boxes = view.shown(boxes)
        masks = tuple(view_mask(mask, view) for mask in masks)
    return overlay(image, boxes, labels, torch.as_tensor(decode_masks(masks, size)) if masks else None)


def overlay(
    image: UInt8[Tensor, "3 h w"], boxes: Tensor, labels: Sequence[str], masks: Tensor | None
) -> UInt8[Tensor, "3 h2 w2"]:
    """Labelled boxes, and masks if there are any, over an image, which is enlarged if it is small."""
    factor = max(1, -(-MIN_SIDE // min(image.shape[1], image.shape[2])))
    image = enlarge(image, factor)
    if len(boxes) == 0:
        return image
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(boxes))]
    if masks is not None:
        image = draw_segmentation_masks(image, enlarge(masks, factor), alpha=0.45, colors=colours)
    boxes = boxes * factor
    usable = (boxes[:, 2] >= boxes[:, 0]) & (boxes[:, 3] >= boxes[:, 1])
    if not usable.all():
        boxes, labels = boxes[usable], [label for label, good in zip(labels, usable.tolist(), strict=True) if good]
        colours = colours[: len(boxes)]
    drawn: Tensor = draw_bounding_boxes(image, boxes, labels=list(labels), colors=colours, width=2)
    return drawn
