"""Contrastive pretraining of an image and a text tower with masked images (FLIP, Li et al. 2023, arXiv 2212.00794).

With `mask_ratio: 0` it is CLIP, and FLIP's unmasked tuning.

Legend: B pairs, D width, E width of the common embedding, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Config
from pipeline.data.batch import Batch, Transform
from pipeline.errors import ConfigError
from pipeline.evaluate.base import Evaluation, Predictions
from pipeline.evaluate.image_text import ImageTextEvaluation
from pipeline.losses.contrastive import clip_loss
from pipeline.models.masking import random_masking
from pipeline.models.pixels import normalize
from pipeline.models.pooling import pool
from pipeline.models.text import ClipTokenizer, TextConfig, TextTower
from pipeline.models.vit import ViT
from pipeline.stages.base import Answer, ContrastiveStage, DataFacts, Losses, Picture, Question
from pipeline.stages.images import ImageOptions, image_transform, with_labels

LOGIT_SCALE_INIT = math.log(1 / 0.07)
LOGIT_SCALE_MAX = math.log(100)
NUM_PICTURES = 6
NUM_FOUND = 4  # images shown for a caption


class FlipOptions(ImageOptions):
    """Options of stage `flip`."""

    crop_scale: tuple[float, float] = (0.5, 1.0)
    mask_ratio: float = Field(default=0.5, ge=0, lt=1)  # of patches, in training
    pooling: Literal["cls", "avg"] = "avg"  # avg is over all tokens after the final norm, cls among them, as FLIP's
    embed_dim: int = Field(default=512, gt=0)
    text: TextConfig = TextConfig()
    templates: tuple[str, ...] = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "{}")

    @model_validator(mode="after")
    def _possible(self) -> FlipOptions:
        if self.model.num_kept(self.mask_ratio) < 1:
            raise ValueError(f"mask_ratio {self.mask_ratio} keeps none of {self.model.num_patches} patches")
        if self.pooling == "cls" and not self.model.cls_token:
            raise ValueError("pooling cls needs model.cls_token")
        return self


class FlipQuestion(Question):
    """What `vitrail predict` compares the images with."""

    texts: tuple[str, ...] = ()
    embedding: bool = False  # tell the image's embedding too


class FlipStage(ContrastiveStage):
    """Two towers that put an image and its caption close together."""

    options: ClassVar[type[Config]] = FlipOptions
    question: ClassVar[type[Config]] = FlipQuestion
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"logit_scale": (0.0, LOGIT_SCALE_MAX)}

    def __init__(self, options: FlipOptions, data: DataFacts) -> None:
        super().__init__(options, data)
        self.config = options
        self.trunk = ViT(options.model)
        width = self.trunk.width
        self.image_projection = nn.Linear(width, options.embed_dim, bias=False)
        nn.init.normal_(self.image_projection.weight, std=width**-0.5)
        self.text = TextTower(options.text, options.embed_dim)
        # One element rather than none: DeepSpeed can't take parameters without a dimension.
        self.logit_scale = nn.Parameter(torch.full((1,), LOGIT_SCALE_INIT))
        self.tokenizer = ClipTokenizer(options.text.context_length)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Normalised embeddings of masked images and of their captions, [B,E] each, fp32."""
        assert batch.images is not None
        assert batch.text is not None
        keep = None
        if self.config.mask_ratio > 0:
            num_patches = self.config.model.num_patches
            keep = random_masking(batch.seeds, num_patches, self.config.model.num_kept(self.config.mask_ratio)).keep
        return self.embed_images(batch.images, keep, batch.seeds), self.embed_texts(batch.text)

    def contrast(self, embedded: tuple[tuple[Tensor, ...], Float[Tensor, " b"]]) -> Losses:
        """CLIP's loss against all ranks' pairs; `logit_scale` is logged as a part."""
        (images, texts), weight = embedded
        # The engine holds the master under the limit, but low-precision copies follow a step later.
        scale = self.logit_scale.float().clamp(*self.limits["logit_scale"]).exp()
        total = (weight * clip_loss(images, texts, weight, scale)).sum()
        logged = scale.detach().squeeze(0) * weight.sum()
        return Losses(total, {"contrastive": total.detach(), "logit_scale": logged})

    def predict(self, batch: Batch) -> Predictions:
        """`image_embedding` of whole images and `text_embedding` [B,E], for what the batch holds; `text`, `labels`."""
        predictions: dict[str, Tensor] = {}
        if batch.images is not None:
            predictions["image_embedding"] = self.embed_images(batch.images)
        if batch.text is not None:
            predictions |= {"text_embedding": self.embed_texts(batch.text), "text": batch.text}
        return with_labels(predictions, batch)

    def embed_images(
        self, images: Tensor, keep: Tensor | None = None, seeds: Tensor | None = None
    ) -> Float[Tensor, "b e"]:
        """Normalised embeddings of uint8 images [B,3,H,W], from the patches at `keep` or all of them."""
        tokens = self.trunk(normalize(images, self.config.pixels), keep=keep, seeds=seeds)
        pooled = pool(tokens, "cls" if self.config.pooling == "cls" else "avg_with_cls")
        return F.normalize(self.image_projection(pooled).float(), dim=-1)

    def embed_texts(self, text: Tensor) -> Float[Tensor, "b e"]:
        """Normalised embeddings of tokens [B,L]."""
        return F.normalize(self.text(text).float(), dim=-1)

    def transform(self, train: bool) -> Transform:
        """Images and tokens; labels where the data have any, for zero-shot classification."""
        labels = bool(self.data.classes) and not train
        return image_transform(self.config, self.data, train=train, labels=labels, tokenizer=self.tokenizer)

    def evaluations(self) -> Mapping[str, Evaluation]:
        """Zero-shot classification with the data's class names, and retrieval both ways."""
        return {"image_text": ImageTextEvaluation(self.data.classes, self.config.templates, self.tokenizer)}

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """For a few captions of the batch, the images of the batch that fit best."""
        assert batch.images is not None
        assert batch.text is not None
        present = (batch.weight > 0).nonzero().flatten().cpu()
        texts, images = (predictions[name].float().cpu()[present] for name in ("text_embedding", "image_embedding"))
        best = (texts[:NUM_PICTURES] @ images.T).topk(min(NUM_FOUND, len(present)), dim=1).indices
        pictures = []
        for i, row in enumerate(best.tolist()):
            panels = [("its own image", batch.images[present[i]].cpu())]
            panels += [(f"found {k + 1}", batch.images[present[j]].cpu()) for k, j in enumerate(row)]
            pictures.append(Picture(self.tokenizer.decode(batch.text[present[i]]), tuple(panels)))
        return pictures

    def answer(self, batch: Batch, question: FlipQuestion) -> list[Answer]:
        """How well each text asked for fits each image: cosine, and probability among the texts."""
        assert batch.images is not None
        if not question.texts and not question.embedding:
            fix = "ask what is in the images: --ask 'texts=[a cat, a dog]', or --ask embedding=true"
            raise ConfigError("nothing to compare the images with", where="--ask", fix=fix)
        images = self.embed_images(batch.images)
        answers = [Answer({"embedding": row} if question.embedding else {}) for row in images.tolist()]
        if not question.texts:
            return answers
        cosine = images @ self.embed_texts(self.tokenizer(list(question.texts)).to(images.device)).T
        shares = (self.logit_scale.float().exp() * cosine).softmax(1)
        for i, answer in enumerate(answers):
            order = cosine[i].argsort(descending=True).tolist()
            answer.facts["texts"] = [
                {"text": question.texts[j], "cosine": cosine[i, j].item(), "probability": shares[i, j].item()}
                for j in order
            ]
            caption = f"{question.texts[order[0]]} ({shares[i, order[0]]:.0%})"
            answers[i] = answer._replace(pictures=(Picture(caption, ((caption, batch.images[i].cpu()),)),))
        return answers
