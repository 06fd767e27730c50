"""Supervised classification: from scratch, or fine-tuning any trunk (MAE, appendix A.1).

Legend: B samples, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Config
from pipeline.data.batch import Batch, Transform
from pipeline.data.images.augment import POLICY
from pipeline.evaluate.base import Evaluation, Predictions
from pipeline.evaluate.classification import ClassificationEvaluation, best_classes
from pipeline.models.mixing import draw_mixing, mix_images, mix_labels
from pipeline.models.pixels import normalize
from pipeline.models.trunk.block import initialize
from pipeline.models.trunk.pooling import AttentionPool, Pooling, pool
from pipeline.models.trunk.vit import ViT
from pipeline.pictures.classification import labelled_pictures
from pipeline.pictures.picture import Picture
from pipeline.stages.base import DataFacts, Losses, Stage
from pipeline.stages.images import ImageOptions, image_transform, require_classes
from pipeline.stages.questions import Answer, class_answers

TOKENS = ("trunk.cls_token", "trunk.reg_token", "trunk.pos_embed", "attn_pool.latent")


class ClassifyOptions(ImageOptions):
    """Options of stage `classify`."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    pooling: Literal["avg", "cls", "avg_with_cls", "map"] = "avg"
    pre_logits: bool = False  # a linear layer of the trunk's width, and tanh, before the head
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    head_init_std: float = Field(default=2e-5, ge=0)
    mixup: float = Field(default=0.0, ge=0)  # a of Beta(a, a); with cutmix too, each pair gets one of the two
    cutmix: float = Field(default=0.0, ge=0)
    auto_augment: str = ""  # timm's name of a policy, such as rand-m9-mstd0.5-inc1 or original
    random_erase: float = Field(default=0.0, ge=0, le=1)  # share of the training images
    decay_tokens: bool = False  # weight decay for cls token, registers and positions too

    @model_validator(mode="after")
    def _cls_exists(self) -> ClassifyOptions:
        if self.pooling == "cls" and not self.model.cls_token:
            raise ValueError("pooling cls needs model.cls_token")
        if self.auto_augment and not POLICY.fullmatch(self.auto_augment):
            raise ValueError(
                f"no augmentation is called {self.auto_augment!r};"
                " use one of timm's: original, v0, 3a, or one like rand-m9-mstd0.5-inc1"
            )
        return self


class ClassifyStage(Stage[ClassifyOptions]):
    """Trunk and linear head.

    With pooling `avg` the patches are averaged, then normalised by `fc_norm`, and the trunk has no final norm. All
    others follow the trunk's final norm: `cls` takes the first token; `avg_with_cls` averages all tokens, as in FLIP's
    code and, without a cls token, in SimpleViT; `map` pools by attention.
    """

    options_class: ClassVar[type[Config]] = ClassifyOptions
    class_rows: ClassVar[tuple[str, int] | None] = ("head.weight", 0)

    def __init__(self, options: ClassifyOptions, data: DataFacts) -> None:
        super().__init__(options, data)
        require_classes(data, "classify")
        model = options.model.model_copy(update={"final_norm": options.pooling != "avg"})
        self.trunk = ViT(model)
        self.fc_norm = nn.LayerNorm(self.trunk.width, eps=model.norm_eps) if options.pooling == "avg" else nn.Identity()
        self.attn_pool = AttentionPool(model) if options.pooling == "map" else None
        self.pre_logits = nn.Linear(self.trunk.width, self.trunk.width) if options.pre_logits else None
        if self.pre_logits is not None:
            initialize(self.pre_logits)
        self.head = nn.Linear(self.trunk.width, len(data.classes))
        nn.init.zeros_(self.head.weight)
        if options.head_init_std > 0:
            nn.init.trunc_normal_(self.head.weight, std=options.head_init_std)
        nn.init.zeros_(self.head.bias)

    def loss(self, batch: Batch) -> Losses:
        """Cross-entropy with smoothed labels; with mixup or cutmix, of mixed images and labels."""
        assert batch.images is not None
        assert batch.labels is not None
        pixels = normalize(batch.images, self.options.pixels)
        target = batch.labels
        if self.options.mixup > 0 or self.options.cutmix > 0:
            size = (pixels.shape[2], pixels.shape[3])
            mixing = draw_mixing(batch.seeds, batch.weight, size, mixup=self.options.mixup, cutmix=self.options.cutmix)
            pixels = mix_images(pixels, mixing)
            target = mix_labels(batch.labels, mixing, len(self.data.classes))
        scores = self.scores_of_pixels(pixels, batch.seeds)
        each = F.cross_entropy(scores, target, reduction="none", label_smoothing=self.options.label_smoothing)
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

    def scores(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Logits in fp32."""
        return self.scores_of_pixels(normalize(images, self.options.pixels))

    def scores_of_pixels(self, pixels: Float[Tensor, "b 3 h w"], seeds: Tensor | None = None) -> Float[Tensor, "b c"]:
        """Logits of normalised images, in fp32."""
        tokens = self.trunk(pixels, seeds=seeds)
        if self.attn_pool is not None:
            features = self.attn_pool(tokens)
        else:
            features = self.fc_norm(pool(tokens, cast("Pooling", self.options.pooling)))
        if self.pre_logits is not None:
            features = torch.tanh(self.pre_logits(features))
        scores: Tensor = self.head(features)
        return scores.float()

    def transform(self, train: bool) -> Transform:
        """Random crop, mirroring and the configured augmentation in training, the centre otherwise; labels."""
        policy, erase = self.options.auto_augment, self.options.random_erase
        return image_transform(self.options, self.data, train=train, labels=True, policy=policy, erase=erase)

    def evaluations(self) -> Mapping[str, Evaluation]:
        """Top-1, top-5, loss and the confusion matrix."""
        return {"classification": ClassificationEvaluation(self.data.classes)}

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """Images with their class and the predicted one."""
        return labelled_pictures(batch, predictions["best"][:, 0], self.data.classes)

    def answer(self, batch: Batch, question: Config) -> list[Answer]:
        """The most likely classes with their probabilities."""
        assert batch.images is not None
        return class_answers(batch, self.scores(batch.images), self.data.classes)

    def weight_decay_exempt(self, name: str, parameter: Tensor) -> bool:
        """Vectors, biases and, unless `decay_tokens`, tokens and positions, as in MAE's fine-tuning; MAE's pretraining
        and pycls decay tokens.
        """
        return parameter.ndim <= 1 or (name in TOKENS and not self.options.decay_tokens)
