"""Prediction with Segment Anything: embed images once, then any number of prompts, in pixels of the stored images.

Legend: B images, M prompts of an image, P points of a prompt, K masks of a prompt, H W pixels of the stored image, y x
pixels of a mask at the decoder's resolution, which may be a prompt again.
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


class ImagePrompts(NamedTuple):
    """Prompts of one image, M of each kind that isn't None; each asks for one object."""

    points: Float[Tensor, "m p 2"] | None = None  # x, y in pixels of the image
    labels: Int[Tensor, "m p"] | None = None  # 1: on the object, 0: beside it, -1: no point; None: all 1
    boxes: Float[Tensor, "m 4"] | None = None  # x0 y0 x1 y1 in pixels of the image
    masks: Float[Tensor, "m 1 y x"] | None = None  # logits from an earlier `PredictedMasks.low`


class PredictedMasks(NamedTuple):
    """Masks of one image's prompts."""

    logits: Float[Tensor, "m k h w"]  # at the stored image's size; above 0: the object
    iou: Float[Tensor, "m k"]  # predicted
    low: Float[Tensor, "m k y x"]  # the logits at the decoder's resolution, which may be prompts

    def best(self) -> PredictedMasks:
        """The mask with the highest predicted IoU of each prompt."""
        rows = torch.arange(len(self.iou), device=self.iou.device)
        best = self.iou.argmax(1)
        return PredictedMasks(*(part[rows, best].unsqueeze(1) for part in self))


class EmbeddedImages(NamedTuple):
    """Embedded images, and how each lies on the model's input."""

    embedded: Embedded
    views: tuple[View, ...]

    def each(self) -> list[EmbeddedImages]:
        """The images one by one."""
        features, size = self.embedded
        return [EmbeddedImages(Embedded(features[i : i + 1], size), (view,)) for i, view in enumerate(self.views)]


