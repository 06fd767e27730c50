"""Linear probing: the quality of a frozen trunk's features (MAE, appendix A.1), or of raw pixels instead.

Legend: B samples, C classes, D features, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Config
from pipeline.data.batch import Batch, Transform
from pipeline.errors import ConfigError
from pipeline.evaluate.base import Evaluation, Predictions
from pipeline.evaluate.classification import best_classes
from pipeline.evaluate.probe import ProbeEvaluation
from pipeline.models.feature_norm import FeatureNorm
from pipeline.models.noise import uniform
from pipeline.models.pixels import normalize
from pipeline.models.trunk.pooling import Pooling, pool
from pipeline.models.trunk.vit import ViT
from pipeline.pictures.classification import labelled_pictures
from pipeline.pictures.picture import Picture
from pipeline.stages.base import DataFacts, Losses, Stage
from pipeline.stages.images import ImageOptions, image_transform, require_classes
from pipeline.stages.questions import QUESTION, Answer, Question, class_answers


class ProbeOptions(ImageOptions):
    """Options of stage `probe`."""

    features: Literal["trunk", "pixels"] = "trunk"
    pixels_side: int = Field(default=16, gt=0)  # features `pixels` are the image resized to this height and width
    pooling: Pooling = "cls"
    lr_multipliers: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the learning rate, one head for each
    head_init_std: float = Field(default=0.01, ge=0)
    shuffled_labels: bool = False  # as a control, train on labels that are independent of the image

    @model_validator(mode="after")
    def _possible(self) -> ProbeOptions:
        if self.pooling == "cls" and not self.model.cls_token:
            raise ValueError("pooling cls needs model.cls_token")
        if not self.lr_multipliers or min(self.lr_multipliers) <= 0:
            raise ValueError("lr_multipliers must be one or more positive numbers")
        if len(set(self.lr_multipliers)) != len(self.lr_multipliers):
            raise ValueError("lr_multipliers must differ from one another")
        return self


class ProbeQuestion(Question):
    """The choice of the head that answers."""

    head: int | None = Field(default=None, ge=0)  # from 0; None: the middle one


class ProbeStage(Stage[ProbeOptions]):
    """Linear heads on standardised features of a frozen trunk.

    One forward pass of the trunk feeds all heads. They share nothing else, unless gradients are clipped by their common
    norm: leave `optim.clip_grad` at 0.
    """

    options_class: ClassVar[type[Config]] = ProbeOptions
    class_rows: ClassVar[tuple[str, int] | None] = ("heads.0.weight", 0)
    question_class: ClassVar[type[Config]] = ProbeQuestion

    def __init__(self, options: ProbeOptions, data: DataFacts) -> None:
        super().__init__(options, data)
        require_classes(data, "probe")
        self.trunk = ViT(options.model)
        width = self.trunk.width if options.features == "trunk" else 3 * options.pixels_side**2
        self.feature_norm = FeatureNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, len(data.classes)) for _ in options.lr_multipliers)
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=options.head_init_std)
            nn.init.zeros_(head.bias)

    def loss(self, batch: Batch) -> Losses:
        """Cross-entropy summed over the heads."""
        assert batch.images is not None
        assert batch.labels is not None
        labels = self._shuffled(batch.ids) if self.options.shuffled_labels else batch.labels
        scores = self.scores(batch.images, batch.weight)
        each = F.cross_entropy(scores.flatten(0, 1), labels.repeat_interleave(len(self.heads)), reduction="none")
        by_head = (batch.weight.unsqueeze(1) * each.view(len(labels), -1)).sum(0)
        parts = {name: value.detach() for name, value in zip(self._head_names(), by_head, strict=True)}
        return Losses(by_head.sum(), parts)

    def predict(self, batch: Batch) -> Predictions:
        """`best` [B,H,5] classes of every head, best first; the true `labels` where the batch has any."""
        assert batch.images is not None
        scores = self.scores(batch.images, batch.weight)
        best = best_classes(scores.flatten(0, 1)).view(len(scores), len(self.heads), -1)
        return {"best": best} | ({} if batch.labels is None else {"labels": batch.labels})

    def scores(self, images: UInt8[Tensor, "b 3 h w"], weight: Float[Tensor, " b"]) -> Float[Tensor, "b heads c"]:
        """Every head's logits, in fp32."""
        features = self.feature_norm(self.features(images), weight)
        return torch.stack([head(features.to(head.weight.dtype)).float() for head in self.heads], dim=1)

    @torch.no_grad()
    def features(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """The heads' input before standardisation."""
        pixels = normalize(images, self.options.pixels)
        if self.options.features == "pixels":
            side = self.options.pixels_side
            return F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True).flatten(1)
        return pool(self.trunk(pixels), self.options.pooling)

    def transform(self, train: bool) -> Transform:
        """Random crop and mirroring in training, the centre otherwise; labels."""
        return image_transform(self.options, self.data, train=train, labels=True)

    def evaluations(self) -> Mapping[str, Evaluation]:
        """Accuracy of the head selected on `validation`, and of every head."""
        return {"probe": ProbeEvaluation(self.data.classes, self._head_names())}

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """Images with their class and the one the middle head predicts."""
        return labelled_pictures(batch, predictions["best"][:, len(self.heads) // 2, 0], self.data.classes)

    def answer(self, batch: Batch, question: ProbeQuestion) -> list[Answer]:
        """The most likely classes with their probabilities, by one of the heads."""
        assert batch.images is not None
        head = len(self.heads) // 2 if question.head is None else question.head
        if head >= len(self.heads):
            raise ConfigError(
                f"no head {head}", where=f"{QUESTION}.head", fix=f"use one from 0 to {len(self.heads) - 1}"
            )
        return class_answers(batch, self.scores(batch.images, batch.weight)[:, head], self.data.classes)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The trunk: only the heads are trained."""
        return ("trunk.",)

    def lr_scale(self, name: str) -> float:
        """Head i has `lr_multipliers[i]` times the common learning rate."""
        return self.options.lr_multipliers[int(name.split(".")[1])] if name.startswith("heads.") else 1.0

    def _head_names(self) -> list[str]:
        return [f"lr_x{multiplier:g}" for multiplier in self.options.lr_multipliers]

    def _shuffled(self, ids: Tensor) -> Int[Tensor, " b"]:
        """Labels that are a function of the sample's id alone, uniform over the classes."""
        return (uniform(ids, "shuffled_labels", 1).squeeze(1) * len(self.data.classes)).long()
