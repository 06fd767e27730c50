"""Masks over images: what evaluations of Segment Anything found, and answers to a person's prompts.

Legend: H W pixels of the stored image, h w of what is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_segmentation_masks

from pipeline.data.batch import Batch, Instances
from pipeline.data.images.views import View
from pipeline.data.instances import decode_masks, view_mask
from pipeline.evaluate.base import Predictions
from pipeline.evaluate.promptable import NUM_CLICKS
from pipeline.models.detection.masks import encode_masks
from pipeline.models.sam.automatic import AutomaticMask
from pipeline.models.sam.predictor import ImagePrompts, PredictedMasks
from pipeline.stages.base import Answer, Picture
from pipeline.stages.overlays import PALETTE
from pipeline.stages.sam_trials import SHOWN

NUM_PICTURES = 8
SMALLEST_SIDE = 192  # pixels; smaller pictures are enlarged
BLUE, GREEN, RED = (40, 120, 255), (40, 200, 80), (235, 60, 60)


def answer_of(image: UInt8[Tensor, "3 _ _"], view: View, ask: ImagePrompts, found: PredictedMasks) -> Answer:
    """Each prompt's masks, best first, as facts; and over the image."""
    objects, pictures = [], []
    h, w = view.size
    shown = image[:, :h, :w].cpu()
    for number in range(len(found.iou)):
        order = found.iou[number].argsort(descending=True)
        masks = (found.logits[number][order] > 0).cpu()
        ious = found.iou[number][order].tolist()
        objects.append({"masks": [mask_facts(mask, iou) for mask, iou in zip(masks, ious, strict=True)]})
        panels = [("prompt", prompted(shown, view, ask, number))]
        for mask, iou in zip(masks, ious, strict=True):
            small = F.interpolate(mask[None, None].float(), (h, w), mode="area")[0, 0] >= 0.5
            panels.append((f"predicted IoU {iou:.2f}", tinted(shown, small)))
        pictures.append(Picture(f"object {number}", tuple((caption, enlarge(panel)) for caption, panel in panels)))
    return Answer({"objects": objects}, tuple(pictures))


def everything_of(image: UInt8[Tensor, "3 _ _"], view: View, masks: Sequence[AutomaticMask]) -> Answer:
    """Masks as SA-1B has them, the surest first; and all of them over the image, small ones above large ones."""
    h, w = view.size
    shown = image[:, :h, :w].cpu()
    ordered = sorted(masks, key=lambda one: -one.predicted_iou)
    told = [{**one._asdict(), "id": number} for number, one in enumerate(ordered)]
    covered = torch.zeros(len(ordered), h, w, dtype=torch.bool)
    for place, one in zip(covered, sorted(ordered, key=lambda one: -one.area), strict=True):
        stored = decode_masks([one.segmentation], view.source)
        mask = F.interpolate(stored[None].float(), (h, w), mode="area")[0, 0] >= 0.5
        covered &= ~mask
        place |= mask
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(ordered))]
    drawn = draw_segmentation_masks(shown, covered, alpha=0.55, colors=colours) if ordered else shown
    panels = (("original", enlarge(shown)), (f"{len(ordered)} masks", enlarge(drawn)))
    return Answer({"annotations": told}, (Picture("everything", panels),))


def mask_facts(mask: Bool[Tensor, "H W"], predicted_iou: float) -> dict[str, Any]:
    """A mask as COCO has it: run-length encoded, with its box (x, y, width, height) and area in pixels."""
    encoded = encode_masks(mask[None])[0]
    counts = encoded["counts"]
    return {
        "segmentation": {"size": list(mask.shape), "counts": counts.decode() if isinstance(counts, bytes) else counts},
        "bbox": coco_mask.toBbox(encoded).tolist(),
        "area": int(mask.sum()),
        "predicted_iou": predicted_iou,
    }


def prompted(image: UInt8[Tensor, "3 h w"], view: View, ask: ImagePrompts, number: int) -> UInt8[Tensor, "3 h w"]:
    """The image with one object's points and box."""
    out = image
    if ask.boxes is not None:
        out = boxed(out, view.shown(ask.boxes[number : number + 1])[0])
    if ask.points is not None and ask.labels is not None:
        points = view.shown_points(ask.points[number])
        out = dotted(out, torch.cat([points, ask.labels[number].unsqueeze(1)], dim=1))
    return out


