"""The contract between a training objective and everything that runs it.

A *stage* is one training job's model with its loss. The loop, the engine, checkpoints, evaluation and the report know
this file and never a concrete stage. A new objective is one file in this folder, one line in `STAGES`
(`pipeline/stages/__init__.py`) and one YAML.

Legend: B samples of a micro batch.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.data.batch import Batch, Transform
from pipeline.data.images.transforms import ImageExample
from pipeline.evaluate.base import Evaluation, Predictions
from pipeline.models.trunk.vit import ViT


class DataFacts(NamedTuple):
    """What a stage may know of its training data before it is built."""

    classes: tuple[str, ...] = ()  # label names, which all training sets share; () where they have none or differ
    num_samples: int = 0
    sets: Mapping[str, tuple[str, ...]] = {}  # each evaluation set's own label names, by the set's name


class LabelUse(NamedTuple):
    """What takes labels for numbers of the training data's classes: then all sets must name the same ones."""

    why: str  # what the stage does with them, for messages: "learns classes"
    instead: str = ""  # the way out other than to prepare the sets with one list of classes


LEARNT = LabelUse("learns classes")
NEIGHBOURS = LabelUse(
    "compares labels with those of the training data (options.evaluate)",
    ", or leave it out of options.evaluate and measure such sets afterwards: `vitrail eval RUN SET --knn --train SET`",
)


class Losses(NamedTuple):
    """Sums over the batch's samples of weight x loss; the engine divides by the global batch's weight.

    A NamedTuple of tensors, since ZeRO-3's hooks can't see into other classes.
    """

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]  # for the log, summed like `total`, detached


class Picture(NamedTuple):
    """Panels to be shown side by side in the report; drawn by the report, so stages need no plotting library."""

    title: str
    panels: tuple[tuple[str, UInt8[Tensor, "3 h w"]], ...]  # (caption, image)


class Question(Config):
    """What `vitrail predict` may be told beside the images; stages that take more have a class of their own."""


class Answer(NamedTuple):
    """What a stage says of one image, for `vitrail predict`."""

    facts: dict[str, Any]  # JSON-able
    pictures: tuple[Picture, ...] = ()


class Stage(nn.Module, abc.ABC):
    """One training objective over the common trunk.

    Subclasses set `options` to their own options class, build themselves from (options, data), and implement the
    abstract methods. Parameters of the vision trunk live under `trunk.`, so that any stage can start from any other's
    weights. Parameters are made with the global torch generator, which the caller seeds.
    """

    options: ClassVar[type[Config]]
    question: ClassVar[type[Config]] = Question
    resizes_patches: ClassVar[bool] = False  # whether weights for patches of another size may start it
    class_rows: ClassVar[tuple[str, int] | None] = None  # of a stage that learns classes: a parameter with a row for
    # each of them, and how many rows it has beside (the background)
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}  # parameter name -> range held on the fp32 masters
    trunk: ViT

    def __init__(self, options: Config, data: DataFacts) -> None:
        super().__init__()
        self.data = data

    @classmethod
    def label_use(cls, options: Config) -> LabelUse | None:
        """What, with these options, needs one list of classes for all sets of a run; None: any sets may be mixed and
        measured, since labels aren't read, or by each evaluation set's own classes (`DataFacts.sets`).

        Asked before the stage is built, when manifests are read.
        """
        return None if cls.class_rows is None else LEARNT

    @final  # type: ignore[misc]  # torch declares it as a writable attribute
    def forward(self, call: Literal["loss", "predict", "embed", "contrast"], x: Any) -> Any:
        """The one root forward: ZeRO-3 gathers parameters only for calls that pass through here."""
        if call == "loss":
            return self.loss(x)
        if call == "predict":
            return self.predict(x)
        return getattr(self, call)(x)

    @abc.abstractmethod
    def loss(self, batch: Batch) -> Losses:
        """Training loss of one micro batch."""

    @abc.abstractmethod
    def predict(self, batch: Batch) -> Predictions:
        """What evaluations and pictures need, by name, each with leading dimension B. Called without gradients, in
        eval mode, on every rank alike.
        """

    @abc.abstractmethod
    def transform(self, train: bool) -> Transform:
        """How a raw sample becomes an example, with augmentation when `train`."""

    def evaluations(self) -> Mapping[str, Evaluation]:
        """Evaluations this stage can be measured with, by name."""
        return {}

    def pictures(self, batch: Batch, predictions: Predictions) -> list[Picture]:
        """Pictures for the report from one evaluation batch; no forward happens here."""
        return []

    def view(self) -> Transform:
        """How an image alone, without label, caption or annotations, becomes an example. Its file may be of any size,
        and lies upright.
        """
        transform = self.transform(train=False)
        return ImageExample(image=transform.image) if isinstance(transform, ImageExample) else transform

    def answer(self, batch: Batch, question: Any) -> list[Answer]:
        """What there is to say and to show of each image that came through `view`; not collective.

        Called without gradients, in eval mode. By default the facts are the predictions that are one number for each
        image, and the pictures those of the report.

        Args:
            question: an instance of the class's `question`.

        Raises:
            UserError: the question can't be answered.
        """
        predictions = self.predict(batch)
        numbers = {k: v.tolist() for k, v in predictions.items() if v.ndim == 1 and k != "labels"}
        answers = []
        for i in range(len(batch)):
            own = {key: value[i : i + 1] for key, value in predictions.items()}
            facts = {key: values[i] for key, values in numbers.items()}
            answers.append(Answer(facts, tuple(self.pictures(batch.only(i), own))))
        return answers

    def trainable(self, name: str) -> bool:
        """Whether parameter `name` is trained. A frozen one stays in checkpoints."""
        return True

    def weight_decay_exempt(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay skips this parameter; by default vectors and biases, as MAE's pretraining does."""
        return parameter.ndim <= 1

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of parameter `name` beside layer-wise decay (probe heads use it)."""
        return 1.0


class ContrastiveStage(Stage):
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
        """Loss of (embeddings, weight) of this rank's share against all ranks' embeddings; collective."""

    def loss(self, batch: Batch) -> Losses:
        return self.contrast((self.embed(batch), batch.weight))


PredictCall = Callable[[Batch], Predictions]
SweepCall = Callable[[str], Iterable[Batch]]


def seeded_init(seed: int) -> None:
    """Seed the generator that parameters are drawn from: equal on every rank and for every ZeRO stage."""
    torch.manual_seed(seed)
