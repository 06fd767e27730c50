"""What every stage that looks at images shares: its options, and how samples become pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import Config
from pipeline.data.batch import Batch, Example, RawSample, Transform
from pipeline.data.images.decode import UnreadableSample
from pipeline.data.images.transforms import EvalImage, ImageExample, ImageTransform, Tokenize, TrainImage
from pipeline.errors import ConfigError, DataError
from pipeline.models.pixels import PixelStatistics, normalize
from pipeline.models.trunk.attention_maps import attention_map, attention_weights, global_blocks, rollout
from pipeline.models.trunk.config import ModelConfig
from pipeline.models.trunk.vit import ViT
from pipeline.stages.base import Answer, DataFacts, Picture

NUM_LABELLED_PICTURES = 16
NUM_CLASSES_TOLD = 5


class ImageOptions(Config):
    """The trunk, and how images reach it."""

    model: ModelConfig
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area a training crop covers
    flip: bool = True  # mirror half of the training images
    pixels: PixelStatistics = Field(default="imagenet")  # mean and standard deviation pixels are normalised with

    @model_validator(mode="after")
    def _crop(self) -> ImageOptions:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be 0 < low <= high <= 1, found {low}, {high}")
        return self


@dataclasses.dataclass(frozen=True)
class LabelledExample(ImageExample):
    """An example whose label must be one of `num_classes`.

    Raises (when called):
        DataError: it isn't: the set was made with other classes.
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
    """An example with a caption that says something.

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
    """An example whose caption and label may be missing: the tokens of an empty caption and -1 stand for them.

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
    """Samples to uint8 images of the trunk's size, with their label where asked for.

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
    """Samples to uint8 images and the tokens of their captions, with labels where there are classes.

    In training a pair without a caption, or with an empty one, is absent: it would teach that nothing looks like this
    image. In evaluation it stays, with the tokens of an empty caption, and one without a label gets label -1: a set
    may have either.
    """
    size = options.model.image_hw
    if train:
        image = TrainImage(size=size, scale=options.crop_scale, flip=options.flip)
        return CaptionedExample(image=image, text=tokenizer)
    return measured_transform(options, num_classes=num_classes, tokenizer=tokenizer)


def measured_transform(options: ImageOptions, *, num_classes: int, tokenizer: Tokenize | None = None) -> Transform:
    """Samples of an evaluation set to uint8 images, with their labels, -1 where one has none: a set without labels is
    still measured by what needs none. Captions by `tokenizer`, labels if `num_classes` > 0.
    """
    return MeasuredExample(image=EvalImage(size=options.model.image_hw), text=tokenizer, num_classes=num_classes)


def with_labels(predictions: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """The predictions with the batch's labels, where it has any: evaluations see predictions only."""
    return dict(predictions) | ({} if batch.labels is None else {"labels": batch.labels})


def require_classes(data: DataFacts, stage: str) -> None:
    """Raise ConfigError when the data have no labels."""
    if not data.classes:
        raise ConfigError(
            f"stage {stage!r} needs labels, and the training data's manifest names no classes",
            where="data.train",
            fix="prepare the data with a label column, or choose another stage",
        )


def labelled_pictures(batch: Batch, predicted: Tensor, classes: Sequence[str]) -> list[Picture]:
    """The first images of a batch with their class, where known, and the predicted one."""
    assert batch.images is not None
    pictures = []
    for i in (batch.weight > 0).nonzero().flatten()[:NUM_LABELLED_PICTURES].tolist():
        guess = classes[int(predicted[i])]
        caption = f"taken for {guess}"
        if batch.labels is not None:
            truth = classes[int(batch.labels[i])]
            caption = f"{truth}: right" if truth == guess else f"{truth}, taken for {guess}"
        pictures.append(Picture(f"sample {int(batch.ids[i])}", ((caption, batch.images[i].cpu()),)))
    return pictures


def class_answers(batch: Batch, scores: Float[Tensor, "b c"], classes: Sequence[str]) -> list[Answer]:
    """Each image's likeliest classes with their probabilities, and the image with the first of them."""
    assert batch.images is not None
    best = scores.float().softmax(1).topk(min(NUM_CLASSES_TOLD, scores.shape[1]))
    answers = []
    for i, (shares, numbers) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        told = [{"class": classes[number], "probability": share} for share, number in zip(shares, numbers, strict=True)]
        caption = f"{classes[numbers[0]]} ({shares[0]:.0%})"
        answers.append(Answer({"classes": told}, (Picture(caption, ((caption, batch.images[i].cpu()),)),)))
    return answers


def attention_pictures(
    trunk: ViT, images: UInt8[Tensor, "b 3 h w"], statistics: PixelStatistics, block: int = -1
) -> list[Picture]:
    """Where one block of a trunk looks in each image: all heads' mean, through all blocks (rollout), and each head.

    Raises:
        ValueError: see `attention_weights`.
    """
    pixels = normalize(images, statistics)
    p = trunk.config.patch_size
    grid = (images.shape[2] // p, images.shape[3] // p)
    everywhere = list(range(len(trunk.blocks)))
    whole = global_blocks(trunk) == everywhere
    *before, asked = attention_weights(trunk, pixels, [*(everywhere if whole else []), block])
    found = attention_map(trunk, asked, grid)
    asking = "cls" if found.from_cls else "patches"
    maps = {f"{asking}, mean of heads": found.heads.mean(1)}
    if before:
        maps["through all blocks"] = attention_map(trunk, rollout(before).unsqueeze(1), grid).heads[:, 0]
    maps |= {f"head {head}": found.heads[:, head] for head in range(found.heads.shape[1])}
    number = block % len(trunk.blocks)
    return [
        Picture(
            f"attention of block {number}",
            (("original", image.cpu()), *((name, heated(image, each[i]).cpu()) for name, each in maps.items())),
        )
        for i, image in enumerate(images)
    ]


def heated(image: UInt8[Tensor, "3 h w"], weights: Float[Tensor, "rows columns"]) -> UInt8[Tensor, "3 h w"]:
    """The image with the patches of great weight in colour and those of little dark: blue, red, yellow as it grows."""
    span = weights.max() - weights.min()
    heat = (weights - weights.min()) / span.clamp(min=1e-12)
    heat = F.interpolate(heat.view(1, 1, *heat.shape).float(), size=image.shape[1:], mode="nearest")[0, 0]
    colour = torch.stack([(2 * heat).clamp(0, 1), (2 * heat - 1).clamp(0, 1), (1 - 2 * heat).clamp(0, 1) * 0.6])
    gray = image.float().mean(0, keepdim=True) / 255
    mixed = 0.55 * colour + 0.45 * gray
    return (255 * mixed).round().clamp(0, 255).to(torch.uint8)
