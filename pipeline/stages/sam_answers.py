"""Segment Anything's answers about an image: masks of prompts, or of everything, as COCO and SA-1B have them.

Legend: H W pixels of the stored image, K masks of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, UInt8
from pycocotools import mask as coco_mask
from torch import Tensor

from pipeline.data.images.views import View
from pipeline.models.detection.masks import encode_masks
from pipeline.models.sam.automatic import AutomaticMask
from pipeline.models.sam.predictor import ImagePrompts, PredictedMasks
from pipeline.pictures.prompted import automatic_picture, object_picture
from pipeline.stages.questions import Answer


def prompted_answer(
    image: UInt8[Tensor, "3 _ _"], view: View, prompts: ImagePrompts, predicted: PredictedMasks
) -> Answer:
    """The masks of each object, best first; `image` is as the model sees it, with padding."""
    objects, pictures = [], []
    for number in range(len(predicted.iou)):
        order = predicted.iou[number].argsort(descending=True)
        masks = (predicted.logits[number][order] > 0).cpu()
        ious = predicted.iou[number][order].tolist()
        objects.append({"masks": [mask_facts(mask, iou) for mask, iou in zip(masks, ious, strict=True)]})
        pictures.append(object_picture(image, view, prompts, number, masks, ious))
    return Answer({"objects": objects}, tuple(pictures))


def automatic_answer(image: UInt8[Tensor, "3 _ _"], view: View, masks: Sequence[AutomaticMask]) -> Answer:
    """Masks of everything as SA-1B's annotations, best first; `image` is as the model sees it, with padding."""
    ordered = sorted(masks, key=lambda mask: -mask.predicted_iou)
    annotations = [{**mask._asdict(), "id": number} for number, mask in enumerate(ordered)]
    return Answer({"annotations": annotations}, (automatic_picture(image, view, ordered),))


def mask_facts(mask: Bool[Tensor, "H W"], predicted_iou: float) -> dict[str, Any]:
    """A mask as COCO has it: run-length encoded, with its box (x, y, width, height) and its area in pixels."""
    encoded = encode_masks(mask[None])[0]
    counts = encoded["counts"]
    return {
        "segmentation": {"size": list(mask.shape), "counts": counts.decode() if isinstance(counts, bytes) else counts},
        "bbox": coco_mask.toBbox(encoded).tolist(),
        "area": int(mask.sum()),
        "predicted_iou": predicted_iou,
    }
