"""Trials of Segment Anything on annotated objects: masks after simulated clicks, and from boxes.

Legend: B images, Q objects of an image at most, M objects of all images, y x of a mask at the decoder's resolution.
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

TRIAL_MASKS = ("after_one", "after_all", "from_box")  # names of the masks kept for pictures


class _Trial:
    """One object, and the model's masks of it so far."""

    def __init__(
        self, image: int, number: int, truth: Bool[np.ndarray, "h w"], box: Float[Tensor, " 4"], view: View
    ) -> None:
        self.image = image
        self.number = number  # among the image's annotations
        self.truth = truth
        self.box = box
        self.view = view
        self.clicks: list[Click] = []
        self.click_ious: list[float] = []  # of the preferred mask, after each click
        self.oracle_iou = math.nan  # of the best mask after one click
        self.box_iou = math.nan
        self.preferred: Tensor | None = None  # logits [y,x] of the mask with the highest predicted IoU
        self.after_one: Tensor | None = None  # the same after one click
        self.from_box: Tensor | None = None  # the same from the box
        self.predicted: Bool[np.ndarray, "h w"] | None = None  # pixels of `preferred`

    def click(self) -> None:
        """Add the next click."""
        self.clicks.append(next_click(self.truth, self.predicted, self.clicks))

    def click_prompts(self) -> Prompts:
        """All clicks so far, and the last mask."""
        points = torch.tensor([[[float(click.x), float(click.y)] for click in self.clicks]], dtype=torch.float64)
        labels = torch.tensor([[int(click.foreground) for click in self.clicks]])
        masks = None if self.preferred is None else self.preferred[None, None].cpu()
        return prompts_of(self.view.shown_points(points).float(), labels, None, masks, image=self.image)

    def box_prompts(self) -> Prompts:
        """The annotated box."""
        return prompts_of(boxes=self.view.shown(self.box[None]), image=self.image)

    def record_click(self, low: Float[Tensor, "k y x"], guess: Float[Tensor, " k"]) -> None:
        """Take in the masks that the last click gave, and their predicted IoUs."""
        index = int(guess.argmax())
        masks = (stored_logits(low[None], self.view)[0] > 0).cpu().numpy()
        self.preferred = low[index]
        self.predicted = masks[index]
        self.click_ious.append(iou(self.predicted, self.truth))
        if len(self.click_ious) == 1:
            self.oracle_iou = max(iou(mask, self.truth) for mask in masks)
            self.after_one = self.preferred

    def record_box(self, low: Float[Tensor, "k y x"], guess: Float[Tensor, " k"]) -> None:
        """Take in the masks that the box gave, and their predicted IoUs."""
        self.from_box = low[int(guess.argmax())]
        mask = stored_logits(self.from_box[None, None], self.view)[0, 0] > 0
        self.box_iou = iou(mask.cpu().numpy(), self.truth)


@torch.no_grad()
def click_trials(
    model: SegmentAnything, embedded: Embedded, instances: Sequence[Instances], *, most: int, at_once: int
) -> dict[str, Tensor]:
    """The predictions that `SamStage.predict` documents. Collective: every rank calls the model the same number of
    times, however many objects it has, as ZeRO-3 needs.

    A single click is ambiguous, so the model gives three masks for it; further clicks, together with the mask so far,
    give one.

    Args:
        most: objects tried in each image, its first ones.
        at_once: objects decoded at a time, which bounds the memory.
    """
    trials = [trial for i, objects in enumerate(instances) for trial in _trials_of(i, objects, most)]
    calls = max(ranks.gather(max(1, math.ceil(len(trials) / at_once))))
    decode = functools.partial(_decoded, model, embedded, calls=calls, at_once=at_once)
    for number in range(NUM_CLICKS):
        for trial in trials:
            trial.click()
        low, guess = decode([trial.click_prompts() for trial in trials], first=number == 0)
        for row, trial in enumerate(trials):
            trial.record_click(low[row], guess[row])
    low, guess = decode([trial.box_prompts() for trial in trials], first=True)
    for row, trial in enumerate(trials):
        trial.record_box(low[row], guess[row])
    left_out = [max(0, int((objects.crowd == 0).sum()) - most) for objects in instances]
    return {**_tensors(trials, len(instances), most, low), "left_out": torch.tensor(left_out, device=low.device)}


