"""Asking Segment Anything about images: embed once, then any number of prompts, in pixels of the images themselves.

Legend: B images, M prompts of an image, P points of a prompt, K masks of a prompt, H W pixels of the stored image, y x
of the masks that may come back as prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.images.views import View, fitted
from pipeline.errors import ConfigError
from pipeline.models.pixels import PixelStatistics, normalize
from pipeline.models.sam.decoder import MASKS_MORE_PROMPTS, MASKS_ONE_PROMPT
from pipeline.models.sam.model import Embedded, SegmentAnything
from pipeline.models.sam.prompts import ABSENT, BACKGROUND, FOREGROUND, Prompts, join_prompts, prompts_of


class Ask(NamedTuple):
    """Prompts about one image, M of each kind that is given; each asks for one object."""

    points: Float[Tensor, "m p 2"] | None = None  # x, y in pixels of the image
    labels: Int[Tensor, "m p"] | None = None  # 1 the object, 0 not the object, -1 no point; None: all 1
    boxes: Float[Tensor, "m 4"] | None = None  # x0 y0 x1 y1 in pixels of the image
    masks: Float[Tensor, "m 1 y x"] | None = None  # logits from an earlier `Found.low`


class Found(NamedTuple):
    """What was found for one image's prompts."""

    logits: Float[Tensor, "m k h w"]  # above 0: the object
    iou: Float[Tensor, "m k"]  # predicted
    low: Float[Tensor, "m k y x"]  # the logits as the model gives them, which may be prompts

    def best(self) -> Found:
        """Of each prompt, the mask with the highest predicted IoU."""
        rows = torch.arange(len(self.iou), device=self.iou.device)
        best = self.iou.argmax(1)
        return Found(*(part[rows, best].unsqueeze(1) for part in self))


class EmbeddedImages(NamedTuple):
    """Images as the model sees them, and how they lie there."""

    embedded: Embedded
    views: tuple[View, ...]

    def each(self) -> list[EmbeddedImages]:
        """One by one."""
        features, size = self.embedded
        return [EmbeddedImages(Embedded(features[i : i + 1], size), (view,)) for i, view in enumerate(self.views)]


