"""Semantic segmentation from a plain trunk: a linear head, or UPerNet on taps.

Legend: B images, H W pixels, K classes and the background, which is class 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import Config
from pipeline.data.batch import Batch, Transform
from pipeline.data.instances import Fitted, InstanceExample, LargeScaleJitter
from pipeline.evaluate.base import Evaluation, Predictions
from pipeline.evaluate.segmentation import SegmentationEvaluation, class_map
from pipeline.models.detection.pyramid import HeadNorm, as_map, quarter_taps
from pipeline.models.segmenter import LinearSegmenter, UPerNet
from pipeline.models.trunk.vit import ViT
from pipeline.pictures.class_maps import class_map_pictures
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

BACKGROUND = "background"
MAX_PICTURES = 8


class SegmentOptions(DenseOptions):
    """Options of stage `segment`."""

    head: Literal["linear", "upernet"] = "linear"
    channels: int = Field(default=512, gt=0)  # of UPerNet
    head_norm: HeadNorm = "layer"  # of UPerNet; the papers use batch norm
    freeze_trunk: bool = False  # train only the head (the linear protocol)
    jitter: tuple[float, float] = (0.5, 2.0)  # range of the factor an image is resized by in training

    @model_validator(mode="after")
    def _dense(self) -> SegmentOptions:
        check_dense_model(self, "segment")
        return self


class SegmentStage(Stage[SegmentOptions]):
    """Trunk and head; the classes are those of the data set's objects, and a background."""

    options_class: ClassVar[type[Config]] = SegmentOptions
    class_rows: ClassVar[tuple[str, int] | None] = ("head.head.weight", 1)
    resizes_patches: ClassVar[bool] = True

    def __init__(self, options: SegmentOptions, data: DataFacts) -> None:
        super().__init__(options, data)
        require_classes(data, "segment")
        self.classes = (BACKGROUND, *data.classes)
        self.trunk = ViT(options.model)
        width = self.trunk.width
        self.taps = quarter_taps(len(self.trunk.blocks)) if options.head == "upernet" else ()
        self.head = (
            UPerNet(width, options.channels, len(self.classes), options.head_norm)
            if options.head == "upernet"
            else LinearSegmenter(width, len(self.classes))
        )

    def loss(self, batch: Batch) -> Losses:
        """Cross-entropy averaged over each image's pixels, without padding."""
        logits = self.logits(batch)
        canvas = self.options.model.image_hw
        losses, right = [], []
        for scores, instances in zip(logits, instances_of(batch), strict=True):
            height, width = content_size(instances, canvas)
            truth = class_map(instances, canvas)[:height, :width].to(scores.device)
            shown = scores[:, :height, :width]
            losses.append(F.cross_entropy(shown.unsqueeze(0), truth.unsqueeze(0)))
            right.append((shown.detach().argmax(0) == truth).float().mean())
        total = (torch.stack(losses) * batch.weight).sum()
        return Losses(total, {"pixel_accuracy": (torch.stack(right) * batch.weight).sum()})

    def predict(self, batch: Batch) -> Predictions:
        """`map` [B,H,W]: each pixel's class."""
        return {"map": self.logits(batch).argmax(1)}

    def logits(self, batch: Batch) -> Float[Tensor, "b k h w"]:
        """Logits of every pixel of the batch's images, in fp32."""
        tokens = self.trunk(content_pixels(batch, self.options), taps=self.taps, seeds=batch.seeds)
        maps = tuple(as_map(x, tokens.grid) for x in tokens.taps or (tokens.patches,))
        logits = self.head(maps).float()
        return F.interpolate(logits, size=self.options.model.image_hw, mode="bilinear", align_corners=False)

    def transform(self, train: bool) -> Transform:
        """The whole image, as large as fits, or in training large-scale jitter; and its objects."""
        canvas, num = self.options.model.image_hw, len(self.data.classes)
        if train:
            return InstanceExample(LargeScaleJitter(canvas, self.options.jitter, self.options.flip), num_classes=num)
        return InstanceExample(Fitted(canvas), objects="stored", num_classes=num)

    def view(self) -> Transform:
        """The whole image, as large as fits."""
        return PlacedExample(Fitted(self.options.model.image_hw))

    def evaluations(self) -> Mapping[str, Evaluation]:
        """Mean IoU and pixel accuracy."""
        return {"segmentation": SegmentationEvaluation(self.classes)}

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """Images with their annotated and predicted classes."""
        return class_map_pictures(batch, predictions["map"].cpu(), most=MAX_PICTURES)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The trunk, where `freeze_trunk` is set."""
        return ("trunk.",) if self.options.freeze_trunk else ()
