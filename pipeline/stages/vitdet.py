"""Detection and instance segmentation from a plain trunk (ViTDet, Li et al. 2022, arXiv 2203.16527).

Legend: B images, D detections of an image, M side of a predicted mask, K classes.

Losses are sums over images of each image's mean, as in detectron2 with one image per GPU, and anchors and regions are
sampled from the images' seeds, so gradients are the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.data.batch import Batch, Instances, Transform
from pipeline.data.instances import Fitted, InstanceExample, LargeScaleJitter, decode_masks
from pipeline.evaluate.base import Evaluation, Predictions
from pipeline.evaluate.coco import CocoEvaluation, readable, stored_detections
from pipeline.models.batch_norm import BatchNorm
from pipeline.models.detection.masks import POOLED_SIDE, MaskHead, mask_losses
from pipeline.models.detection.proposals import DetectorConfig, ProposalNetwork, Targets
from pipeline.models.detection.pyramid import NUM_LEVELS, SimplePyramid, TappedPyramid, as_map, quarter_taps
from pipeline.models.detection.rcnn import BoxHeads, Detections, level_strides, pool
from pipeline.models.trunk.vit import ViT
from pipeline.pictures.detections import detection_pictures
from pipeline.pictures.picture import Picture
from pipeline.stages.base import DataFacts, Losses, Stage
from pipeline.stages.dense import (
    DenseOptions,
    PlacedExample,
    check_dense_model,
    content_pixels,
    content_size,
    instances_of,
)
from pipeline.stages.images import require_classes
from pipeline.stages.questions import Answer, Question

MAX_PICTURES = 8


class VitDetOptions(DenseOptions):
    """Options of stage `vitdet`."""

    detector: DetectorConfig = DetectorConfig()
    pyramid: Literal["simple", "fpn"] = "simple"  # simple: ViTDet's; fpn: on four taps, as in Li et al. 2021
    jitter: tuple[float, float] = (0.1, 2.0)  # range of large-scale jitter's factor, in training
    decay_norms: bool = False  # weight decay for norms and the position table too, as in ViTDet-H

    @model_validator(mode="after")
    def _detects(self) -> VitDetOptions:
        check_dense_model(self, "vitdet")
        height, width = self.model.image_hw
        step = 4 * self.model.patch_size
        if height % step or width % step:
            raise ValueError(f"the pyramid needs an image_size that is a multiple of 4 patches, {step} pixels")
        return self


class DetectionQuestion(Question):
    """Which detections to return."""

    above: float = 0.5  # only those with a higher score; 0: all that pass detector.score_threshold


class VitDetStage(Stage[VitDetOptions]):
    """Trunk, pyramid, proposals, and heads for boxes and masks."""

    options_class: ClassVar[type[Config]] = VitDetOptions
    class_rows: ClassVar[tuple[str, int] | None] = ("boxes.heads.0.cls_score.weight", 1)
    question_class: ClassVar[type[Config]] = DetectionQuestion
    resizes_patches: ClassVar[bool] = True  # MAE's ViT-H has patches of 14 pixels, ViTDet's of 16

    def __init__(self, options: VitDetOptions, data: DataFacts) -> None:
        super().__init__(options, data)
        require_classes(data, "vitdet")
        detector, num_classes = options.detector, len(data.classes)
        self.trunk = ViT(options.model)
        channels = detector.pyramid_channels
        self.taps = quarter_taps(len(self.trunk.blocks)) if options.pyramid == "fpn" else ()
        self.pyramid = (
            TappedPyramid(self.trunk.width, channels, detector.head_norm)
            if options.pyramid == "fpn"
            else SimplePyramid(self.trunk.width, channels)
        )
        strides = level_strides(options.model.patch_size, NUM_LEVELS)
        self.strides = strides[:-1]
        self.rpn = ProposalNetwork(detector, strides)
        self.boxes = BoxHeads(detector, num_classes, self.strides)
        self.masks = MaskHead(detector, num_classes) if detector.masks else None
        self._exempt = frozenset(exempt_from_decay(self))

    def loss(self, batch: Batch) -> Losses:
        """Losses of proposals, classes, boxes and masks: means over each image, summed over images."""
        levels = self.levels(batch)
        targets = [targets_of(instances, levels[0].device) for instances in instances_of(batch)]
        sizes = [self.options.model.image_hw] * len(batch)
        anchors = self.rpn(levels)
        parts = dict(zip(("rpn_class", "rpn_box"), self.rpn.losses(anchors, targets, batch.seeds), strict=True))
        proposals = self.rpn.propose(anchors, sizes)
        boxes = self.boxes.losses(levels[:-1], proposals, targets, sizes, batch.seeds)
        parts |= {"class": boxes.classes, "box": boxes.boxes}
        if self.masks is not None:
            regions = pool(levels[:-1], [sampled.boxes for sampled in boxes.objects], self.strides, POOLED_SIDE)
            truth = [
                decoded_masks(instances, self.options.model.image_hw, levels[0].device)
                for instances in instances_of(batch)
            ]
            parts["mask"] = mask_losses(self.masks(regions), boxes.objects, truth)
        summed = {name: (values * batch.weight).sum() for name, values in parts.items()}
        return Losses(torch.stack(list(summed.values())).sum(), {name: v.detach() for name, v in summed.items()})

    def predict(self, batch: Batch) -> Predictions:
        """Detections, best first and padded to the largest possible number: `boxes` [B,D,4] in pixels of the batch's
        images, `scores` and `classes` [B,D], `counts` [B], and `masks` [B,D,M,M] as probabilities.
        """
        levels = self.levels(batch)
        sizes = [content_size(instances, self.options.model.image_hw) for instances in instances_of(batch)]
        proposals = self.rpn.propose(self.rpn(levels), sizes)
        detections: list[Detections] = self.boxes(levels[:-1], proposals, sizes)
        predictions = _padded(detections, self.options.detector.detections)
        if self.masks is not None:
            regions = pool(levels[:-1], [image.boxes for image in detections], self.strides, POOLED_SIDE)
            logits = self.masks(regions)
            classes = torch.cat([image.classes for image in detections])
            probabilities = logits[torch.arange(len(logits), device=logits.device), classes].sigmoid()
            masks = probabilities.new_zeros(*predictions["scores"].shape, *probabilities.shape[1:])
            start = 0
            for i, count in enumerate(predictions["counts"].tolist()):
                masks[i, :count] = probabilities[start : start + count]
                start += count
            predictions["masks"] = masks
        return predictions

    def levels(self, batch: Batch) -> tuple[Float[Tensor, "b f _ _"], ...]:
        """The pyramid's maps of a batch, finest first."""
        pixels = content_pixels(batch, self.options)
        tokens = self.trunk(pixels, taps=self.taps, seeds=batch.seeds)
        maps = tokens.taps or (tokens.patches,)
        levels: tuple[Tensor, ...] = self.pyramid(tuple(as_map(x, tokens.grid) for x in maps))
        return levels

    def transform(self, train: bool) -> Transform:
        """The whole image, as large as fits, or in training large-scale jitter; and its objects."""
        canvas, masks, num = self.options.model.image_hw, self.masks is not None, len(self.data.classes)
        if train:
            jitter = LargeScaleJitter(canvas, self.options.jitter, self.options.flip)
            return InstanceExample(jitter, masks=masks, num_classes=num)
        return InstanceExample(Fitted(canvas), objects="stored", masks=masks, num_classes=num)

    def view(self) -> Transform:
        """The whole image, as large as fits."""
        return PlacedExample(Fitted(self.options.model.image_hw))

    def answer(self, batch: Batch, question: DetectionQuestion) -> list[Answer]:
        """Detections, as COCO's results in pixels of the stored image, with the name of the class."""
        predictions, classes, min_score = self.predict(batch), self.data.classes, question.above
        pictures = detection_pictures(batch, predictions, classes, most=len(batch), min_score=min_score)
        detections = stored_detections(predictions, batch)
        answers = []
        for i, picture in zip(sorted(detections), pictures, strict=True):
            named = [
                {"class": classes[result["category_id"]], **readable(result)}
                for result in detections[i]
                if result["score"] > min_score
            ]
            answers.append(Answer({"detections": named}, (picture,)))
        return answers

    def evaluations(self) -> Mapping[str, Evaluation]:
        """COCO's figures of boxes and, unless turned off, of masks."""
        return {"coco": CocoEvaluation(self.data.classes, masks=self.masks is not None)}

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """Images with their annotated objects and the detections."""
        return detection_pictures(batch, predictions, self.data.classes, most=MAX_PICTURES)

    def weight_decay_exempt(self, name: str, parameter: Tensor) -> bool:
        """As in detectron2's ViTDet recipes: norms and the position table, but not biases or channel norms."""
        return not self.options.decay_norms and name in self._exempt


