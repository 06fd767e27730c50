"""Evaluation of a stage's features during pretraining: by weighted nearest neighbours, or a linear probe.

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
from pipeline.stages.base import Stage
from pipeline.stages.images import ImageOptions, image_transform, measured_transform, with_labels
from pipeline.stages.label_use import NEIGHBOURS, LabelUse

FEATURE_MEASURES = ("knn", "linear_probe")


class FeatureOptions(ImageOptions):
    """Options of pretraining stages whose features can be evaluated by nearest neighbours."""

    evaluate: tuple[Any, ...] = ()  # names of evaluations; each stage narrows the type to those it has
    knn_pooling: Pooling = "avg"

    @model_validator(mode="after")
    def _pooled_token_exists(self) -> FeatureOptions:
        if not self.model.cls_token and self.knn_pooling == "cls":
            raise ValueError("knn_pooling cls needs model.cls_token")
        return self


FeatureOptionsT = TypeVar("FeatureOptionsT", bound=FeatureOptions, covariant=True)


def feature_evaluations(names: tuple[Any, ...], classes: tuple[str, ...]) -> dict[str, Evaluation]:
    """The evaluations among `names` that need only `features` and labels, by name."""
    offered: dict[str, Evaluation] = {"knn": KnnEvaluation(), "linear_probe": LogisticEvaluation(classes)}
    return {name: offered[name] for name in FEATURE_MEASURES if name in names}


def feature_label_use(names: tuple[Any, ...]) -> LabelUse | None:
    """How these evaluations use labels: neighbours and probes compare them with the training set's."""
    return NEIGHBOURS if set(FEATURE_MEASURES).intersection(names) else None


class FeatureStage(Stage[FeatureOptionsT]):
    """A pretraining stage that reads no labels, except to evaluate its trunk's features by nearest neighbours."""

    @classmethod
    def label_use(cls, options: Config) -> LabelUse | None:
        """Labels are used only where `evaluate` has an evaluation of features."""
        assert isinstance(options, FeatureOptions)
        return feature_label_use(options.evaluate)

    def objective_evaluations(self) -> Mapping[str, Evaluation]:
        """Evaluations of the pretraining objective itself, by name."""
        return {}

    def evaluations(self) -> Mapping[str, Evaluation]:
        """Evaluations of the objective and of the features: those that `evaluate` names, in its order."""
        offered = {**self.objective_evaluations(), **feature_evaluations(self.options.evaluate, self.data.classes)}
        return {name: offered[name] for name in self.options.evaluate}

    def transform(self, train: bool) -> Transform:
        """Random crop and mirroring in training, the centre otherwise; labels only where kNN needs them."""
        if not train and self.data.classes and self.label_use(self.options) is not None:
            return measured_transform(self.options, num_classes=len(self.data.classes))
        return image_transform(self.options, self.data, train=train, labels=False)

    def with_features(
        self, predictions: Mapping[str, Tensor], pixels: Float[Tensor, "b 3 h w"], batch: Batch
    ) -> dict[str, Tensor]:
        """The predictions and, where features are evaluated, `features` [B,D] of the whole images and the labels."""
        if self.label_use(self.options) is None:
            return dict(predictions)
        features = pool(self.trunk(pixels), self.options.knn_pooling).float()
        return with_labels({**predictions, "features": features}, batch)
