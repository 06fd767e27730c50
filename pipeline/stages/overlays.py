"""Pictures of detections and of what there is to detect, drawn over the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from pipeline.data.batch import Batch, Instances
from pipeline.data.instances import decode_masks, view_instances, view_mask
from pipeline.evaluate.base import Predictions
from pipeline.evaluate.segmentation import class_map
from pipeline.models.detection.masks import paste_masks
from pipeline.stages.base import Picture

SHOWN_ABOVE = 0.5  # score of a detection that is drawn
SMALLEST_SIDE = 256  # pixels; smaller images are enlarged, so that labels can be read
PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324", "#800000", "#000075")


def detection_pictures(
    batch: Batch, predictions: Predictions, classes: Sequence[str], *, most: int, above: float | None = None
) -> list[Picture]:
    """The first present images of an evaluation batch, with their objects and with what was found.

    Args:
        above: score of a detection that is drawn; None: `SHOWN_ABOVE`, or the surest one of an image that has none, so
            that a detector at its beginning shows where it looks.
    """
    assert batch.images is not None
    assert batch.instances is not None
    pictures = []
    for i in (batch.weight > 0).nonzero().flatten()[:most].tolist():
        image = batch.images[i].cpu()
        truth = batch.instances[i]
        count = int(predictions["counts"][i])
        shown = (predictions["scores"][i, :count] > (SHOWN_ABOVE if above is None else above)).cpu()
        if above is None and count and not shown.any():
            shown[0] = True  # the best come first
        boxes = predictions["boxes"][i, :count].float().cpu()[shown]
        labels = [
            f"{classes[int(c)]} {s:.2f}"
            for c, s in zip(
                predictions["classes"][i, :count].cpu()[shown].tolist(),
                predictions["scores"][i, :count].cpu()[shown].tolist(),
                strict=True,
            )
        ]
        masks = None
        if "masks" in predictions:
            masks = paste_masks(
                predictions["masks"][i, :count].float().cpu()[shown], boxes, (image.shape[1], image.shape[2])
            )
        found = overlay(image, boxes, labels, masks)
        panels = [("found", found)]
        if len(truth.labels):
            panels.insert(0, ("there is", _truth(image, truth, classes)))
        pictures.append(Picture(f"sample {int(batch.ids[i])}", tuple(panels)))
    return pictures


def class_map_pictures(batch: Batch, maps: Tensor, classes: Sequence[str], *, most: int) -> list[Picture]:
    """The first present images of an evaluation batch, with each pixel's class as it is and as it was told."""
    assert batch.images is not None
    assert batch.instances is not None
    pictures = []
    for i in (batch.weight > 0).nonzero().flatten()[:most].tolist():
        image, truth = batch.images[i].cpu(), batch.instances[i]
        size = (image.shape[1], image.shape[2])
        panels = [("told", _painted(image, maps[i], classes))]
        if len(truth.labels):
            view = truth.view
            stored = view is not None and all(mask["size"] == list(view.source) for mask in truth.masks)
            shown = view_instances(truth, view) if stored and view is not None else truth
            panels.insert(0, ("there is", _painted(image, class_map(shown, size), classes)))
        pictures.append(Picture(f"sample {int(batch.ids[i])}", tuple(panels)))
    return pictures


def _painted(image: Tensor, numbers: Tensor, classes: Sequence[str]) -> Tensor:
    """Every class but the background in a colour of its own."""
    present = sorted({number for number in numbers.flatten().tolist() if number})
    if not present:
        return image
    masks = torch.stack([numbers == number for number in present])
    colours = [PALETTE[(number - 1) % len(PALETTE)] for number in present]
    painted: Tensor = draw_segmentation_masks(image, masks, alpha=0.6, colors=colours)
    return painted


def overlay(
    image: UInt8[Tensor, "3 h w"], boxes: Tensor, labels: Sequence[str], masks: Tensor | None
) -> UInt8[Tensor, "3 h2 w2"]:
    """Boxes with labels, and masks where given, over an image, enlarged where it is small."""
    factor = max(1, -(-SMALLEST_SIDE // min(image.shape[1], image.shape[2])))
    image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    if len(boxes) == 0:
        return image
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(boxes))]
    if masks is not None:
        large = masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        image = draw_segmentation_masks(image, large, alpha=0.45, colors=colours)
    boxes = boxes * factor
    usable = (boxes[:, 2] >= boxes[:, 0]) & (boxes[:, 3] >= boxes[:, 1])
    if not usable.all():
        boxes, labels = boxes[usable], [label for label, good in zip(labels, usable.tolist(), strict=True) if good]
        colours = colours[: len(boxes)]
    drawn: Tensor = draw_bounding_boxes(image, boxes, labels=list(labels), colors=colours, width=2)
    return drawn


def _truth(image: Tensor, instances: Instances, classes: Sequence[str]) -> Tensor:
    """The objects, put into view where they are those of the stored image."""
    view = instances.view
    labels = [
        classes[label] + (" (crowd)" if crowd else "")
        for label, crowd in zip(instances.labels.tolist(), instances.crowd.tolist(), strict=True)
    ]
    boxes, masks = instances.boxes, instances.masks
    size = (image.shape[1], image.shape[2])
    if view is not None and instances.areas is not None and not masks:  # areas are those of stored objects
        boxes = view.shown(boxes)
    elif view is not None and all(mask["size"] == list(view.source) for mask in masks):
        boxes = view.shown(boxes)
        masks = tuple(view_mask(mask, view) for mask in masks)
    return overlay(image, boxes, labels, torch.as_tensor(decode_masks(masks, size)) if masks else None)
