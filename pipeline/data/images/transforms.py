"""From a raw sample to an example of image, caption and label, driven by the sample's seed alone.

Legend: H W pixels of the source image, h w of the result, L tokens.

Images leave as uint8; a stage normalises them on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from pipeline.data.batch import Example, RawSample
from pipeline.data.images.augment import augment, erase
from pipeline.data.images.decode import Encoded, ImageHeader, read_header
from pipeline.data.images.pixels import IMAGENET_MEAN, IMAGENET_STD, Interpolation, show, show_several
from pipeline.data.images.views import View, centre_crop, random_crop
from pipeline.data.reading.members import drawn_caption, image_member, label


@runtime_checkable
class ImageTransform(Protocol):
    """An encoded image to pixels of a fixed size (h, w)."""

    @property
    def size(self) -> tuple[int, int]: ...

    def __call__(self, data: Encoded, seed: int) -> UInt8[Tensor, "3 h w"]: ...

    def several(self, data: Encoded, seeds: Sequence[int]) -> list[UInt8[Tensor, "3 h w"]]: ...


@runtime_checkable
class Tokenize(Protocol):
    """Captions to a fixed number of token ids each, as open_clip's tokenizers do; must pickle."""

    def __call__(self, texts: list[str]) -> Int[Tensor, "b l"]: ...


@dataclasses.dataclass(frozen=True)
class TrainImage:
    """A random crop, resized and perhaps mirrored: torchvision's RandomResizedCrop and RandomHorizontalFlip.

    The crop's distribution is torchvision's (`RandomResizedCrop.get_params`, which follows Inception). A JPEG is
    decoded at the smallest scale that still gives the crop all the pixels of the result.

    Args:
        size: (h, w) of the result.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width over its height, log-uniform.
        flip: whether half of the images are mirrored.
        interpolation: of the antialiased resize.
        policy: name of a RandAugment or AutoAugment policy of timm's that follows; empty for none.
        erase: probability of random erasing at the end.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    interpolation: Interpolation = "bicubic"
    policy: str = ""
    erase: float = 0.0

    def __call__(self, data: Encoded, seed: int) -> UInt8[Tensor, "3 h w"]:
        return self.several(data, [seed])[0]

    def several(self, data: Encoded, seeds: Sequence[int]) -> list[UInt8[Tensor, "3 h w"]]:
        """A crop for each seed, of an image decoded once, at the scale that serves the crop that needs most."""
        header = read_header(data)
        views = [self._view(header, seed) for seed in seeds]
        crops = show_several(data, header, views, self.interpolation)
        return [self._augmented(crop, seed) for crop, seed in zip(crops, seeds, strict=True)]

    def _view(self, header: ImageHeader, seed: int) -> View:
        draw = random.Random(seed)
        box = random_crop(header.height, header.width, self.scale, self.ratio, draw)
        mirror = self.flip and draw.random() < 0.5
        return View((header.height, header.width), box, self.size, mirror, cut_first=True)

    def _augmented(self, image: UInt8[Tensor, "3 h w"], seed: int) -> UInt8[Tensor, "3 h w"]:
        if self.policy:
            pixels = augment(image.permute(1, 2, 0).numpy(), self.policy, seed, mean=IMAGENET_MEAN)
            image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        if self.erase > 0:
            image = erase(image, self.erase, seed, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        return image


@dataclasses.dataclass(frozen=True)
class EvalImage:
    """The image's shortest side resized, then its centre cut out; nothing random.

    Args:
        size: (h, w) of the result.
        resize: the shortest side before the cut; by default the image is resized just enough to cover `size`.
        interpolation: of the antialiased resize.
    """

    size: tuple[int, int]
    resize: int | None = None
    interpolation: Interpolation = "bicubic"

    def __call__(self, data: Encoded, seed: int) -> UInt8[Tensor, "3 h w"]:
        header = read_header(data)
        box = centre_crop(header.height, header.width, self.size, self.resize)
        return show(data, header, View((header.height, header.width), box, self.size), self.interpolation)

    def several(self, data: Encoded, seeds: Sequence[int]) -> list[UInt8[Tensor, "3 h w"]]:
        """The same image for every seed."""
        return [self(data, 0)] * len(seeds)


@dataclasses.dataclass(frozen=True)
class ImageExample:
    """An example from a WebDataset sample: its image, and where asked for its label and caption.

    Args:
        image: what becomes of the image member (`jpg`, `jpeg`, `png` or `webp`).
        label: take the `cls` member, an integer in ASCII digits.
        text: take the caption through this tokenizer: one drawn by the sample's seed where it has several
            (`pipeline.data.reading.members.drawn_caption`).

    Raises (when called):
        UnreadableSample: a member is missing or can't be read.
    """

    image: ImageTransform
    label: bool = False
    text: Tokenize | None = None

    def __call__(self, sample: RawSample, seed: int) -> Example:
        return self.several(sample, [seed])[0]

    def several(self, sample: RawSample, seeds: Sequence[int]) -> list[Example]:
        """An example for each seed, of an image that is decoded once."""
        images = self.image.several(image_member(sample), seeds)
        texts: list[Tensor | None] = [None] * len(seeds)
        if self.text is not None:
            texts = list(self.text([drawn_caption(sample, seed) for seed in seeds]))
        number = label(sample) if self.label else None
        return [Example(image=image, text=text, label=number) for image, text in zip(images, texts, strict=True)]

    def blank(self) -> Example:
        """A black image with label 0 and the tokens of an empty caption."""
        return Example(
            image=torch.zeros((3, *self.image.size), dtype=torch.uint8),
            text=self._blank_text,
            label=0 if self.label else None,
        )

    @functools.cached_property
    def _blank_text(self) -> Int[Tensor, " l"] | None:
        return None if self.text is None else self.text([""])[0]