def _trials_of(image: int, instances: Instances, most: int) -> list[_Trial]:
    """Trials of an image's first objects, without crowds and empty masks."""
    view = instances.view
    single = [number for number, crowd in enumerate(instances.crowd.tolist()) if not crowd][:most]
    if not single:
        return []
    size: list[int] = instances.masks[single[0]]["size"]  # type: ignore[assignment]
    view = fitted(size[0], size[1], (size[0], size[1])) if view is None else view
    if list(view.source) != list(size):
        raise ValueError("objects of the stored image are needed")
    masks = decode_masks([instances.masks[number] for number in single], view.source)
    trials = [_Trial(image, i, mask.numpy(), instances.boxes[i], view) for i, mask in zip(single, masks, strict=True)]
    return [trial for trial in trials if trial.truth.any()]


def _decoded(
    model: SegmentAnything, embedded: Embedded, prompts: Sequence[Prompts], *, first: bool, calls: int, at_once: int
) -> tuple[Float[Tensor, "m k y x"], Float[Tensor, "m k"]]:
    """Masks and predicted IoUs, in exactly `calls` calls; those without prompts left decode a dummy prompt, whose masks
    come last.
    """
    device = model.device
    side = (4 * embedded.features.shape[2], 4 * embedded.features.shape[3])
    dummy = Prompts(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, 2), torch.full((1, 2), ABSENT))
    if not first:
        dummy = dummy._replace(masks=torch.zeros(1, 1, *side))
    which = MASKS_ONE_PROMPT if first else MASKS_MORE_PROMPTS
    parts = []
    for call in range(calls):
        chunk = prompts[call * at_once : (call + 1) * at_once] or [dummy]
        parts.append(model.decode(embedded, join_prompts(chunk).to(device), which))
    return torch.cat([part.logits for part in parts]), torch.cat([part.iou for part in parts])


def _tensors(trials: Sequence[_Trial], num_images: int, most: int, like: Tensor) -> dict[str, Tensor]:
    """The trials' results as predictions, on the device of `like`, which has the shape of decoded masks."""
    clicks = torch.full((num_images, most, NUM_CLICKS), math.nan)
    oracle, box, area = (torch.full((num_images, most), math.nan) for _ in range(3))
    masks = {name: torch.zeros(num_images, *like.shape[2:], dtype=torch.bool) for name in TRIAL_MASKS}
    places = torch.zeros(num_images, NUM_CLICKS, 3)
    objects = torch.full((num_images,), -1)
    slots = [0] * num_images
    largest = [0.0] * num_images
    for trial in trials:
        i, slot = trial.image, slots[trial.image]
        slots[i] += 1
        clicks[i, slot] = torch.tensor(trial.click_ious)
        oracle[i, slot], box[i, slot] = trial.oracle_iou, trial.box_iou
        area[i, slot] = float(trial.truth.sum())
        if area[i, slot] > largest[i]:
            largest[i] = float(area[i, slot])
            objects[i] = trial.number
            for name, mask in zip(TRIAL_MASKS, (trial.after_one, trial.preferred, trial.from_box), strict=True):
                assert mask is not None
                masks[name][i] = (mask > 0).cpu()
            xy = trial.view.shown_points(torch.tensor([[float(click.x), float(click.y)] for click in trial.clicks]))
            labels = torch.tensor([[float(click.foreground)] for click in trial.clicks])
            places[i] = torch.cat([xy, labels], dim=1)
    tensors = {"clicks": clicks, "oracle": oracle, "box": box, "area": area, "object": objects, "places": places}
    return {name: value.to(like.device) for name, value in (tensors | masks).items()}
