"""The contract between a training objective and everything that runs it.

A *stage* is one training job's model with its loss. The loop, the engine, checkpoints, evaluation and the report know
this file and never a concrete stage. A new objective is one file in this folder, one line in `STAGES`
(`pipeline/stages/__init__.py`) and one YAML.

Legend: B samples of a micro batch.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Generic, Literal, NamedTuple, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from typing_extensions import TypeVar

from pipeline.config import Config
from pipeline.data.batch import Batch, Transform
from pipeline.data.images.transforms import ImageExample
from pipeline.errors import ConfigError
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
    ", or leave it out of options.evaluate and measure such sets afterwards, by neighbours in a training set",
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


QUESTION = "question"
"""Where an error about a question lies; a front end says in its place how a question is put there."""


class Question(Config):
    """What may be asked beside the images; stages that can be asked something have a class of their own."""


class Answer(NamedTuple):
    """What a stage says of one image, to people and programs."""

    facts: dict[str, Any]  # JSON-able
    pictures: tuple[Picture, ...] = ()


OptionsT = TypeVar("OptionsT", bound=Config, default=Config, covariant=True)


class _FrozenOnceBuilt(abc.ABCMeta):
    """Freezes what a stage declares as `frozen` when its constructor, whichever subclass's, has made all parameters."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        stage = super().__call__(*args, **kwargs)
        stage._freeze()
        return stage


class Stage(nn.Module, Generic[OptionsT], metaclass=_FrozenOnceBuilt):
    """One training objective over the common trunk.

    Subclasses name their options class twice, as `options_class` and as the type of `options`
    (`class MaeStage(Stage[MaeOptions])`), build themselves from (options, data), and implement the abstract methods.
    Parameters of the vision trunk live under `trunk.`, so that any stage can start from any other's weights. Parameters
    are made with the global torch generator, which the caller seeds.

    Attributes:
        options: the validated options that this stage was built from.
        data: what it was told of its training data.
    """

    options_class: ClassVar[type[Config]]
    question_class: ClassVar[type[Config]] = Question
    resizes_patches: ClassVar[bool] = False  # whether weights for patches of another size may start it
    class_rows: ClassVar[tuple[str, int] | None] = None  # of a stage that learns classes: a parameter with a row for
    # each of them, and how many rows it has beside (the background)
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}  # parameter name -> range held on the fp32 masters
    options: OptionsT
    trunk: ViT

    def __init__(self, options: OptionsT, data: DataFacts) -> None:
        super().__init__()
        self.options = options
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
            question: an instance of `question_class`.

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

    @property
    def frozen(self) -> tuple[str, ...]:
        """Prefixes of the names of parameters that aren't trained, such as "trunk."; they stay in checkpoints.

        The one declaration from which follow `trainable`, `requires_grad`, and that frozen parts always work as in
        evaluation, without drop path or dropout.
        """
        return ()

    @property
    def schedule_changes(self) -> tuple[int, ...]:
        """Numbers of samples seen from which on a step costs something else, as when a mask ratio changes."""
        return ()

    @property
    def text_options(self) -> Config | None:
        """Options of the text tower, whose parameters live under `text.`; None where there is none."""
        return None

    @final
    def trainable(self, name: str) -> bool:
        """Whether parameter `name` is trained: it isn't `frozen`."""
        return not name.startswith(self.frozen) if self.frozen else True

    def train(self, mode: bool = True) -> Stage[OptionsT]:
        """Training mode for all parts but frozen ones, which stay in evaluation mode."""
        super().train(mode)
        frozen = self.frozen
        for name, part in self.named_modules() if mode and frozen else ():
            if f"{name}.".startswith(frozen):
                part.training = False
        return self

    def _freeze(self) -> None:
        """Raises ConfigError for a prefix that no parameter's name begins with."""
        names = [name for name, _ in self.named_parameters()]
        for prefix in self.frozen:
            if not any(name.startswith(prefix) for name in names):
                heads = ", ".join(dict.fromkeys(name.split(".")[0] + ("." if "." in name else "") for name in names))
                raise ConfigError(
                    f"no parameter's name begins with {prefix!r}", where="options.freeze", fix=f"names begin {heads}"
                )
        for name, parameter in self.named_parameters():
            if not self.trainable(name):
                parameter.requires_grad_(False)
        self.train(self.training)

    def weight_decay_exempt(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay skips this parameter; by default vectors and biases, as MAE's pretraining does."""
        return parameter.ndim <= 1

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of parameter `name` beside layer-wise decay (probe heads use it)."""
        return 1.0


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
        """Loss of (embeddings, weight) of this rank's share against all ranks' embeddings; collective."""

    def loss(self, batch: Batch) -> Losses:
        return self.contrast((self.embed(batch), batch.weight))


PredictCall = Callable[[Batch], Predictions]
SweepCall = Callable[[str], Iterable[Batch]]


def seeded_init(seed: int) -> None:
    """Seed the generator that parameters are drawn from: equal on every rank and for every ZeRO stage."""
    torch.manual_seed(seed)
