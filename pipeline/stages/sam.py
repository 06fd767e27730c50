"""Segment Anything: promptable segmentation, trained by the interactive loop of Kirillov et al. 2023 (appendix A).

Legend: B images, M objects of a micro batch, K masks of a prompt, Q objects of an image at most, H W pixels of the
model's input, y x of a mask at the decoder's resolution.

The loss of a micro batch is the sum over images of each image's mean over its objects, objects and prompts are drawn
from the images' seeds, and every parameter takes part in every step, so gradients are the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.config import Config
from pipeline.data.batch import Batch, Transform
from pipeline.data.images.views import View
from pipeline.data.instances import Fitted, InstanceExample, LargeScaleJitter, Placement, decode_masks
from pipeline.evaluate.base import Evaluation, Predictions
from pipeline.evaluate.click_trials import click_trials
from pipeline.evaluate.promptable import PromptableEvaluation, packed_masks
from pipeline.losses.masks import focal_and_dice, mask_iou
from pipeline.models.noise import uniform
from pipeline.models.sam.automatic import AutomaticSettings, automatic_masks
from pipeline.models.sam.decoder import MASKS_MORE_PROMPTS, MASKS_ONE_PROMPT, DecodedMasks, MaskDecoder
from pipeline.models.sam.model import Embedded, SamConfig, SegmentAnything, neck
from pipeline.models.sam.predictor import EmbeddedImages, ImagePrompts, Predictor
from pipeline.models.sam.prompts import PromptEncoder, Prompts
from pipeline.models.sam.sampling import correction, first_prompts, noisy_boxes, pauses, pixel_of
from pipeline.models.trunk.vit import ViT
from pipeline.pictures.picture import Picture
from pipeline.pictures.prompted import trial_pictures
from pipeline.stages.base import DataFacts, Losses, Stage
from pipeline.stages.dense import (
    DenseOptions,
    PlacedExample,
    check_dense_model,
    content_pixels,
    content_size,
    instances_of,
)
from pipeline.stages.questions import Answer, Question
from pipeline.stages.sam_answers import automatic_answer, prompted_answer

PARTS = ("trunk", "neck", "prompt_encoder", "mask_decoder")
OBJECTS_AT_ONCE = 64  # decoded at a time in evaluation
Part = Literal["trunk", "neck", "prompt_encoder", "mask_decoder"]


class SamOptions(DenseOptions):
    """Options of stage `sam`."""

    flip: bool = False  # with jitter: mirror half of the training images
    sam: SamConfig = SamConfig()
    freeze: tuple[Part, ...] = ()  # parts that aren't trained
    max_objects: int = Field(default=64, gt=0)  # of an image in a step, drawn at random where there are more
    min_area: int = Field(default=1, gt=0)  # pixels of the input; smaller objects aren't trained on
    max_area: float = Field(default=0.9, gt=0, le=1)  # nor are objects that cover a larger share of the image
    clicks: int = Field(default=8, ge=0)  # corrective points after the first prompt
    repeats: int = Field(default=2, ge=0)  # rounds without a new point: the last one, the others anywhere
    point_share: float = Field(default=0.5, ge=0, le=1)  # share of first prompts that are a point; the others are a box
    box_noise: float = Field(default=0.1, ge=0)  # standard deviation of a corner's noise, as a share of the side
    max_box_noise: float = Field(default=20.0, ge=0)  # pixels of the input
    focal_weight: float = Field(default=20.0, ge=0)
    dice_weight: float = Field(default=1.0, ge=0)
    iou_weight: float = Field(default=1.0, ge=0)
    evaluate: tuple[Literal["clicks", "automatic"], ...] = ("clicks",)  # automatic: the recall of automatic masks
    evaluate_objects: int = Field(default=512, gt=0)  # of an image, its first ones, that clicks and boxes are tried on
    automatic: AutomaticSettings = AutomaticSettings()  # of the automatic masks in evaluation

    @model_validator(mode="after")
    def _segments(self) -> SamOptions:
        check_dense_model(self, "sam")
        if self.clicks + self.repeats < 1:
            raise ValueError("clicks + repeats must be at least 1, or masks would never be prompts")
        if set(self.freeze) == set(PARTS):
            raise ValueError("freeze leaves nothing to train")
        if self.automatic.crop_layers:
            raise ValueError("evaluation uses whole images: set automatic.crop_layers to 0")
        return self

    @property
    def rounds(self) -> int:
        """How many times each object is decoded."""
        return 1 + self.clicks + self.repeats


class SamQuestion(Question):
    """What to segment, in pixels of each image; without points and boxes, everything."""

    points: tuple[tuple[float, ...], ...] = ()  # [x, y] on a single object, or [x, y, 0] beside it
    boxes: tuple[tuple[float, float, float, float], ...] = ()  # x0, y0, x1, y1, each of one object
    multimask: bool | None = None  # three masks for each prompt, or one; None: three for a single point or box

    automatic: AutomaticSettings = AutomaticSettings()  # of the masks of everything

    @model_validator(mode="after")
    def _points_are_points(self) -> SamQuestion:
        if any(len(point) not in (2, 3) for point in self.points):
            raise ValueError("a point is [x, y], or [x, y, label] with label 1 on the object and 0 beside it")
        return self

    def prompts(self) -> ImagePrompts:
        """The points and boxes as prompts."""
        points = labels = boxes = None
        if self.points:
            points = torch.tensor([[point[:2] for point in self.points]], dtype=torch.float64)
            labels = torch.tensor([[int(point[2]) if len(point) == 3 else 1 for point in self.points]])
        if self.boxes:
            boxes = torch.tensor(self.boxes, dtype=torch.float64)
        return ImagePrompts(points, labels, boxes)


class Objects(NamedTuple):
    """The objects that a micro batch trains on: at least one row, so that every rank calls the same modules."""

    image: Int[Tensor, " m"]
    number: Int[Tensor, " m"]  # within its image; selects its random numbers
    boxes: Float[Tensor, "m 4"]
    masks: Bool[Tensor, "m h w"]
    weight: Float[Tensor, " m"]  # the image's weight, divided among its objects


class Round(NamedTuple):
    """The result of decoding all objects once."""

    focal: Float[Tensor, " m"]
    dice: Float[Tensor, " m"]
    iou_error: Float[Tensor, " m"]
    iou: Float[Tensor, " m"]  # true IoU of the mask with the highest predicted IoU
    mask: Float[Tensor, "m 1 y x"]  # that mask's logits
    predicted: Bool[Tensor, "m h w"]  # and its pixels


class SamStage(Stage[SamOptions]):
    """Trunk, neck, prompt encoder and mask decoder."""

    options_class: ClassVar[type[Config]] = SamOptions
    question_class: ClassVar[type[Config]] = SamQuestion
    resizes_patches: ClassVar[bool] = True  # MAE's ViT-H has patches of 14 pixels, SAM's of 16

    def __init__(self, options: SamOptions, data: DataFacts) -> None:
        super().__init__(options, data)
        sam = options.sam
        self.trunk = ViT(options.model)
        self.neck = neck(self.trunk.width, sam.channels)
        self.prompt_encoder = PromptEncoder(sam.channels, sam.mask_channels)
        self.mask_decoder = MaskDecoder(sam.channels, sam.heads, sam.depth, sam.mlp_width, sam.iou_width, sam.norm_eps)

    @property
    def model(self) -> SegmentAnything:
        """The parts as one model."""
        return SegmentAnything(self.trunk, self.neck, self.prompt_encoder, self.mask_decoder)

    def predictor(self) -> Predictor:
        """For use from Python: `predictor.embed(arrays)`, then `predictor.predict(...)`."""
        return Predictor(self.model, self.options.model.image_hw, self.options.pixels)

    def loss(self, batch: Batch) -> Losses:
        """Mean over the rounds of 20 focal + dice of each object's best mask, and the squared error of predicted IoUs.

        The first round decodes three masks and trains the one with the lowest loss; later rounds decode only the mask
        for several prompts. The next prompt adds the logits of the mask with the highest predicted IoU, as a constant,
        and a point where that mask is wrong.
        """
        objects = self.objects(batch)
        embedded = self.embed(batch)
        valid = self._valid(batch, objects.image)
        draws = self._draws(batch, objects)
        pause = pauses(draws["pauses"], self.options.repeats)
        prompts = self.first_prompts(objects, draws)
        sums: dict[str, Tensor] = {}
        rounds = self.options.rounds
        for number in range(rounds):
            outcome = self.round(embedded, prompts, objects, valid, first=number == 0)
            for name in ("focal", "dice", "iou_error", "iou"):
                summed = (objects.weight * getattr(outcome, name)).sum()
                sums[name] = sums.get(name, 0) + summed / rounds
                if name == "iou" and number in (0, rounds - 1):
                    sums["iou_first" if number == 0 else "iou_last"] = summed
            if number == rounds - 1:
                break
            point, label = correction(
                outcome.predicted, objects.masks, valid, draws["corrections"][:, number], pause[:, number]
            )
            prompts = Prompts(
                prompts.image,
                torch.cat([prompts.points, point.unsqueeze(1)], dim=1),
                torch.cat([prompts.labels, label.unsqueeze(1)], dim=1),
                outcome.mask,
            )
        options = self.options
        total = (
            options.focal_weight * sums["focal"]
            + options.dice_weight * sums["dice"]
            + options.iou_weight * sums["iou_error"]
        )
        return Losses(total, {name: value.detach() for name, value in sums.items()})

    def round(
        self, embedded: Embedded, prompts: Prompts, objects: Objects, valid: Bool[Tensor, "m h w"], *, first: bool
    ) -> Round:
        """One round: masks, their losses, and the mask that is part of the next prompts."""
        which = MASKS_ONE_PROMPT if first else MASKS_MORE_PROMPTS
        if self.options.model.activation_checkpointing and torch.is_grad_enabled():
            decoded: DecodedMasks = checkpoint(
                self.model.decode, embedded, prompts, which, use_reentrant=False, preserve_rng_state=False
            )
        else:
            decoded = self.model.decode(embedded, prompts, which)
        low, guess = decoded
        logits = F.interpolate(low, embedded.size, mode="bilinear", align_corners=False)
        rows = torch.arange(len(low), device=low.device)
        focal, dice = focal_and_dice(logits, objects.masks, valid)
        best = (self.options.focal_weight * focal + self.options.dice_weight * dice).argmin(1)
        with torch.no_grad():
            above = logits > 0
            iou = mask_iou(above, objects.masks, valid)
            preferred = guess.argmax(1)
        return Round(
            focal[rows, best],
            dice[rows, best],
            (guess - iou).square().mean(1),
            iou[rows, preferred],
            low.detach()[rows, preferred].unsqueeze(1),
            above[rows, preferred],
        )

    def first_prompts(self, objects: Objects, draws: Mapping[str, Tensor]) -> Prompts:
        """The prompts of the first round: a point of each object, or its box with noise."""
        options = self.options
        boxes = noisy_boxes(
            objects.boxes,
            draws["boxes"],
            share=options.box_noise,
            most=options.max_box_noise,
            size=options.model.image_hw,
        )
        by_point = draws["first"][:, 0] < options.point_share
        points, labels = first_prompts(pixel_of(objects.masks, draws["first"][:, 1]), boxes, by_point)
        return Prompts(objects.image, points, labels)

    def embed(self, batch: Batch) -> Embedded:
        """Embeddings of a batch's images."""
        return self.model.embed(content_pixels(batch, self.options), batch.seeds)

    def objects(self, batch: Batch) -> Objects:
        """The objects to train on: no crowds, none that fill the image, a random choice where there are too many."""
        size, options = self.options.model.image_hw, self.options
        device = batch.ids.device
        chosen: list[Objects] = []
        for i, instances in enumerate(instances_of(batch)):
            masks = decode_masks(
                [m for m, c in zip(instances.masks, instances.crowd.tolist(), strict=True) if not c], size
            )
            boxes = instances.boxes[instances.crowd == 0]
            height, width = content_size(instances, size)
            area = masks.flatten(1).sum(1)
            good = ((area >= options.min_area) & (area <= options.max_area * height * width)).nonzero().flatten()
            if len(good) > options.max_objects:
                order = uniform(batch.seeds[i : i + 1].cpu(), "sam_objects", len(good))[0].argsort()
                good = good[order[: options.max_objects].sort().values]
            if not len(good):
                continue
            number = torch.arange(len(good))
            weight = (batch.weight[i].cpu() / len(good)).expand(len(good))
            chosen.append(Objects(torch.full_like(number, i), number, boxes[good], masks[good], weight))
        if not chosen:  # a row of weight 0, so that this rank calls every part of the model too
            zero = torch.zeros(1, dtype=torch.int64)
            chosen.append(
                Objects(zero, zero, torch.zeros(1, 4), torch.zeros(1, *size, dtype=torch.bool), torch.zeros(1))
            )
        return Objects(*(torch.cat(part).to(device) for part in zip(*chosen, strict=True)))

    def predict(self, batch: Batch) -> Predictions:
        """The IoU of each object (absent ones NaN): `clicks` [B,Q,9] after 1 to 9 clicks, `oracle` [B,Q] of the best of
        three masks after one click, `box` [B,Q] from its annotated box; `area` [B,Q] in pixels of the stored image;
        `left_out` [B], the number of objects beyond `evaluate_objects`. Collective.

        For pictures of each image's largest object (annotation number `object` [B], -1 for none): masks `after_one`,
        `after_all` and `from_box` [B,y,x], and `places` [B,9,3], its clicks' x, y in pixels of the input and labels.

        With `evaluate: [automatic]` also the automatic masks `everything` and `everything_scores`, see
        `pipeline.evaluate.promptable.packed_masks`.
        """
        embedded = self.embed(batch)
        predictions = click_trials(
            self.model,
            embedded,
            instances_of(batch),
            most=self.options.evaluate_objects,
            at_once=OBJECTS_AT_ONCE,
        )
        if "automatic" in self.options.evaluate:
            images = EmbeddedImages(embedded, _views(batch)).each()
            masks = [automatic_masks(self.predictor(), image, self.options.automatic) for image in images]
            packed = packed_masks(
                [[(str(m.segmentation["counts"]), m.predicted_iou) for m in of_image] for of_image in masks]
            )
            predictions["everything"], predictions["everything_scores"] = packed
        return predictions

    def transform(self, train: bool) -> Transform:
        """The whole image, as large as fits, or with `jitter` in training large-scale jitter; and its objects."""
        canvas, jitter = self.options.model.image_hw, self.options.jitter
        if not train:
            return InstanceExample(Fitted(canvas), objects="stored")
        placement: Placement = Fitted(canvas)
        if jitter is not None:
            placement = LargeScaleJitter(canvas, jitter, self.options.flip)
        return InstanceExample(placement)

    def view(self) -> Transform:
        """The whole image, as large as fits."""
        return PlacedExample(Fitted(self.options.model.image_hw))

    def evaluations(self) -> Mapping[str, Evaluation]:
        """Mean IoU after clicks and from boxes, and the recall of automatic masks, in one sweep."""
        return {"promptable": PromptableEvaluation()} if self.options.evaluate else {}

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """The largest object of each image: as annotated, and its masks from clicks and from its box."""
        return trial_pictures(batch, predictions)

    def answer(self, batch: Batch, question: SamQuestion) -> list[Answer]:
        """Masks of the objects that the question prompts for, best first by predicted IoU, or of everything; in COCO's
        run-length encoding.

        Raises:
            ConfigError: a prompt is impossible in one of the images, or the question asks for crops.
        """
        assert batch.images is not None
        views, predictor = _views(batch), self.predictor()
        embedded = EmbeddedImages(self.embed(batch), views)
        if not question.points and not question.boxes:
            return [
                automatic_answer(image, view, automatic_masks(predictor, embedded_image, question.automatic))
                for image, view, embedded_image in zip(batch.images, views, embedded.each(), strict=True)
            ]
        prompts = question.prompts()
        predicted = predictor.predict(embedded, [prompts] * len(batch), multimask=question.multimask)
        return [
            prompted_answer(image, view, prompts, masks)
            for image, view, masks in zip(batch.images, views, predicted, strict=True)
        ]

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parts in `freeze`."""
        return tuple(f"{part}." for part in self.options.freeze)

    def weight_decay_exempt(self, name: str, parameter: Tensor) -> bool:
        """Vectors and the position table."""
        return parameter.ndim <= 1 or name == "trunk.pos_embed"

    def _valid(self, batch: Batch, image: Int[Tensor, " m"]) -> Bool[Tensor, "m h w"]:
        """Pixels of each object's image that aren't padding."""
        size = self.options.model.image_hw
        inside = torch.zeros(len(batch), *size, dtype=torch.bool)
        for instances, pixels in zip(instances_of(batch), inside, strict=True):
            height, width = content_size(instances, size)
            pixels[:height, :width] = True
        return inside.to(image.device)[image]

    def _draws(self, batch: Batch, objects: Objects) -> dict[str, Float[Tensor, "m _"]]:
        """Each object's random numbers, functions of its image's seed and its number within the image."""
        rounds, seeds = self.options.rounds, batch.seeds[objects.image]
        counts = {"first": 2, "boxes": 4, "corrections": rounds - 1, "pauses": max(rounds - 2, 0)}
        draws = {}
        for name, num in counts.items():
            most = int(objects.number.max()) + 1
            drawn = uniform(seeds, f"sam_{name}", most * num).view(len(seeds), most, num)
            draws[name] = drawn[torch.arange(len(seeds), device=seeds.device), objects.number]
        return draws


def _views(batch: Batch) -> tuple[View, ...]:
    """How each image lies on the model's input."""
    return tuple(view for instances in instances_of(batch) if (view := instances.view) is not None)
