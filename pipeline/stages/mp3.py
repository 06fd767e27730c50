"""Position prediction (MP3, Zhai et al. 2022, arXiv 2207.07611): which place of the image each patch comes from.

Patches enter without positions. All of them are queries, but in every layer only a random subset, the context, serves
as keys and values. So each patch outside the context is placed by its content and the context alone.

Legend: B samples, N patches and as many places, C patches of the context, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Config
from pipeline.data.batch import Batch
from pipeline.evaluate.base import Evaluation, Predictions
from pipeline.evaluate.mean import MeanEvaluation
from pipeline.models.pixels import normalize
from pipeline.models.trunk.block import initialize
from pipeline.models.trunk.masking import Masking, mask_picture, random_masking
from pipeline.models.trunk.vit import ViT
from pipeline.pictures.patches import position_pictures
from pipeline.pictures.picture import Picture
from pipeline.stages.base import DataFacts, Losses
from pipeline.stages.features import FeatureOptions, FeatureStage


class Mp3Options(FeatureOptions):
    """Options of stage `mp3`. It uses no positions: `model.position` is for stages that start from its weights."""

    context_ratio: float = Field(default=0.25, gt=0, le=1)  # share of the patches that serve as keys and values
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    evaluate: tuple[Literal["position_top1", "position_loss", "knn"], ...] = ("position_top1", "position_loss")

    @model_validator(mode="after")
    def _possible(self) -> Mp3Options:
        if self.num_context < 1:
            raise ValueError(
                f"context_ratio {self.context_ratio} leaves no context of {self.model.num_patches} patches"
            )
        if self.model.num_patches < 2:
            raise ValueError("with a single patch there is nothing to predict; use a smaller patch_size")
        if self.model.patch_embed == "conv_stem" or self.model.spatial:
            raise ValueError("a conv_stem, windows, conv_blocks and relative_positions reveal the positions")
        return self

    @property
    def num_context(self) -> int:
        """Number of patches in the context."""
        return int(self.model.num_patches * self.context_ratio)


class Guesses(NamedTuple):
    """The predicted place of every patch."""

    place: Int[Tensor, "b n"]  # the most likely place
    confidence: Float[Tensor, "b n"]  # its probability
    loss: Float[Tensor, "b n"]  # cross-entropy


class Mp3Stage(FeatureStage[Mp3Options]):
    """The trunk without positions, and a linear classifier of each patch over all places."""

    options_class: ClassVar[type[Config]] = Mp3Options

    def __init__(self, options: Mp3Options, data: DataFacts) -> None:
        super().__init__(options, data)
        self.trunk = ViT(options.model.model_copy(update={"position": "none", "position_trained": False}))
        self.head = nn.Linear(self.trunk.width, options.model.num_patches)
        initialize(self.head)

    def loss(self, batch: Batch) -> Losses:
        """Cross-entropy over the N places, averaged over all patches of a sample."""
        assert batch.images is not None
        scores = self.scores(normalize(batch.images, self.options.pixels), self.context(batch).keep, batch.seeds)
        guesses = self._guesses(scores, self.options.label_smoothing)
        total = (batch.weight * guesses.loss.mean(1)).sum()
        right = (batch.weight * self._right(guesses).float().mean(1)).sum()
        return Losses(total, {"cross_entropy": total.detach(), "position_top1": right.detach()})

    def predict(self, batch: Batch) -> Predictions:
        """`position_loss` and `position_top1` [B], the share of patches whose place is predicted right, with contexts
        as in training; `place` and `confidence` [B,N]; `outside` [B,N], True for patches outside the context; for kNN
        `features` [B,D] with every patch in the context, and `labels`.
        """
        assert batch.images is not None
        pixels = normalize(batch.images, self.options.pixels)
        context = self.context(batch)
        guesses = self._guesses(self.scores(pixels, context.keep))
        predictions = {
            "position_loss": guesses.loss.mean(1),
            "position_top1": self._right(guesses).float().mean(1),
            "place": guesses.place,
            "confidence": guesses.confidence,
            "outside": mask_picture(context),
        }
        return self.with_features(predictions, pixels, batch)

    def context(self, batch: Batch) -> Masking:
        """The batch's contexts (`keep`), drawn from its seeds."""
        return random_masking(batch.seeds, self.options.model.num_patches, self.options.num_context)

    def scores(
        self, pixels: Float[Tensor, "b 3 h w"], context: Int[Tensor, "b c"], seeds: Tensor | None = None
    ) -> Float[Tensor, "b n n"]:
        """Every patch's logits over the places, in fp32."""
        scores: Tensor = self.head(self.trunk(pixels, context=context, seeds=seeds).patches)
        return scores.float() if scores.dtype.itemsize < 4 else scores

    def objective_evaluations(self) -> Mapping[str, Evaluation]:
        """The share of patches whose place is predicted right, and the loss."""
        return {
            "position_top1": MeanEvaluation("position_top1"),
            "position_loss": MeanEvaluation("position_loss"),
        }

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """Original, context, and every patch at its predicted place."""
        return position_pictures(batch, predictions, self.options.model.patch_size)

    def _guesses(self, scores: Float[Tensor, "b n n"], label_smoothing: float = 0.0) -> Guesses:
        b, n, _ = scores.shape
        truth = torch.arange(n, device=scores.device).repeat(b)
        loss = F.cross_entropy(scores.flatten(0, 1), truth, reduction="none", label_smoothing=label_smoothing)
        confidence, place = scores.softmax(-1).max(-1)
        return Guesses(place, confidence, loss.view(b, n))

    def _right(self, guesses: Guesses) -> Tensor:
        return guesses.place == torch.arange(guesses.place.shape[1], device=guesses.place.device)