def exempt_from_decay(stage: nn.Module) -> list[str]:
    """Names of the parameters that detectron2 doesn't decay: those of norms, by class, and the position table.

    The norms in a `residual` are channel norms in detectron2, which it decays.
    """
    norms = (nn.LayerNorm, nn.GroupNorm, BatchNorm)
    exempt = [
        f"{module}.{name}"
        for module, part in stage.named_modules()
        if isinstance(part, norms) and ".residual." not in module
        for name, _ in part.named_parameters()
    ]
    return [*exempt, "trunk.pos_embed"]


def targets_of(instances: Instances, device: torch.device) -> Targets:
    """An image's objects, without crowd regions."""
    single = instances.crowd == 0
    return Targets(instances.boxes[single].to(device), instances.labels[single].to(device))


def decoded_masks(instances: Instances, size: tuple[int, int], device: torch.device) -> Tensor:
    """Pixels of the objects' masks [N,H,W], numbered as in `targets_of`."""
    single = [mask for mask, crowd in zip(instances.masks, instances.crowd.tolist(), strict=True) if not crowd]
    return decode_masks(single, size).to(device)


def _padded(detections: Sequence[Detections], most: int) -> dict[str, Tensor]:
    """Detections of equal shape for every image; absent ones have score 0."""
    like = detections[0]
    boxes = like.boxes.new_zeros(len(detections), most, 4)
    scores = like.scores.new_zeros(len(detections), most)
    classes = like.classes.new_zeros(len(detections), most)
    for i, image in enumerate(detections):
        count = len(image.scores)
        boxes[i, :count], scores[i, :count], classes[i, :count] = image.boxes, image.scores, image.classes
    counts = torch.tensor([len(image.scores) for image in detections], device=boxes.device)
    return {"boxes": boxes, "scores": scores, "classes": classes, "counts": counts}
