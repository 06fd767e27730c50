"""Small stages over the real trunk, for tests of the engine and the loop."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Config
from pipeline.data.batch import Batch, Transform
from pipeline.evaluate.base import Predictions
from pipeline.losses.contrastive import clip_loss
from pipeline.models.trunk.config import ModelConfig
from pipeline.models.trunk.vit import ViT
from pipeline.stages.base import ContrastiveStage, DataFacts, Losses, Stage

MODEL = ModelConfig(width=16, depth=2, heads=2, image_size=16, patch_size=8)


class TinyOptions(Config):
    """Switches of the test stages."""

    freeze: str = ""  # prefix of frozen parameters
    batch_norm: bool = False
    dropout: float = 0.0
    poison: int = -1  # sample id whose loss is NaN
    memory: bool = False  # persistent buffers that no forward uses


class TinyStage(Stage[TinyOptions]):
    """Classification with a head that may have BatchNorm and dropout."""

    options_class: ClassVar[type[Config]] = TinyOptions

    def __init__(self, options: TinyOptions, data: DataFacts) -> None:
        super().__init__(options, data)
        self.trunk = ViT(MODEL)
        self.norm = nn.BatchNorm1d(16, affine=False) if options.batch_norm else nn.Identity()
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(16, 5)
        if options.memory:
            self.register_buffer("memory", torch.zeros(7))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def logits(self, batch: Batch) -> Tensor:
        assert batch.images is not None
        pooled = self.trunk(batch.images.to(torch.float32) / 128 - 1).patches.mean(1)
        out: Tensor = self.head(self.dropout(self.norm(pooled.float())).to(self.head.weight.dtype))
        return out.float()

    def loss(self, batch: Batch) -> Losses:
        losses = F.cross_entropy(self.logits(batch), batch.labels, reduction="none")
        losses = losses * torch.where(batch.ids == self.options.poison, float("nan"), 1.0)
        total = (losses * batch.weight).sum()
        return Losses(total, {"cross_entropy": total.detach()})

    def predict(self, batch: Batch) -> Predictions:
        return {"logits": self.logits(batch)}

    def transform(self, train: bool) -> Transform:
        raise NotImplementedError

    @property
    def frozen(self) -> tuple[str, ...]:
        return (self.options.freeze,) if self.options.freeze else ()


class TinyPair(ContrastiveStage[TinyOptions]):
    """Images against their labels' embeddings, with a limited logit scale."""

    options_class: ClassVar[type[Config]] = TinyOptions
    limits: ClassVar[dict[str, tuple[float, float]]] = {"logit_scale": (0.0, 2.0)}

    def __init__(self, options: TinyOptions, data: DataFacts) -> None:
        super().__init__(options, data)
        self.trunk = ViT(MODEL)
        self.names = nn.Embedding(64, 16)
        self.logit_scale = nn.Parameter(torch.full((1,), 1.999))

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        assert batch.images is not None
        assert batch.labels is not None
        pooled = self.trunk(batch.images.to(torch.float32) / 128 - 1).patches.mean(1)
        return F.normalize(pooled, dim=-1), F.normalize(self.names(batch.labels), dim=-1)

    def contrast(self, embedded: tuple[tuple[Tensor, ...], Tensor]) -> Losses:
        (images, names), weight = embedded
        scale = self.logit_scale.float().clamp(*TinyPair.limits["logit_scale"]).exp()
        total = (clip_loss(images, names, weight, scale) * weight).sum()
        return Losses(total, {"contrastive": total.detach()})

    def predict(self, batch: Batch) -> Predictions:
        return {"images": self.embed(batch)[0]}

    def transform(self, train: bool) -> Transform:
        raise NotImplementedError


def make_batch(ids: list[int], position: int = 0, weight: float = 1.0) -> Batch:
    """Images and labels that are functions of the ids."""
    images = torch.stack(
        [torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(i), dtype=torch.uint8) for i in ids]
    )
    weights = torch.tensor([0.0 if i % 7 == 6 else weight for i in ids])
    labels = torch.tensor([i % 5 for i in ids])
    return Batch(torch.tensor(ids), torch.tensor(ids), weights, position, images=images, labels=labels)
