"""Segment Anything: promptable segmentation, trained by the interactive loop of Kirillov et al. 2023 (appendix A).

Legend: B images, M objects of a micro batch, K masks of a prompt, Q objects of an image at most, H W pixels of the
model's input, y x of a mask as the decoder gives it.

The loss of a micro batch is the sum over images of each image's mean over its objects, objects and prompts are drawn
from the images' seeds, and every parameter takes part in every step: gradients are the same for any number of ranks.
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
from pipeline.data.instances import Fitted, InstanceExample, LargeScaleJitter, Placement, decode_masks
from pipeline.evaluate.base import Evaluation, Predictions
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
from pipeline.stages.base import Answer, DataFacts, Losses, Picture, Question, Stage
from pipeline.stages.dense import (
    DenseOptions,
    PlacedExample,
    check_dense_model,
    content_pixels,
    content_size,
    instances_of,
)
from pipeline.stages.sam_pictures import answer_of, everything_of, trial_pictures
from pipeline.stages.sam_trials import click_trials

PARTS = ("trunk", "neck", "prompt_encoder", "mask_decoder")
OBJECTS_AT_ONCE = 64  # that an evaluation asks the decoder about
Part = Literal["trunk", "neck", "prompt_encoder", "mask_decoder"]


class SamOptions(DenseOptions):
    """Options of stage `sam`."""

    flip: bool = False  # with jitter: mirror half of the training images
    sam: SamConfig = SamConfig()
    freeze: tuple[Part, ...] = ()  # [trunk]: train what stands on it; [trunk, neck, prompt_encoder]: the decoder alone
    max_objects: int = Field(default=64, gt=0)  # of an image and step, drawn where there are more
    min_area: int = Field(default=1, gt=0)  # pixels of the input; smaller objects aren't trained on
    max_area: float = Field(default=0.9, gt=0, le=1)  # nor are those that cover more of the image
    clicks: int = Field(default=8, ge=0)  # corrective points after the first prompt
    repeats: int = Field(default=2, ge=0)  # rounds without a new point, one of them last, the others anywhere
    point_share: float = Field(default=0.5, ge=0, le=1)  # first prompts that are a point; the others are a box
    box_noise: float = Field(default=0.1, ge=0)  # standard deviation of a corner's noise, as a share of the side
    max_box_noise: float = Field(default=20.0, ge=0)  # pixels of the input
    focal_weight: float = Field(default=20.0, ge=0)
    dice_weight: float = Field(default=1.0, ge=0)
    iou_weight: float = Field(default=1.0, ge=0)
    evaluate: tuple[Literal["clicks", "automatic"], ...] = ("clicks",)  # automatic: how many objects masks find
    evaluate_objects: int = Field(default=512, gt=0)  # of an image that clicks and boxes are tried on, its first ones
    automatic: AutomaticSettings = AutomaticSettings()  # how everything is found, for this

    @model_validator(mode="after")
    def _segments(self) -> SamOptions:
        check_dense_model(self, "sam")
        if self.clicks + self.repeats < 1:
            raise ValueError("clicks + repeats must be 1 or more, or masks would never be prompts")
        if set(self.freeze) == set(PARTS):
            raise ValueError("freeze leaves nothing to train")
        if self.automatic.crop_layers:
            raise ValueError("an evaluation looks at whole images: set automatic.crop_layers to 0")
        return self

    @property
    def rounds(self) -> int:
        """How often the decoder is asked about an object."""
        return 1 + self.clicks + self.repeats


class SamQuestion(Question):
    """What is to be segmented, in pixels of each image; everything, where neither points nor boxes are given."""

    points: tuple[tuple[float, ...], ...] = ()  # [x, y] on one object, or [x, y, 0] beside it
    boxes: tuple[tuple[float, float, float, float], ...] = ()  # x0, y0, x1, y1 of an object each
    multimask: bool | None = None  # three masks for each prompt, or one; None: three for a lone point or box

    automatic: AutomaticSettings = AutomaticSettings()  # how everything is found, and what of it is kept

    @model_validator(mode="after")
    def _points_are_points(self) -> SamQuestion:
        if any(len(point) not in (2, 3) for point in self.points):
            raise ValueError("a point is [x, y], or [x, y, label] with label 1 on the object and 0 beside it")
        return self

    def ask(self) -> ImagePrompts:
        """As prompts."""
        points = labels = boxes = None
        if self.points:
            points = torch.tensor([[point[:2] for point in self.points]], dtype=torch.float64)
            labels = torch.tensor([[int(point[2]) if len(point) == 3 else 1 for point in self.points]])
        if self.boxes:
            boxes = torch.tensor(self.boxes, dtype=torch.float64)
        return ImagePrompts(points, labels, boxes)


class Objects(NamedTuple):
    """What a micro batch trains on: at least one row, so that every rank does the same work."""

    image: Int[Tensor, " m"]
    number: Int[Tensor, " m"]  # within its image; picks its random numbers
    boxes: Float[Tensor, "m 4"]
    masks: Bool[Tensor, "m h w"]
    weight: Float[Tensor, " m"]  # the image's, shared among its objects


class Round(NamedTuple):
    """What came of asking once."""

    focal: Float[Tensor, " m"]
    dice: Float[Tensor, " m"]
    iou_error: Float[Tensor, " m"]
    iou: Float[Tensor, " m"]  # true IoU of the mask that the model itself prefers
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
        """The parts at work together."""
        return SegmentAnything(self.trunk, self.neck, self.prompt_encoder, self.mask_decoder)

    def predictor(self) -> Predictor:
        """For asking about images from Python: `predictor.embed(arrays)`, then `predictor.predict(...)`."""
        return Predictor(self.model, self.options.model.image_hw, self.options.pixels)

    def loss(self, batch: Batch) -> Losses:
        """Mean over the rounds of 20 focal + dice of each object's best mask, and the squared error of predicted IoUs.

        In the first round three masks answer, and the one with the lowest loss is trained; afterwards the mask for
        several prompts answers alone. The logits of the mask with the highest predicted IoU, as a constant, are part of
        the next prompt, and a point where it is wrong.
        """
        objects = self.objects(batch)
        embedded = self.embed(batch)
        valid = self._valid(batch, objects.image)
        draws = self._draws(batch, objects)
        pause = pauses(draws["pauses"], self.options.repeats)
        prompts = self.first(objects, draws)
        sums: dict[str, Tensor] = {}
        rounds = self.options.rounds
        for number in range(rounds):
            done = self.ask(embedded, prompts, objects, valid, first=number == 0)
            for name in ("focal", "dice", "iou_error", "iou"):
                summed = (objects.weight * getattr(done, name)).sum()
                sums[name] = sums.get(name, 0) + summed / rounds
                if name == "iou" and number in (0, rounds - 1):
                    sums["iou_first" if number == 0 else "iou_last"] = summed
            if number == rounds - 1:
                break
            point, label = correction(
                done.predicted, objects.masks, valid, draws["corrections"][:, number], pause[:, number]
            )
            prompts = Prompts(
                prompts.image,
                torch.cat([prompts.points, point.unsqueeze(1)], dim=1),
                torch.cat([prompts.labels, label.unsqueeze(1)], dim=1),
                done.mask,
            )
        options = self.options
        total = (
            options.focal_weight * sums["focal"]
            + options.dice_weight * sums["dice"]
            + options.iou_weight * sums["iou_error"]
        )
        return Losses(total, {name: value.detach() for name, value in sums.items()})

    def ask(
        self, embedded: Embedded, prompts: Prompts, objects: Objects, valid: Bool[Tensor, "m h w"], *, first: bool
    ) -> Round:
        """One round: masks, their losses, and what the next round starts from."""
        which = MASKS_ONE_PROMPT if first else MASKS_MORE_PROMPTS
        if self.options.model.activation_checkpointing and torch.is_grad_enabled():
            answers: DecodedMasks = checkpoint(
                self.model.decode, embedded, prompts, which, use_reentrant=False, preserve_rng_state=False
            )
        else:
            answers = self.model.decode(embedded, prompts, which)
        low, guess = answers
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

    def first(self, objects: Objects, draws: Mapping[str, Tensor]) -> Prompts:
        """The first prompts: a point of the object, or its box with noise."""
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
        """The objects to train on: no crowds, none that fill the image, a random choice of too many."""
        size, options = self.options.model.image_hw, self.options
        device = batch.ids.device
        kept: list[Objects] = []
        for i, one in enumerate(instances_of(batch)):
            masks = decode_masks([m for m, c in zip(one.masks, one.crowd.tolist(), strict=True) if not c], size)
            boxes = one.boxes[one.crowd == 0]
            height, width = content_size(one, size)
            area = masks.flatten(1).sum(1)
            good = ((area >= options.min_area) & (area <= options.max_area * height * width)).nonzero().flatten()
            if len(good) > options.max_objects:
                order = uniform(batch.seeds[i : i + 1].cpu(), "sam_objects", len(good))[0].argsort()
                good = good[order[: options.max_objects].sort().values]
            if not len(good):
                continue
            number = torch.arange(len(good))
            weight = (batch.weight[i].cpu() / len(good)).expand(len(good))
            kept.append(Objects(torch.full_like(number, i), number, boxes[good], masks[good], weight))
        if not kept:  # a row without weight, so that this rank, too, calls every part of the model
            zero = torch.zeros(1, dtype=torch.int64)
            kept.append(Objects(zero, zero, torch.zeros(1, 4), torch.zeros(1, *size, dtype=torch.bool), torch.zeros(1)))
        return Objects(*(torch.cat(part).to(device) for part in zip(*kept, strict=True)))

    def predict(self, batch: Batch) -> Predictions:
        """IoU of each object (absent ones NaN): `clicks` [B,Q,9] after so many clicks, `oracle` [B,Q] of the best of
        three masks after one click, `box` [B,Q] from its true box; `area` [B,Q] in pixels of the stored image;
        `left_out` [B], how many objects beyond `evaluate_objects` an image has. Collective. For pictures, of the
        largest object (annotation number `object` [B], -1 for none), masks `after_one`, `after_all` and `from_box`
        [B,y,x], and `places` [B,9,3], its clicks x, y in pixels of the input with their labels.
        With `evaluate: [automatic]` also `everything` and `everything_scores`, masks of all there is, see
        `pipeline.evaluate.promptable.packed_masks`.
        """
        embedded = self.embed(batch)
        found = click_trials(
            self.model,
            embedded,
            instances_of(batch),
            most=self.options.evaluate_objects,
            at_once=OBJECTS_AT_ONCE,
        )
        if "automatic" in self.options.evaluate:
            views = tuple(v for one in instances_of(batch) if (v := one.view) is not None)
            one_by_one = EmbeddedImages(embedded, views).each()
            masks = [automatic_masks(self.predictor(), image, self.options.automatic) for image in one_by_one]
            packed = packed_masks([[(str(m.segmentation["counts"]), m.predicted_iou) for m in some] for some in masks])
            found["everything"], found["everything_scores"] = packed
        return found

    def transform(self, train: bool) -> Transform:
        """The whole image as large as fits, or large-scale jitter in training; objects where they lie in it."""
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
        """Mean IoU after clicks and from boxes, and the recall of masks of everything: all in one sweep."""
        return {"promptable": PromptableEvaluation()} if self.options.evaluate else {}

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """The largest object of each image, as it is and as clicks and its box bring it out."""
        return trial_pictures(batch, predictions)

    def answer(self, batch: Batch, question: SamQuestion) -> list[Answer]:
        """Masks of what the question points at, best first by predicted IoU, or of everything; in COCO's run-length
        encoding.

        Raises:
            ConfigError: a prompt is impossible in one of the images, or crops are wanted.
        """
        assert batch.images is not None
        views = tuple(v for one in instances_of(batch) if (v := one.view) is not None)
        embedded, predictor = self.embed(batch), self.predictor()
        if not question.points and not question.boxes:
            return [
                everything_of(image, view, automatic_masks(predictor, one, question.automatic))
                for image, view, one in zip(batch.images, views, EmbeddedImages(embedded, views).each(), strict=True)
            ]
        ask = question.ask()
        found = predictor.predict(EmbeddedImages(embedded, views), [ask] * len(batch), multimask=question.multimask)
        return [answer_of(image, view, ask, one) for image, view, one in zip(batch.images, views, found, strict=True)]

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parts that `freeze` names."""
        return tuple(f"{part}." for part in self.options.freeze)

    def weight_decay_exempt(self, name: str, parameter: Tensor) -> bool:
        """Vectors, and the position table."""
        return parameter.ndim <= 1 or name == "trunk.pos_embed"

    def _valid(self, batch: Batch, image: Int[Tensor, " m"]) -> Bool[Tensor, "m h w"]:
        """Pixels of each object's image that aren't padding."""
        size = self.options.model.image_hw
        inside = torch.zeros(len(batch), *size, dtype=torch.bool)
        for one, place in zip(instances_of(batch), inside, strict=True):
            height, width = content_size(one, size)
            place[:height, :width] = True
        return inside.to(image.device)[image]

    def _draws(self, batch: Batch, objects: Objects) -> dict[str, Float[Tensor, "m _"]]:
        """Each object's random numbers, functions of its image's seed and its own number."""
        rounds, seeds = self.options.rounds, batch.seeds[objects.image]
        wanted = {"first": 2, "boxes": 4, "corrections": rounds - 1, "pauses": max(rounds - 2, 0)}
        found = {}
        for name, num in wanted.items():
            most = int(objects.number.max()) + 1
            drawn = uniform(seeds, f"sam_{name}", most * num).view(len(seeds), most, num)
            found[name] = drawn[torch.arange(len(seeds), device=seeds.device), objects.number]
        return found