class Predictor:
    """A model in use.

    Args:
        size: (height, width) of the model's input; images are fitted into it.
        pixels: what images are normalised with.
    """

    def __init__(self, model: SegmentAnything, size: tuple[int, int], pixels: PixelStatistics = "imagenet") -> None:
        self.model = model
        self.size = size
        self.pixels = pixels

    @torch.no_grad()
    def embed(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> EmbeddedImages:
        """Encode images of any sizes, in one batch."""
        views = tuple(fitted(image.shape[0], image.shape[1], self.size) for image in images)
        canvas = torch.zeros(len(images), 3, *self.size)
        for place, image, view in zip(canvas, images, views, strict=True):
            h, w = view.size
            resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
            stored = torch.from_numpy(resized.transpose(2, 0, 1).copy())
            place[:, :h, :w] = normalize(stored.unsqueeze(0), self.pixels)[0]
        return EmbeddedImages(self.model.embed(canvas.to(self.model.device)), views)

    @torch.no_grad()
    def predict(self, images: EmbeddedImages, asks: Sequence[Ask], *, multimask: bool | None = None) -> list[Found]:
        """Masks for every prompt, in one batch for all images.

        Args:
            asks: one for each image.
            multimask: three masks for each prompt (True) or one (False); None: three for prompts of a single point or
                box without a mask, which may mean several things, and one for all others.

        Raises:
            ConfigError: a prompt is impossible; see `model_prompts`.
        """
        if len(asks) != len(images.views):
            raise ConfigError(
                f"{len(asks)} asks about {len(images.views)} images", where="prompts", fix="give one each"
            )
        own = [
            model_prompts(ask, view, number) for number, (ask, view) in enumerate(zip(asks, images.views, strict=True))
        ]
        device = self.model.device
        answers = self.model.answer(images.embedded, join_prompts(own).to(device))
        found = []
        start = 0
        for part, view in zip(own, images.views, strict=True):
            rows = slice(start, start + part.num)
            which = masks_for(part) if multimask is None else MASKS_ONE_PROMPT if multimask else MASKS_MORE_PROMPTS
            low = answers.logits[rows, which]
            found.append(Found(stored_logits(low, view), answers.iou[rows, which], low))
            start += part.num
        return found


def masks_for(prompts: Prompts) -> slice:
    """Which of the four masks are meant for these prompts: three for a lone point or box, the single one otherwise.

    Raises:
        ConfigError: both kinds are there.
    """
    single = (prompts.labels > ABSENT).sum(1) <= 2  # a point and its companion, or a box's corners
    if prompts.masks is not None:
        single &= False if prompts.has_mask is None else ~prompts.has_mask
    if single.all():
        return MASKS_ONE_PROMPT
    if single.any():
        raise ConfigError(
            "prompts of one point or box and prompts of more in one ask", where="prompts", fix="say multimask, or split"
        )
    return MASKS_MORE_PROMPTS


def model_prompts(ask: Ask, view: View, number: int = 0) -> Prompts:
    """Prompts in pixels of the model's input.

    Boxes are clipped to the image, points outside of it refused.

    Args:
        view: how the image lies in the input.
        number: the image's.

    Raises:
        ConfigError: nothing is asked; kinds of prompts differ in number; a point or a whole box lies outside of the
            image; a box is inside out or empty; a label is unknown; something isn't finite.
    """
    height, width = view.source
    points, labels, boxes = ask.points, ask.labels, ask.boxes
    counts = {name: len(part) for name, part in ask._asdict().items() if part is not None and name != "labels"}
    if not counts:
        raise _wrong("nothing is asked", "give points, boxes or masks")
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise _wrong(f"unequal numbers of prompts ({told})", "give as many of each kind, one for each object")
    if points is not None:
        labels = torch.full(points.shape[:2], FOREGROUND) if labels is None else labels
        if labels.shape != points.shape[:2]:
            raise _wrong(
                f"{tuple(labels.shape)} labels for {tuple(points.shape[:2])} points", "give one for each point"
            )
        if not torch.isin(labels, torch.tensor([ABSENT, -1, BACKGROUND, FOREGROUND], device=labels.device)).all():
            raise _wrong("an unknown label", "use 1 for the object, 0 for what isn't it, -1 for no point")
        real = points[labels >= 0]
        outside = ~((real >= 0) & (real <= torch.tensor([width, height], device=real.device))).all(-1)
        if outside.any():
            x, y = real[outside][0].tolist()
            raise _wrong(f"point ({x:g}, {y:g}) is outside of an image of {width}x{height}", "give x, y in its pixels")
        points = view.shown_points(points.double()).float()
    if boxes is not None:
        boxes = view.shown(_checked_boxes(boxes, height, width))
    return prompts_of(points, labels, boxes, ask.masks, image=number)


def _checked_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes that enclose something of the image."""
    if not boxes.isfinite().all():
        raise _wrong("a box that isn't finite", "give x0, y0, x1, y1")
    inverted = (boxes[:, 2:] <= boxes[:, :2]).any(1)
    if inverted.any():
        told = ", ".join(f"{number:g}" for number in boxes[inverted][0].tolist())
        raise _wrong(f"box ({told}) is inside out or empty", "give x0 < x1 and y0 < y1")
    beyond = (boxes[:, 2:] <= 0).any(1) | (boxes[:, 0] >= width) | (boxes[:, 1] >= height)
    if beyond.any():
        told = ", ".join(f"{number:g}" for number in boxes[beyond][0].tolist())
        raise _wrong(f"box ({told}) is outside of an image of {width}x{height}", "give corners in its pixels")
    return boxes.double()


def _wrong(what: str, fix: str) -> ConfigError:
    return ConfigError(what, where="prompts", fix=fix)


def stored_logits(logits: Float[Tensor, "m k y x"], view: View) -> Float[Tensor, "m k h w"]:
    """Logits at the size of the stored image: bilinear to the input's size, its padding cut off, bilinear again."""
    full = F.interpolate(logits, view.shape, mode="bilinear", align_corners=False)
    return F.interpolate(full[..., : view.size[0], : view.size[1]], view.source, mode="bilinear", align_corners=False)