def boxed(image: UInt8[Tensor, "3 h w"], box: Float[Tensor, " 4"]) -> UInt8[Tensor, "3 h w"]:
    """The image with a rectangle's outline."""
    out = image.clone()
    x0, y0, x1, y1 = (round(number) for number in box.tolist())
    x1, y1 = max(x1 - 1, x0), max(y1 - 1, y0)
    colour = torch.tensor(GREEN, dtype=torch.uint8)[:, None]
    for row in (y0, y1):
        out[:, min(row, out.shape[1] - 1), x0 : x1 + 1] = colour
    for column in (x0, x1):
        out[:, y0 : y1 + 1, min(column, out.shape[2] - 1)] = colour
    return out


def trial_pictures(batch: Batch, predictions: Predictions) -> list[Picture]:
    """Of each image's largest object: what it is, and what one click, nine and its box make of it."""
    assert batch.images is not None
    assert batch.instances is not None
    pictures = []
    there = (batch.weight > 0).cpu() & (predictions["object"] >= 0).cpu()
    for i in there.nonzero().flatten()[:NUM_PICTURES].tolist():
        slot = int(predictions["area"][i].nan_to_num(-1).argmax())
        view = batch.instances[i].view
        h, w = (batch.images.shape[2], batch.images.shape[3]) if view is None else view.size
        image = batch.images[i, :, :h, :w].cpu()
        full = {
            name: F.interpolate(predictions[name][i].cpu().float()[None, None], batch.images.shape[2:])[0, 0, :h, :w]
            > 0
            for name in SHOWN
        }
        truth = _truth(batch.instances[i], int(predictions["object"][i]), (int(h), int(w)))
        clicks = predictions["places"][i].cpu()
        ious = predictions["clicks"][i, slot].cpu()
        panels = (
            ("the object", tinted(image, truth)),
            (f"1 click: IoU {ious[0]:.2f}", dotted(tinted(image, full["after_one"]), clicks[:1])),
            (f"{NUM_CLICKS} clicks: IoU {ious[-1]:.2f}", dotted(tinted(image, full["after_all"]), clicks)),
            (f"its box: IoU {predictions['box'][i, slot]:.2f}", tinted(image, full["from_box"])),
        )
        enlarged = tuple((caption, enlarge(panel)) for caption, panel in panels)
        pictures.append(Picture(f"sample {int(batch.ids[i])}", enlarged))
    return pictures


def _truth(instances: Instances, number: int, size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """An object's mask as it is in view."""
    mask, view = instances.masks[number], instances.view
    if view is not None and list(mask["size"]) != list(view.shape):  # type: ignore[call-overload]
        mask = view_mask(mask, view)
    shape: tuple[int, int] = tuple(mask["size"])  # type: ignore[arg-type, assignment]
    return decode_masks([mask], shape)[0, : size[0], : size[1]]


def tinted(
    image: UInt8[Tensor, "3 h w"], mask: Bool[Tensor, "h w"], colour: tuple[int, int, int] = BLUE, share: float = 0.55
) -> UInt8[Tensor, "3 h w"]:
    """The image with a mask in colour, and all else darker."""
    tint = torch.tensor(colour, dtype=torch.float32)[:, None, None]
    mixed = torch.where(mask, (1 - share) * image + share * tint, 0.6 * image)
    return mixed.round().clamp(0, 255).to(torch.uint8)


def dotted(image: UInt8[Tensor, "3 h w"], clicks: Float[Tensor, "k 3"]) -> UInt8[Tensor, "3 h w"]:
    """The image with clicks: green on the object, red beside it."""
    out = image.clone()
    reach = max(1, min(image.shape[1:]) // 60)
    for x, y, foreground in clicks.tolist():
        column, row = round(x), round(y)
        rows = slice(max(row - reach, 0), row + reach + 1)
        columns = slice(max(column - reach, 0), column + reach + 1)
        out[:, rows, columns] = torch.tensor(GREEN if foreground else RED, dtype=torch.uint8)[:, None, None]
    return out


def enlarge(image: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 h2 w2"]:
    """A small image with each pixel as a square of several."""
    factor = max(1, -(-SMALLEST_SIDE // max(image.shape[1:])))
    return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
