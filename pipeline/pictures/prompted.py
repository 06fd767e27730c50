"""Pictures of Segment Anything: prompts, masks of prompts, automatic masks, and trials on annotated objects.

Legend: H W pixels of the stored image, h w pixels of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_segmentation_masks

from pipeline.data.batch import Batch, Instances
from pipeline.data.images.views import View
from pipeline.data.instances import decode_masks, view_mask
from pipeline.evaluate.base import Predictions
from pipeline.evaluate.click_trials import TRIAL_MASKS
from pipeline.evaluate.promptable import NUM_CLICKS
from pipeline.models.sam.automatic import AutomaticMask
from pipeline.models.sam.predictor import ImagePrompts
from pipeline.pictures.picture import PALETTE, Picture, enlarge

MAX_PICTURES = 8
MIN_SIDE = 192  # pixels; smaller pictures are enlarged
BLUE, GREEN, RED = (40, 120, 255), (40, 200, 80), (235, 60, 60)


def object_picture(
    image: UInt8[Tensor, "3 _ _"],
    view: View,
    prompts: ImagePrompts,
    number: int,
    masks: Bool[Tensor, "k H W"],
    ious: Sequence[float],
) -> Picture:
    """One object's prompts and its masks.

    Args:
        image: as the model sees it, with padding.
        number: the object's, among the prompts.
        ious: predicted for each of the masks.
    """
    h, w = view.size
    shown = image[:, :h, :w].cpu()
    panels = [("prompt", prompted(shown, view, prompts, number))]
    for mask, iou in zip(masks, ious, strict=True):
        panels.append((f"predicted IoU {iou:.2f}", tinted(shown, _resized(mask, (h, w)))))
    return Picture(f"object {number}", _enlarged(panels))


def automatic_picture(image: UInt8[Tensor, "3 _ _"], view: View, masks: Sequence[AutomaticMask]) -> Picture:
    """All masks over the image, small ones above large ones; `image` is as the model sees it, with padding."""
    h, w = view.size
    shown = image[:, :h, :w].cpu()
    regions = torch.zeros(len(masks), h, w, dtype=torch.bool)
    for region, mask in zip(regions, sorted(masks, key=lambda mask: -mask.area), strict=True):
        pixels = _resized(decode_masks([mask.segmentation], view.source)[0], (h, w))
        regions &= ~pixels
        region |= pixels
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(masks))]
    drawn = draw_segmentation_masks(shown, regions, alpha=0.55, colors=colours) if masks else shown
    return Picture("everything", _enlarged([("original", shown), (f"{len(masks)} masks", drawn)]))


def trial_pictures(batch: Batch, predictions: Predictions) -> list[Picture]:
    """The largest object of each image: as annotated, and its masks after one click, after all clicks and from its box.

    Args:
        predictions: stage `sam`'s.
    """
    assert batch.images is not None
    assert batch.instances is not None
    pictures = []
    present = (batch.weight > 0).cpu() & (predictions["object"] >= 0).cpu()
    for i in present.nonzero().flatten()[:MAX_PICTURES].tolist():
        slot = int(predictions["area"][i].nan_to_num(-1).argmax())
        view = batch.instances[i].view
        h, w = (batch.images.shape[2], batch.images.shape[3]) if view is None else view.size
        image = batch.images[i, :, :h, :w].cpu()
        masks = {
            name: F.interpolate(predictions[name][i].cpu().float()[None, None], batch.images.shape[2:])[0, 0, :h, :w]
            > 0
            for name in TRIAL_MASKS
        }
        truth = _true_mask(batch.instances[i], int(predictions["object"][i]), (int(h), int(w)))
        clicks = predictions["places"][i].cpu()
        ious = predictions["clicks"][i, slot].cpu()
        panels = [
            ("annotated", tinted(image, truth)),
            (f"1 click: IoU {ious[0]:.2f}", dotted(tinted(image, masks["after_one"]), clicks[:1])),
            (f"{NUM_CLICKS} clicks: IoU {ious[-1]:.2f}", dotted(tinted(image, masks["after_all"]), clicks)),
            (f"its box: IoU {predictions['box'][i, slot]:.2f}", tinted(image, masks["from_box"])),
        ]
        pictures.append(Picture(f"sample {int(batch.ids[i])}", _enlarged(panels)))
    return pictures


def prompted(image: UInt8[Tensor, "3 h w"], view: View, prompts: ImagePrompts, number: int) -> UInt8[Tensor, "3 h w"]:
    """The image with one object's points and box."""
    out = image
    if prompts.boxes is not None:
        out = boxed(out, view.shown(prompts.boxes[number : number + 1])[0])
    if prompts.points is not None and prompts.labels is not None:
        points = view.shown_points(prompts.points[number])
        out = dotted(out, torch.cat([points, prompts.labels[number].unsqueeze(1)], dim=1))
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


def tinted(
    image: UInt8[Tensor, "3 h w"], mask: Bool[Tensor, "h w"], colour: tuple[int, int, int] = BLUE, share: float = 0.55
) -> UInt8[Tensor, "3 h w"]:
    """The image with the mask in colour and everything else darker."""
    tint = torch.tensor(colour, dtype=torch.float32)[:, None, None]
    mixed = torch.where(mask, (1 - share) * image + share * tint, 0.6 * image)
    return mixed.round().clamp(0, 255).to(torch.uint8)


def dotted(image: UInt8[Tensor, "3 h w"], clicks: Float[Tensor, "k 3"]) -> UInt8[Tensor, "3 h w"]:
    """The image with clicks (x, y, label): green on the object, red beside it."""
    out = image.clone()
    reach = max(1, min(image.shape[1:]) // 60)
    for x, y, foreground in clicks.tolist():
        column, row = round(x), round(y)
        rows = slice(max(row - reach, 0), row + reach + 1)
        columns = slice(max(column - reach, 0), column + reach + 1)
        out[:, rows, columns] = torch.tensor(GREEN if foreground else RED, dtype=torch.uint8)[:, None, None]
    return out


def _true_mask(instances: Instances, number: int, size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """An annotated object's mask, where the batch's image shows it."""
    mask, view = instances.masks[number], instances.view
    if view is not None and list(mask["size"]) != list(view.shape):  # type: ignore[call-overload]
        mask = view_mask(mask, view)
    shape: tuple[int, int] = tuple(mask["size"])  # type: ignore[arg-type, assignment]
    return decode_masks([mask], shape)[0, : size[0], : size[1]]


def _resized(mask: Bool[Tensor, "H W"], size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """The pixels at least half of which the mask covers."""
    return F.interpolate(mask[None, None].float(), size, mode="area")[0, 0] >= 0.5


def _enlarged(panels: Sequence[tuple[str, UInt8[Tensor, "3 _ _"]]]) -> tuple[tuple[str, UInt8[Tensor, "3 _ _"]], ...]:
    """The panels, small images with each pixel as a square."""
    return tuple((caption, enlarge(image, max(1, -(-MIN_SIDE // max(image.shape[1:]))))) for caption, image in panels)
