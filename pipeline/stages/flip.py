"""Contrastive pretraining of an image and a text tower: FLIP (Li et al. 2023, arXiv 2212.00794), CLIP and SigLIP.

With `mask_ratio: 0` it is CLIP and FLIP's unmasked tuning, with `freeze: [trunk.]` LiT (Zhai et al. 2022).

Legend: B pairs, D width of the trunk, E width of the common embedding, L tokens, K kept patches.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import ranks
from pipeline.config import Config
from pipeline.data.batch import Batch, Transform
from pipeline.errors import ConfigError
from pipeline.evaluate.base import Evaluation, Predictions
from pipeline.evaluate.image_text import ImageTextEvaluation
from pipeline.evaluate.prompts import names_of_sets, templates
from pipeline.losses.contrastive import clip_loss, siglip_loss
from pipeline.models.pixels import normalize
from pipeline.models.text.tower import TextConfig, TextMasking, TextTower
from pipeline.models.trunk.masking import random_masking
from pipeline.models.trunk.pooling import AttentionPool, pool
from pipeline.models.trunk.vit import ViT
from pipeline.pictures.classification import captioned
from pipeline.pictures.picture import Picture
from pipeline.pictures.retrieval import caption_pictures
from pipeline.stages.base import ContrastiveStage, DataFacts, Losses
from pipeline.stages.features import feature_evaluations, feature_label_use
from pipeline.stages.images import ImageOptions, captioned_transform, with_labels
from pipeline.stages.label_use import LabelUse
from pipeline.stages.questions import QUESTION, Answer, Question

LOGIT_SCALE_MAX = math.log(100)

log = logging.getLogger("vitrail")

Ratio = Annotated[float, Field(ge=0, lt=1)]
Measure = Literal["zeroshot", "retrieval", "knn", "linear_probe"]
ClassNames = str | tuple[str, ...]


@functools.cache
def warn_alone() -> None:
    """Warn about a global batch of one pair, once per process."""
    log.warning("a batch of one pair has no negatives, so nothing can be learnt from it; raise data.global_batch")


class RatioFrom(Config):
    """A mask ratio, and the number of samples seen after which it applies."""

    from_samples: int = Field(ge=0)
    ratio: Ratio


class FlipOptions(ImageOptions):
    """Options of stage `flip`."""

    crop_scale: tuple[float, float] = (0.5, 1.0)
    mask_ratio: Ratio | tuple[RatioFrom, ...] = 0.5  # of patches, in training; or a schedule by samples seen, from 0 on
    pooling: Literal["cls", "avg", "avg_with_cls", "map"] = "avg_with_cls"  # after the final norm; FLIP averages all
    projection: bool = True  # of image features, without bias; SigLIP has none
    embed_dim: int = Field(default=512, gt=0)
    text: TextConfig = TextConfig()
    text_mask_ratio: Ratio = 0.0  # of a context's tokens, in training
    text_masking: TextMasking = "padding_first"
    loss: Literal["clip", "siglip"] = "clip"
    init_scale: float | None = Field(default=None, ge=1, le=100)  # of the logits; None: 1/0.07 for clip, 10 for siglip
    init_bias: float = -10.0  # of siglip's logits
    freeze: tuple[str, ...] = ()  # parameters whose names begin with one of these aren't trained
    decay_positions: bool = True  # weight decay for trained position tables too, as open_clip; the official FLIP: no
    evaluate: tuple[Measure, ...] = ("zeroshot", "retrieval")
    templates: str | tuple[str, ...] = "openai_imagenet"  # prompts, or the name of a list of open_clip's
    class_names: ClassNames | dict[str, ClassNames] = ()  # for zero-shot: imagenet (open_clip's), a file or a list; ():
    # the data's names; or a mapping from evaluation sets to any of these, where sets have different classes

    @model_validator(mode="after")
    def _possible(self) -> FlipOptions:
        starts = [step.from_samples for step in self.mask_schedule]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"mask_ratio must begin with from_samples 0 and rise, not {starts}")
        for step in self.mask_schedule:
            if self.model.num_kept(step.ratio) < 1:
                raise ValueError(f"mask_ratio {step.ratio} keeps none of {self.model.num_patches} patches")
            if step.ratio > 0 and self.model.spatial:
                raise ValueError("windows, conv_blocks and relative_positions need whole images: mask_ratio 0")
        if int(self.text.context_length * (1 - self.text_mask_ratio)) < 1:
            raise ValueError(f"text_mask_ratio {self.text_mask_ratio} keeps no token of {self.text.context_length}")
        if self.pooling == "cls" and not self.model.cls_token:
            raise ValueError("pooling cls needs model.cls_token")
        if not self.projection and self.embed_dim != self.model.shape.width:
            raise ValueError(f"without projection embed_dim must be the trunk's width, {self.model.shape.width}")
        if self.text.projection == "none" and self.embed_dim != self.text.width:
            raise ValueError(f"with text.projection none embed_dim must be text.width, {self.text.width}")
        return self

    @property
    def mask_schedule(self) -> tuple[RatioFrom, ...]:
        """Mask ratios by samples seen."""
        if isinstance(self.mask_ratio, tuple):
            return self.mask_ratio
        return (RatioFrom(from_samples=0, ratio=self.mask_ratio),)

    def mask_ratio_at(self, samples: int) -> float:
        """The mask ratio of a batch after this many samples."""
        return [step.ratio for step in self.mask_schedule if step.from_samples <= samples][-1]


class FlipQuestion(Question):
    """Texts that the images are compared with."""

    texts: tuple[str, ...] = ()
    embedding: bool = False  # also return the image's embedding


class FlipStage(ContrastiveStage[FlipOptions]):
    """An image tower and a text tower with a common embedding space."""

    options_class: ClassVar[type[Config]] = FlipOptions
    question_class: ClassVar[type[Config]] = FlipQuestion
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"logit_scale": (0.0, LOGIT_SCALE_MAX)}

    def __init__(self, options: FlipOptions, data: DataFacts) -> None:
        super().__init__(options, data)
        self.tokenizer = options.text.build_tokenizer()
        self.trunk = ViT(options.model)
        width = self.trunk.width
        self.attn_pool = AttentionPool(options.model) if options.pooling == "map" else None
        self.image_projection: nn.Linear | None = None
        if options.projection:
            self.image_projection = nn.Linear(width, options.embed_dim, bias=False)
            nn.init.normal_(self.image_projection.weight, std=width**-0.5)
        try:
            self.text = TextTower(options.text, options.embed_dim, self.tokenizer.vocabulary)
        except ValueError as error:
            raise ConfigError(str(error), where="options.text", fix="make tokenizer and tower match") from None
        # One element rather than none: DeepSpeed can't take parameters without a dimension.
        scale = options.init_scale or (1 / 0.07 if options.loss == "clip" else 10.0)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(scale)))
        self.logit_bias: nn.Parameter | None = None
        if options.loss == "siglip":
            self.logit_bias = nn.Parameter(torch.full((1,), options.init_bias))
        # Each set is evaluated with its own classes; one that names none, with the training data's.
        self.labels = {name: set_classes or data.classes for name, set_classes in data.sets.items()} or {
            "": data.classes
        }
        self.prompted = names_of_sets(options.class_names, self.labels)

    @classmethod
    def label_use(cls, options: Config) -> LabelUse | None:
        """Only kNN and the linear probe need common classes; zero-shot classification uses each set's own."""
        assert isinstance(options, FlipOptions)
        return feature_label_use(options.evaluate)

    @property
    def schedule_changes(self) -> tuple[int, ...]:
        """Numbers of samples after which the mask ratio changes."""
        return tuple(step.from_samples for step in self.options.mask_schedule)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Normalised embeddings of masked images and of their captions, [B,E] each, in fp32."""
        assert batch.images is not None
        assert batch.text is not None
        keep, text_keep = None, None
        ratio = self.options.mask_ratio_at(batch.position)
        if ratio > 0:
            num_patches = self.options.model.num_patches
            keep = random_masking(batch.seeds, num_patches, self.options.model.num_kept(ratio)).keep
        if self.options.text_mask_ratio > 0:
            how = self.options.text_masking
            text_keep = self.text.text_masking(batch.text, batch.seeds, self.options.text_mask_ratio, how)
        return self.embed_images(batch.images, keep, batch.seeds), self.embed_texts(batch.text, text_keep)

    def contrast(self, embedded: tuple[tuple[Tensor, ...], Float[Tensor, " b"]]) -> Losses:
        """The loss against all ranks' pairs; `logit_scale` (and `logit_bias`) are logged as parts."""
        (images, texts), weight = embedded
        # The engine clamps the fp32 master, but low-precision copies follow one step later.
        scale = self.logit_scale.float().clamp(*self.limits["logit_scale"]).exp()
        if self.logit_bias is None:
            each = clip_loss(images, texts, weight, scale)
        else:
            each = siglip_loss(images, texts, weight, scale, self.logit_bias)
        if len(weight) == 1 and ranks.world().size == 1:
            warn_alone()
        total = (weight * each).sum()
        parts = {"contrastive": total.detach(), "logit_scale": scale.detach().squeeze(0) * weight.sum()}
        if self.logit_bias is not None:
            parts["logit_bias"] = self.logit_bias.detach().float().squeeze(0) * weight.sum()
        return Losses(total, parts)

    def predict(self, batch: Batch) -> Predictions:
        """`image_embedding` [B,E] of whole images and their `features` [B,D] before the projection; `text_embedding`
        [B,E] and `text`; and `labels`: each if the batch holds it.
        """
        predictions: dict[str, Tensor] = {}
        if batch.images is not None:
            features = self.image_features(batch.images)
            predictions |= {"image_embedding": self._project(features), "features": features}
        if batch.text is not None:
            predictions |= {"text_embedding": self.embed_texts(batch.text), "text": batch.text}
        return with_labels(predictions, batch)

    def embed_images(
        self, images: Tensor, keep: Int[Tensor, "b k"] | None = None, seeds: Tensor | None = None
    ) -> Float[Tensor, "b e"]:
        """Normalised embeddings of uint8 images [B,3,H,W], from the patches at `keep` or from all."""
        return self._project(self.image_features(images, keep, seeds))

    def image_features(
        self, images: Tensor, keep: Int[Tensor, "b k"] | None = None, seeds: Tensor | None = None
    ) -> Float[Tensor, "b d"]:
        """Pooled tokens of uint8 images [B,3,H,W]."""
        tokens = self.trunk(normalize(images, self.options.pixels), keep=keep, seeds=seeds)
        if self.attn_pool is not None:
            pooled: Tensor = self.attn_pool(tokens)
            return pooled
        assert self.options.pooling != "map"
        return pool(tokens, self.options.pooling)

    def embed_texts(self, text: Int[Tensor, "b l"], keep: Tensor | None = None) -> Float[Tensor, "b e"]:
        """Normalised embeddings of texts, from the tokens at `keep` or from all."""
        return F.normalize(self.text(text, keep).float(), dim=-1)

    def transform(self, train: bool) -> Transform:
        """Images and tokens; in evaluation also labels, if a set has any and an evaluation needs them."""
        read = not train and any(measure != "retrieval" for measure in self.options.evaluate)
        num_classes = max(map(len, self.labels.values())) if read else 0
        return captioned_transform(self.options, train=train, num_classes=num_classes, tokenizer=self.tokenizer)

    def evaluations(self) -> Mapping[str, Evaluation]:
        """Those of zero-shot classification, retrieval both ways, kNN and a linear probe that `evaluate` names."""
        names = self.options.evaluate
        evaluations: dict[str, Evaluation] = {}
        if "zeroshot" in names or "retrieval" in names:
            classes = self.prompted if "zeroshot" in names else {}
            evaluations["image_text"] = ImageTextEvaluation(
                classes, templates(self.options.templates), self.tokenizer, retrieval="retrieval" in names
            )
        if self.data.classes:
            evaluations |= feature_evaluations(names, self.data.classes)
        return evaluations

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """For a few captions of the batch, the images of the batch that match best."""
        return caption_pictures(batch, predictions, self.tokenizer.decode)

    def answer(self, batch: Batch, question: FlipQuestion) -> list[Answer]:
        """The match of each text with each image: its cosine, and its probability (among the texts; with SigLIP's loss,
        of each text by itself).
        """
        assert batch.images is not None
        if not question.texts and not question.embedding:
            fix = "ask with texts=[a cat, a dog], or for the images' embeddings with embedding=true"
            raise ConfigError("the question names no texts to compare the images with", where=QUESTION, fix=fix)
        images = self.embed_images(batch.images)
        answers = [Answer({"embedding": row} if question.embedding else {}) for row in images.tolist()]
        if not question.texts:
            return answers
        cosine = images @ self.embed_texts(self.tokenizer(list(question.texts)).to(images.device)).T
        logits = self.logit_scale.float().exp() * cosine
        shares = logits.softmax(1) if self.logit_bias is None else (logits + self.logit_bias.float()).sigmoid()
        for i, answer in enumerate(answers):
            order = cosine[i].argsort(descending=True).tolist()
            answer.facts["texts"] = [
                {"text": question.texts[j], "cosine": cosine[i, j].item(), "probability": shares[i, j].item()}
                for j in order
            ]
            caption = f"{question.texts[order[0]]} ({shares[i, order[0]]:.0%})"
            answers[i] = answer._replace(pictures=(captioned(caption, caption, batch.images[i]),))
        return answers

    @property
    def frozen(self) -> tuple[str, ...]:
        """The prefixes in `freeze`."""
        return self.options.freeze

    @property
    def text_options(self) -> TextConfig:
        """Options of the text tower."""
        return self.options.text

    def weight_decay_exempt(self, name: str, parameter: Tensor) -> bool:
        """Vectors, biases and class tokens; position tables too where `decay_positions` is off."""
        last = name.rpartition(".")[2]
        positions = last == "pos_embed" and not self.options.decay_positions
        return parameter.ndim <= 1 or positions or last in ("cls_token", "reg_token", "latent")

    def _project(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        projected = features if self.image_projection is None else self.image_projection(features)
        return F.normalize(projected.float(), dim=-1)