class Predictor:
    """A model with what it takes to embed images and to decode prompts in pixels of those images.

    Args:
        size: (height, width) of the model's input; images are fitted into it.
        pixels: statistics that images are normalised with.
    """

    def __init__(self, model: SegmentAnything, size: tuple[int, int], pixels: PixelStatistics = "imagenet") -> None:
        self.model = model
        self.size = size
        self.pixels = pixels

    @torch.no_grad()
    def embed(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> EmbeddedImages:
        """Embed images of any sizes, in one batch."""
        views = tuple(fitted(image.shape[0], image.shape[1], self.size) for image in images)
        canvas = torch.zeros(len(images), 3, *self.size)
        for place, image, view in zip(canvas, images, views, strict=True):
            h, w = view.size
            resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
            stored = torch.from_numpy(resized.transpose(2, 0, 1).copy())
            place[:, :h, :w] = normalize(stored.unsqueeze(0), self.pixels)[0]
        return EmbeddedImages(self.model.embed(canvas.to(self.model.device)), views)

    @torch.no_grad()
    def predict(
        self, images: EmbeddedImages, prompts: Sequence[ImagePrompts], *, multimask: bool | None = None
    ) -> list[PredictedMasks]:
        """Masks of every prompt, in one batch for all images.

        Args:
            prompts: those of each image.
            multimask: three masks for each prompt (True) or one (False); None: three for prompts of a single point or
                box without a mask, which may be ambiguous, and one for all others.

        Raises:
            ConfigError: a prompt is impossible; see `model_prompts`.
        """
        if len(prompts) != len(images.views):
            raise ConfigError(
                f"{len(prompts)} sets of prompts for {len(images.views)} images",
                where="prompts",
                fix="give one set for each image",
            )
        parts = [
            model_prompts(image_prompts, view, number)
            for number, (image_prompts, view) in enumerate(zip(prompts, images.views, strict=True))
        ]
        device = self.model.device
        decoded = self.model.decode(images.embedded, join_prompts(parts).to(device))
        predictions = []
        start = 0
        for part, view in zip(parts, images.views, strict=True):
            rows = slice(start, start + part.num)
            which = masks_for(part) if multimask is None else MASKS_ONE_PROMPT if multimask else MASKS_MORE_PROMPTS
            low = decoded.logits[rows, which]
            predictions.append(PredictedMasks(stored_logits(low, view), decoded.iou[rows, which], low))
            start += part.num
        return predictions


def masks_for(prompts: Prompts) -> slice:
    """Which of the four masks to use for these prompts: three for a single point or box, number 0 otherwise.

    Raises:
        ConfigError: both kinds of prompts are among them.
    """
    single = (prompts.labels > ABSENT).sum(1) <= 2  # a point and its companion, or a box's corners
    if prompts.masks is not None:
        single &= False if prompts.has_mask is None else ~prompts.has_mask
    if single.all():
        return MASKS_ONE_PROMPT
    if single.any():
        raise ConfigError(
            "some prompts are a single point or box and some are more",
            where="prompts",
            fix="set multimask, or predict them separately",
        )
    return MASKS_MORE_PROMPTS


def model_prompts(prompts: ImagePrompts, view: View, number: int = 0) -> Prompts:
    """Prompts in pixels of the model's input.

    Boxes are clipped to the image; points outside of it are refused.

    Args:
        view: how the image lies on the input.
        number: the image's index.

    Raises:
        ConfigError: there are no prompts; kinds of prompts differ in number; a point or a whole box lies outside of the
            image; a box is inside out or empty; a label is unknown; a number isn't finite.
    """
    height, width = view.source
    points, labels, boxes = prompts.points, prompts.labels, prompts.boxes
    counts = {name: len(part) for name, part in prompts._asdict().items() if part is not None and name != "labels"}
    if not counts:
        raise _wrong("there are no prompts", "give points, boxes or masks")
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise _wrong(f"unequal numbers of prompts ({listed})", "give as many of each kind, one for each object")
    if points is not None:
        labels = torch.full(points.shape[:2], FOREGROUND) if labels is None else labels
        if labels.shape != points.shape[:2]:
            raise _wrong(
                f"{tuple(labels.shape)} labels for {tuple(points.shape[:2])} points", "give one for each point"
            )
        if not torch.isin(labels, torch.tensor([ABSENT, -1, BACKGROUND, FOREGROUND], device=labels.device)).all():
            raise _wrong("an unknown label", "use 1 for the object, 0 for what isn't the object, -1 for no point")
        real = points[labels >= 0]
        outside = ~((real >= 0) & (real <= torch.tensor([width, height], device=real.device))).all(-1)
        if outside.any():
            x, y = real[outside][0].tolist()
            raise _wrong(f"point ({x:g}, {y:g}) is outside of an image of {width}x{height}", "give x, y in its pixels")
        points = view.shown_points(points.double()).float()
    if boxes is not None:
        boxes = view.shown(_checked_boxes(boxes, height, width))
    return prompts_of(points, labels, boxes, prompts.masks, image=number)


def _checked_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """The boxes, each of which must enclose some of the image."""
    if not boxes.isfinite().all():
        raise _wrong("a box isn't finite", "give x0, y0, x1, y1")
    inverted = (boxes[:, 2:] <= boxes[:, :2]).any(1)
    if inverted.any():
        corners = ", ".join(f"{number:g}" for number in boxes[inverted][0].tolist())
        raise _wrong(f"box ({corners}) is inside out or empty", "give x0 < x1 and y0 < y1")
    beyond = (boxes[:, 2:] <= 0).any(1) | (boxes[:, 0] >= width) | (boxes[:, 1] >= height)
    if beyond.any():
        corners = ", ".join(f"{number:g}" for number in boxes[beyond][0].tolist())
        raise _wrong(f"box ({corners}) is outside of an image of {width}x{height}", "give corners in its pixels")
    return boxes.double()


def _wrong(what: str, fix: str) -> ConfigError:
    return ConfigError(what, where="prompts", fix=fix)


def stored_logits(logits: Float[Tensor, "m k y x"], view: View) -> Float[Tensor, "m k h w"]:
    """Logits at the stored image's size: resized to the input's, cropped to the content, resized, bilinearly."""
    full = F.interpolate(logits, view.shape, mode="bilinear", align_corners=False)
    return F.interpolate(full[..., : view.size[0], : view.size[1]], view.source, mode="bilinear", align_corners=False)
