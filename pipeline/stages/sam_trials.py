"""Trying Segment Anything out on annotated objects: clicks by the paper's rule, and boxes.

Legend: B images, Q objects of an image at most, M objects of all images, y x of a mask as the decoder gives it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline import ranks
from pipeline.data.batch import Instances
from pipeline.data.images.views import View, fitted
from pipeline.data.instances import decode_masks
from pipeline.evaluate.promptable import NUM_CLICKS, Click, iou, next_click
from pipeline.models.sam.decoder import MASKS_MORE_PROMPTS, MASKS_ONE_PROMPT
from pipeline.models.sam.model import Embedded, SegmentAnything
from pipeline.models.sam.predictor import stored_logits
from pipeline.models.sam.prompts import ABSENT, Prompts, join_prompts, prompts_of

SHOWN = ("after_one", "after_all", "from_box")  # masks that pictures are made of


class _Tried:
    """One object under trial."""

    def __init__(
        self, image: int, number: int, truth: Bool[np.ndarray, "h w"], box: Float[Tensor, " 4"], view: View
    ) -> None:
        self.image = image
        self.number = number  # among the image's annotations
        self.truth = truth
        self.box = box
        self.view = view
        self.clicks: list[Click] = []
        self.ious: list[float] = []
        self.oracle = math.nan
        self.by_box = math.nan
        self.low: Tensor | None = None  # logits that the model prefers, [y,x]
        self.first: Tensor | None = None  # the same after one click
        self.boxed: Tensor | None = None  # the same from a box
        self.predicted: Bool[np.ndarray, "h w"] | None = None

    def click(self) -> None:
        """Add the next click."""
        self.clicks.append(next_click(self.truth, self.predicted, self.clicks))

    def prompts(self) -> Prompts:
        """All clicks so far, and the last mask."""
        places = torch.tensor([[[float(click.x), float(click.y)] for click in self.clicks]], dtype=torch.float64)
        labels = torch.tensor([[int(click.foreground) for click in self.clicks]])
        masks = None if self.low is None else self.low[None, None].cpu()
        return prompts_of(self.view.shown_points(places).float(), labels, None, masks, image=self.image)


@torch.no_grad()
def click_trials(
    model: SegmentAnything, embedded: Embedded, instances: Sequence[Instances], *, most: int, at_once: int
) -> dict[str, Tensor]:
    """What `SamStage.predict` promises. Collective: every rank asks equally often, whatever objects it has, as ZeRO-3
    needs.

    One click may mean several things, so three masks answer it; to more clicks, and the mask so far, one answers.

    Args:
        most: objects of an image that are tried, its first ones.
        at_once: objects that the decoder is asked about at a time, which bounds its memory.
    """
    tried = [one for i, own in enumerate(instances) for one in _tried(i, own, most)]
    calls = max(ranks.gather(max(1, math.ceil(len(tried) / at_once))))
    asked = functools.partial(_asked, model, embedded, calls=calls, at_once=at_once)
    for number in range(NUM_CLICKS):
        for one in tried:
            one.click()
        low, guess = asked([one.prompts() for one in tried], first=number == 0)
        for row, one in enumerate(tried):
            preferred = int(guess[row].argmax())
            masks = (stored_logits(low[row : row + 1], one.view)[0] > 0).cpu().numpy()
            one.low = low[row, preferred]
            one.predicted = masks[preferred]
            one.ious.append(iou(one.predicted, one.truth))
            if number == 0:
                one.oracle = max(iou(mask, one.truth) for mask in masks)
                one.first = one.low
    boxes = [prompts_of(boxes=one.view.shown(one.box[None]), image=one.image) for one in tried]
    low, guess = asked(boxes, first=True)
    for row, one in enumerate(tried):
        one.boxed = low[row, int(guess[row].argmax())]
        one.by_box = iou((stored_logits(one.boxed[None, None], one.view)[0, 0] > 0).cpu().numpy(), one.truth)
    left_out = torch.tensor([max(0, int((own.crowd == 0).sum()) - most) for own in instances], device=low.device)
    return {**_tensors(tried, len(instances), most, low), "left_out": left_out}


def _tried(image: int, instances: Instances, most: int) -> list[_Tried]:
    """An image's objects, without crowds, the first so many."""
    view = instances.view
    single = [number for number, crowd in enumerate(instances.crowd.tolist()) if not crowd][:most]
    if not single:
        return []
    size: list[int] = instances.masks[single[0]]["size"]  # type: ignore[assignment]
    view = fitted(size[0], size[1], (size[0], size[1])) if view is None else view
    if list(view.source) != list(size):
        raise ValueError("objects of the stored image are needed")
    masks = decode_masks([instances.masks[number] for number in single], view.source)
    found = [_Tried(image, i, mask.numpy(), instances.boxes[i], view) for i, mask in zip(single, masks, strict=True)]
    return [one for one in found if one.truth.any()]


def _asked(
    model: SegmentAnything, embedded: Embedded, prompts: Sequence[Prompts], *, first: bool, calls: int, at_once: int
) -> tuple[Float[Tensor, "m k y x"], Float[Tensor, "m k"]]:
    """Masks and predicted IoUs, in so many calls; where nobody asks, something nobody listens to is asked."""
    device = model.device
    side = (4 * embedded.features.shape[2], 4 * embedded.features.shape[3])
    nobody = Prompts(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, 2), torch.full((1, 2), ABSENT))
    if not first:
        nobody = nobody._replace(masks=torch.zeros(1, 1, *side))
    which = MASKS_ONE_PROMPT if first else MASKS_MORE_PROMPTS
    found = []
    for call in range(calls):
        some = prompts[call * at_once : (call + 1) * at_once] or [nobody]
        found.append(model.decode(embedded, join_prompts(some).to(device), which))
    return torch.cat([answers.logits for answers in found]), torch.cat([answers.iou for answers in found])


def _tensors(tried: Sequence[_Tried], num_images: int, most: int, like: Tensor) -> dict[str, Tensor]:
    clicks = torch.full((num_images, most, NUM_CLICKS), math.nan)
    oracle, box, area = (torch.full((num_images, most), math.nan) for _ in range(3))
    shown = {name: torch.zeros(num_images, *like.shape[2:], dtype=torch.bool) for name in SHOWN}
    places = torch.zeros(num_images, NUM_CLICKS, 3)
    objects = torch.full((num_images,), -1)
    slots = [0] * num_images
    largest = [0.0] * num_images
    for one in tried:
        i, slot = one.image, slots[one.image]
        slots[i] += 1
        clicks[i, slot] = torch.tensor(one.ious)
        oracle[i, slot], box[i, slot], area[i, slot] = one.oracle, one.by_box, float(one.truth.sum())
        if area[i, slot] > largest[i]:
            largest[i] = float(area[i, slot])
            objects[i] = one.number
            for name, mask in zip(SHOWN, (one.first, one.low, one.boxed), strict=True):
                assert mask is not None
                shown[name][i] = (mask > 0).cpu()
            xy = one.view.shown_points(torch.tensor([[float(c.x), float(c.y)] for c in one.clicks]))
            places[i] = torch.cat([xy, torch.tensor([[float(c.foreground)] for c in one.clicks])], dim=1)
    device = like.device
    found = {"clicks": clicks, "oracle": oracle, "box": box, "area": area, "object": objects, "places": places, **shown}
    return {name: value.to(device) for name, value in found.items()}
