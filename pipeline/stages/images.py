"""Options that all stages share, and transforms from samples to images with labels or captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config import Config
from pipeline.data.batch import Batch, Example, RawSample, Transform
from pipeline.data.images.decode import UnreadableSample
from pipeline.data.images.transforms import EvalImage, ImageExample, ImageTransform, Tokenize, TrainImage
from pipeline.errors import ConfigError, DataError
from pipeline.models.pixels import PixelStatistics
from pipeline.models.trunk.config import ModelConfig
from pipeline.stages.base import DataFacts


class ImageOptions(Config):
    """The trunk, and how images are prepared for it."""

    model: ModelConfig
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area a training crop covers
    flip: bool = True  # mirror half of the training images
    pixels: PixelStatistics = Field(default="imagenet")  # mean and standard deviation pixels are normalised with

    @model_validator(mode="after")
    def _crop(self) -> ImageOptions:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be 0 < low <= high <= 1, not {low}, {high}")
        return self


@dataclasses.dataclass(frozen=True)
class LabelledExample(ImageExample):
    """An example whose label must be one of `num_classes`.

    Raises (when called):
        DataError: the label is beyond them, so the set was prepared with other classes.
    """

    label: bool = True
    num_classes: int = 0

    def several(self, sample: RawSample, seeds: Sequence[int]) -> list[Example]:
        examples = super().several(sample, seeds)
        for example in examples:
            if example.label is not None and example.label >= self.num_classes:
                raise DataError(
                    f"label {example.label}, but the data name {self.num_classes} classes",
                    where=f"sample {sample.key}",
                    fix="prepare all sets of a run with the same list of classes",
                )
        return examples


@dataclasses.dataclass(frozen=True)
class CaptionedExample(ImageExample):
    """An example with a caption that isn't empty.

    Raises (when called):
        UnreadableSample: its caption is empty.
    """

    def several(self, sample: RawSample, seeds: Sequence[int]) -> list[Example]:
        text = sample.member("txt")
        if text is not None and not text.strip():
            raise UnreadableSample("its caption is empty")
        return super().several(sample, seeds)


@dataclasses.dataclass(frozen=True)
class MeasuredExample:
    """An example whose caption and label may be missing; they become the tokens of an empty caption and -1.

    Args:
        image, text: as `ImageExample`'s.
        num_classes: 0: labels aren't read.
    """

    image: ImageTransform
    text: Tokenize | None
    num_classes: int

    def __call__(self, sample: RawSample, seed: int) -> Example:
        members = {"txt": b"", **sample.members}
        read: ImageExample = ImageExample(self.image, text=self.text)
        if self.num_classes and "cls" in members:
            read = LabelledExample(self.image, text=self.text, num_classes=self.num_classes)
        example = read(sample._replace(members=members), seed)
        return example._replace(label=-1) if self.num_classes and example.label is None else example

    def blank(self) -> Example:
        """A black image, an empty caption, and label 0 where there are classes."""
        return ImageExample(self.image, label=self.num_classes > 0, text=self.text).blank()


def image_transform(
    options: ImageOptions,
    data: DataFacts,
    *,
    train: bool,
    labels: bool,
    policy: str = "",
    erase: float = 0.0,
) -> Transform:
    """From samples to uint8 images of the trunk's size, with `labels` also to their labels.

    `policy` and `erase` are `TrainImage`'s.
    """
    size = options.model.image_hw
    image: TrainImage | EvalImage = EvalImage(size=size)
    if train:
        image = TrainImage(size=size, scale=options.crop_scale, flip=options.flip, policy=policy, erase=erase)
    if labels:
        return LabelledExample(image=image, num_classes=len(data.classes))
    return ImageExample(image=image)


def captioned_transform(options: ImageOptions, *, train: bool, num_classes: int, tokenizer: Tokenize) -> Transform:
    """From samples to uint8 images and the tokens of their captions, with labels where there are classes.

    In training, a pair whose caption is missing or empty is skipped: it would teach that the image matches an empty
    text. In evaluation it is used, with the tokens of an empty caption, and a sample without a label gets label -1,
    since a set may have captions, labels or both.
    """
    size = options.model.image_hw
    if train:
        image = TrainImage(size=size, scale=options.crop_scale, flip=options.flip)
        return CaptionedExample(image=image, text=tokenizer)
    return measured_transform(options, num_classes=num_classes, tokenizer=tokenizer)


def measured_transform(options: ImageOptions, *, num_classes: int, tokenizer: Tokenize | None = None) -> Transform:
    """From samples of an evaluation set to uint8 images, with captions if there is a `tokenizer` and labels if
    `num_classes` > 0. A missing label becomes -1, so that sets without labels can be evaluated by what needs none.
    """
    return MeasuredExample(image=EvalImage(size=options.model.image_hw), text=tokenizer, num_classes=num_classes)


def with_labels(predictions: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """The predictions with the batch's labels, if it has any, since evaluations only see predictions."""
    return dict(predictions) | ({} if batch.labels is None else {"labels": batch.labels})


def require_classes(data: DataFacts, stage: str) -> None:
    """Raise ConfigError when the data have no labels."""
    if not data.classes:
        raise ConfigError(
            f"stage {stage!r} needs labels, and the training data's manifest names no classes",
            where="data.train",
            fix="prepare the data with a label column, or choose another stage",
        )
