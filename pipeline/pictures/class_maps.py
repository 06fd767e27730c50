"""Pictures of semantic segmentation: every class in its colour over the image."""

from __future__ import annotations

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from pipeline.data.batch import Batch, Instances
from pipeline.data.instances import view_instances
from pipeline.evaluate.segmentation import class_map
from pipeline.pictures.picture import PALETTE, Picture, first_present, sample_title


def class_map_pictures(batch: Batch, maps: Int[Tensor, "b h w"], *, most: int) -> list[Picture]:
    """The first present images of an evaluation batch, with each pixel's annotated and predicted class."""
    assert batch.images is not None
    assert batch.instances is not None
    pictures = []
    for i in first_present(batch, most):
        image, objects = batch.images[i].cpu(), batch.instances[i]
        panels = [("predicted", painted(image, maps[i]))]
        if len(objects.labels):
            truth = class_map(_in_view(objects), (image.shape[1], image.shape[2]))
            panels.insert(0, ("annotated", painted(image, truth)))
        pictures.append(Picture(sample_title(batch, i), tuple(panels)))
    return pictures


def _in_view(objects: Instances) -> Instances:
    """The objects where the batch's image shows them."""
    view = objects.view
    stored = view is not None and all(mask["size"] == list(view.source) for mask in objects.masks)
    return view_instances(objects, view) if stored and view is not None else objects


def painted(image: UInt8[Tensor, "3 h w"], classes: Int[Tensor, "h w"]) -> UInt8[Tensor, "3 h w"]:
    """Every class except the background, 0, in a colour of its own."""
    present = sorted({number for number in classes.flatten().tolist() if number})
    if not present:
        return image
    masks = torch.stack([classes == number for number in present])
    colours = [PALETTE[(number - 1) % len(PALETTE)] for number in present]
    drawn: Tensor = draw_segmentation_masks(image, masks, alpha=0.6, colors=colours)
    return drawn
