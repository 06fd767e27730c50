"""What stages share whose features are measured while they learn: by weighted nearest neighbours, or a linear probe.

Legend: B samples, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from pipeline.config import Config
from pipeline.data.batch import Batch, Transform
from pipeline.evaluate.base import Evaluation
from pipeline.evaluate.knn import KnnEvaluation
from pipeline.evaluate.logistic import LogisticEvaluation
from pipeline.models.trunk.pooling import Pooling, pool
from pipeline.stages.base import NEIGHBOURS, LabelUse, Stage
from pipeline.stages.images import ImageOptions, image_transform, measured_transform, with_labels

FEATURE_MEASURES = ("knn", "linear_probe")


class FeatureOptions(ImageOptions):
    """Options of pretraining stages whose trunk may be measured by nearest neighbours."""

    evaluate: tuple[Any, ...] = ()  # names of what is measured; a stage lists its own
    knn_pooling: Pooling = "avg"

    @model_validator(mode="after")
    def _pooled_token_exists(self) -> FeatureOptions:
        if not self.model.cls_token and self.knn_pooling == "cls":
            raise ValueError("knn_pooling cls needs model.cls_token")
        return self


FeatureOptionsT = TypeVar("FeatureOptionsT", bound=FeatureOptions, covariant=True)


def feature_evaluations(wanted: tuple[Any, ...], classes: tuple[str, ...]) -> dict[str, Evaluation]:
    """The evaluations among `wanted` that see `features` and labels alone, by name."""
    offered: dict[str, Evaluation] = {"knn": KnnEvaluation(), "linear_probe": LogisticEvaluation(classes)}
    return {name: offered[name] for name in FEATURE_MEASURES if name in wanted}


def feature_label_use(wanted: tuple[Any, ...]) -> LabelUse | None:
    """What labels are used for where these measures are asked for: neighbours and probes compare them."""
    return NEIGHBOURS if set(FEATURE_MEASURES).intersection(wanted) else None


class FeatureStage(Stage[FeatureOptionsT]):
    """A pretraining stage that reads no labels, but for weighted nearest neighbours on its trunk's features."""

    @classmethod
    def label_use(cls, options: Config) -> LabelUse | None:
        """Neighbours' labels, where they are asked for."""
        assert isinstance(options, FeatureOptions)
        return feature_label_use(options.evaluate)

    def own_evaluations(self) -> Mapping[str, Evaluation]:
        """What this stage measures beside its features, by name."""
        return {}

    def evaluations(self) -> Mapping[str, Evaluation]:
        """The stage's own, and weighted kNN on the features: those that `evaluate` names, in its order."""
        offered = {**self.own_evaluations(), **feature_evaluations(self.options.evaluate, self.data.classes)}
        return {name: offered[name] for name in self.options.evaluate}

    def transform(self, train: bool) -> Transform:
        """Random crop and mirroring in training, the centre otherwise; labels only where kNN wants them."""
        if not train and self.data.classes and self.label_use(self.options) is not None:
            return measured_transform(self.options, num_classes=len(self.data.classes))
        return image_transform(self.options, self.data, train=train, labels=False)

    def with_features(
        self, predictions: Mapping[str, Tensor], pixels: Float[Tensor, "b 3 h w"], batch: Batch
    ) -> dict[str, Tensor]:
        """The predictions and, where they are measured, `features` [B,D] of the whole images, with the labels."""
        if self.label_use(self.options) is None:
            return dict(predictions)
        features = pool(self.trunk(pixels), self.options.knn_pooling).float()
        return with_labels({**predictions, "features": features}, batch)
