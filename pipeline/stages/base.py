"""The contract between a training objective and everything that runs it.

A *stage* is the model and loss of one training job. The loop, the engine, checkpoints, evaluation and the report know
this file and never a concrete stage. A new objective is one file in this folder, one line in `STAGES`
(`pipeline/stages/__init__.py`) and one YAML.

Legend: B samples of a micro batch.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Literal, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import TypeVar

from pipeline.config import Config
from pipeline.data.batch import Batch, Transform
from pipeline.data.images.transforms import ImageExample
from pipeline.evaluate.base import Evaluation, Predictions
from pipeline.models.trunk.vit import ViT
from pipeline.pictures.picture import Picture
from pipeline.stages.freezing import Freezable
from pipeline.stages.label_use import LEARNT, LabelUse
from pipeline.stages.questions import Answer, Question


class DataFacts(NamedTuple):
    """What a stage may know about its training data before it is built."""

    classes: tuple[str, ...] = ()  # label names, which all training sets share; () where they have none or differ
    num_samples: int = 0
    sets: Mapping[str, tuple[str, ...]] = {}  # label names of each evaluation set, by the set's name


class Losses(NamedTuple):
    """Sums over the batch's samples of weight x loss; the engine divides by the global batch's weight.

    A NamedTuple of tensors, since ZeRO-3's hooks can't see into other classes.
    """

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]  # for the log, summed like `total`, detached


OptionsT = TypeVar("OptionsT", bound=Config, default=Config, covariant=True)


class Stage(Freezable, Generic[OptionsT]):
    """One training objective on the common trunk.

    Subclasses name their options class twice, as the type of `options` and as `options_class`
    (`class MaeStage(Stage[MaeOptions])`), build themselves from (options, data), and implement the abstract methods.
    Parameters of the vision trunk live under `trunk.`, so that any stage can start from any other's weights. Parameters
    are initialised with the global torch generator, which the caller seeds (`seeded_init`).

    Attributes:
        options: the validated options that this stage was built from.
        data: the facts about the training data that it was built with.
    """

    options_class: ClassVar[type[Config]]
    question_class: ClassVar[type[Config]] = Question
    resizes_patches: ClassVar[bool] = False  # whether it can start from weights for another patch size
    class_rows: ClassVar[tuple[str, int] | None] = None  # for a stage that learns classes: the name of a parameter with
    # one row per class, and its number of further rows (the background)
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}  # parameter name -> range its fp32 master is clamped to
    options: OptionsT
    trunk: ViT

    def __init__(self, options: OptionsT, data: DataFacts) -> None:
        super().__init__()
        self.options = options
        self.data = data

    # Training. `frozen` (see `Freezable`) declares the parts that aren't trained.

    @abc.abstractmethod
    def transform(self, train: bool) -> Transform:
        """How a raw sample becomes an example, with augmentation when `train`."""

    @abc.abstractmethod
    def loss(self, batch: Batch) -> Losses:
        """Training loss of one micro batch."""

    @final  # type: ignore[misc]  # torch declares it as a writable attribute
    def forward(self, call: Literal["loss", "predict", "embed", "contrast"], x: Any) -> Any:
        """The only entry for the engine: ZeRO-3 gathers parameters only for calls that pass through here."""
        if call == "loss":
            return self.loss(x)
        if call == "predict":
            return self.predict(x)
        return getattr(self, call)(x)

    @property
    def schedule_changes(self) -> tuple[int, ...]:
        """Numbers of samples seen after which the cost of a step changes, for example with a new mask ratio."""
        return ()

    def weight_decay_exempt(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay skips this parameter; by default vectors and biases, as in MAE's pretraining."""
        return parameter.ndim <= 1

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of parameter `name`, on top of layer-wise decay (probe heads use it)."""
        return 1.0

    @property
    def text_options(self) -> Config | None:
        """Options of the text tower, whose parameters live under `text.`; None without a text tower."""
        return None

    # Evaluation.

    @classmethod
    def label_use(cls, options: Config) -> LabelUse | None:
        """Why all sets of a run need the same classes, with these options; None where any sets can be mixed and
        evaluated, because labels aren't read, or are read by each evaluation set's own classes (`DataFacts.sets`).

        Called before the stage is built, when manifests are read.
        """
        return None if cls.class_rows is None else LEARNT

    @abc.abstractmethod
    def predict(self, batch: Batch) -> Predictions:
        """What evaluations and pictures need, by name, each with leading dimension B.

        Called without gradients, in eval mode, on all ranks the same number of times.
        """

    def evaluations(self) -> Mapping[str, Evaluation]:
        """The evaluations of this stage, by name."""
        return {}

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """Pictures for the report from one evaluation batch; must not run the model."""
        return []

    # Questions about single images.

    def view(self) -> Transform:
        """How an image without label, caption or annotations becomes an example. The image may have any size and is
        upright.
        """
        transform = self.transform(train=False)
        return ImageExample(image=transform.image) if isinstance(transform, ImageExample) else transform

    def answer(self, batch: Batch, question: Any) -> list[Answer]:
        """An answer for each image of a batch made with `view`. Not collective.

        Called without gradients, in eval mode. By default the facts are those predictions that are one number per
        image, and the pictures are those of the report.

        Args:
            question: an instance of `question_class`.

        Raises:
            UserError: the question can't be answered.
        """
        predictions = self.predict(batch)
        numbers = {k: v.tolist() for k, v in predictions.items() if v.ndim == 1 and k != "labels"}
        answers = []
        for i in range(len(batch)):
            image_predictions = {key: value[i : i + 1] for key, value in predictions.items()}
            facts = {key: values[i] for key, values in numbers.items()}
            answers.append(Answer(facts, tuple(self.pictures(batch.at(slice(i, i + 1)), image_predictions))))
        return answers


class ContrastiveStage(Stage[OptionsT]):
    """A stage whose loss couples samples: loss(batch) = contrast(embed(batch)).

    The engine embeds every micro batch without gradients, calls `contrast` once for the gradient of the embeddings,
    and embeds again with gradients (GradCache, Gao et al. 2021), so accumulation is exact. `embed` must be a function
    of (weights, batch).
    """

    @abc.abstractmethod
    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Embeddings of a micro batch, each with leading dimension B."""

    @abc.abstractmethod
    def contrast(self, embedded: tuple[tuple[Tensor, ...], Float[Tensor, " b"]]) -> Losses:
        """Loss of (embeddings, weight) of this rank's samples against all ranks' embeddings; collective."""

    def loss(self, batch: Batch) -> Losses:
        return self.contrast((self.embed(batch), batch.weight))


def seeded_init(seed: int) -> None:
    """Seed the generator that parameters are initialised with: the same on every rank and for every ZeRO stage."""
    torch.manual_seed(seed)
