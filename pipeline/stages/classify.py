"""Supervised classification: from scratch, or fine-tuning any trunk (MAE, appendix A.1).

Legend: B samples, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Config
from pipeline.data.batch import Batch, Transform
from pipeline.evaluate.base import Evaluation, Predictions
from pipeline.evaluate.classification import ClassificationEvaluation, best_classes
from pipeline.models.pixels import normalize
from pipeline.models.pooling import pool
from pipeline.models.vit import ViT
from pipeline.stages.base import DataFacts, Losses, Picture, Stage
from pipeline.stages.images import ImageOptions, image_transform, labelled_pictures, require_classes


class ClassifyOptions(ImageOptions):
    """Options of stage `classify`."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    pooling: Literal["avg", "cls"] = "avg"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    head_init_std: float = Field(default=2e-5, ge=0)

    @model_validator(mode="after")
    def _cls_exists(self) -> ClassifyOptions:
        if self.pooling == "cls" and not self.model.cls_token:
            raise ValueError("pooling cls needs model.cls_token")
        return self


class ClassifyStage(Stage):
    """Trunk and linear head.

    With pooling `avg` the patches are averaged before a norm of its own, `fc_norm`, and the trunk has no final norm;
    with `cls` the trunk's norm stays and its first token goes to the head.
    """

    options: ClassVar[type[Config]] = ClassifyOptions

    def __init__(self, options: ClassifyOptions, data: DataFacts) -> None:
        super().__init__(options, data)
        require_classes(data, "classify")
        self.config = options
        model = options.model.model_copy(update={"final_norm": options.pooling == "cls"})
        self.trunk = ViT(model)
        self.fc_norm = nn.LayerNorm(self.trunk.width, eps=model.norm_eps) if options.pooling == "avg" else nn.Identity()
        self.head = nn.Linear(self.trunk.width, len(data.classes))
        nn.init.trunc_normal_(self.head.weight, std=options.head_init_std)
        nn.init.zeros_(self.head.bias)

    def loss(self, batch: Batch) -> Losses:
        """Cross-entropy, smoothed."""
        assert batch.images is not None
        assert batch.labels is not None
        scores = self.scores(batch.images, batch.seeds)
        each = F.cross_entropy(scores, batch.labels, reduction="none", label_smoothing=self.config.label_smoothing)
        total = (batch.weight * each).sum()
        right = (batch.weight * (scores.argmax(1) == batch.labels)).sum()
        return Losses(total, {"cross_entropy": total.detach(), "top1": right.detach()})

    def predict(self, batch: Batch) -> Predictions:
        """`best` [B,5] classes, best first; `labels` and `loss` [B] where the batch has labels."""
        assert batch.images is not None
        scores = self.scores(batch.images)
        predictions = {"best": best_classes(scores)}
        if batch.labels is not None:
            each = F.cross_entropy(scores, batch.labels, reduction="none")
            predictions |= {"labels": batch.labels, "loss": each}
        return predictions

    def scores(self, images: UInt8[Tensor, "b 3 h w"], seeds: Tensor | None = None) -> Float[Tensor, "b c"]:
        """Logits in fp32."""
        tokens = self.trunk(normalize(images, self.config.pixels), seeds=seeds)
        scores: Tensor = self.head(self.fc_norm(pool(tokens, self.config.pooling)))
        return scores.float()

    def transform(self, train: bool) -> Transform:
        """Random crop and mirroring in training, the centre otherwise; labels."""
        return image_transform(self.config, self.data, train=train, labels=True)

    def evaluations(self) -> Mapping[str, Evaluation]:
        """Top-1, top-5, loss and confusion."""
        return {"classification": ClassificationEvaluation(self.data.classes)}

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """Images with their class and the predicted one."""
        return labelled_pictures(batch, predictions["best"][:, 0], self.data.classes)

    def weight_decay_exempt(self, name: str, parameter: Tensor) -> bool:
        """Vectors and biases, cls token and positions, as MAE's fine-tuning; its pretraining decays the tokens."""
        return parameter.ndim <= 1 or name in ("trunk.cls_token", "trunk.reg_token", "trunk.pos_embed")
