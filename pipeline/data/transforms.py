"""From a raw sample to an example, driven by the sample's seed alone.

Legend: H W pixels of the source image, h w of the result, L tokens.

Images leave as uint8; a stage normalises them on the device with `normalise`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from pipeline.data.augment import augment, erase
from pipeline.data.batch import Example, RawSample
from pipeline.data.images import (
    Header,
    UnreadableSample,
    decode,
    read_header,
    scale_for_crop,
    scaled_size,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Interpolation = Literal["bilinear", "bicubic"]
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def normalise(
    images: UInt8[Tensor, "b 3 h w"],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Tensor, "b 3 h w"]:
    """(images / 255 - mean) / std in float32, on the images' device."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return images.float() * scale[:, None, None] - shift[:, None, None]


class Box(NamedTuple):
    """A rectangle of an image in pixels; the lower right corner is outside."""

    left: float
    top: float
    right: float
    bottom: float


@runtime_checkable
class ImageTransform(Protocol):
    """An encoded image to pixels of a fixed size (h, w)."""

    @property
    def size(self) -> tuple[int, int]: ...

    def __call__(self, data: bytes, seed: int) -> UInt8[Tensor, "3 h w"]: ...


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

    def __call__(self, data: bytes, seed: int) -> UInt8[Tensor, "3 h w"]:
        draw = random.Random(seed)
        header = read_header(data)
        box = random_crop(header.height, header.width, self.scale, self.ratio, draw)
        image = _cut(data, header, box, self.size, self.interpolation, mirror=self.flip and draw.random() < 0.5)
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

    def __call__(self, data: bytes, seed: int) -> UInt8[Tensor, "3 h w"]:
        header = read_header(data)
        box = centre_crop(header.height, header.width, self.size, self.resize)
        return _cut(data, header, box, self.size, self.interpolation, mirror=False)


def random_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draw: random.Random
) -> Box:
    """A crop as torchvision's `RandomResizedCrop.get_params` draws it."""
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        area = height * width * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(*log_ratio))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = draw.randint(0, height - h)
            left = draw.randint(0, width - w)
            return Box(left, top, left + w, top + h)
    # Hardly any shape fits: the largest central crop within the ratios.
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    top, left = (height - h) // 2, (width - w) // 2
    return Box(left, top, left + w, top + h)


def centre_crop(height: int, width: int, size: tuple[int, int], resize: int | None) -> Box:
    """What remains of an image after resizing its shortest side to `resize` and cutting `size` from its centre.

    An image that would then be smaller than `size` is resized to just cover it instead, as with `resize` None.
    """
    covering = max(size[0] / height, size[1] / width)
    factor = covering if resize is None else max(covering, resize / min(height, width))
    h, w = size[0] / factor, size[1] / factor
    top, left = (height - h) / 2, (width - w) / 2
    return Box(left, top, left + w, top + h)


@dataclasses.dataclass(frozen=True)
class ImageExample:
    """An example from a WebDataset sample: its image, and where asked for its label and caption.

    Args:
        image: what becomes of the image member (`jpg`, `jpeg`, `png` or `webp`).
        label: take the `cls` member, an integer in ASCII digits.
        text: take the `txt` member, UTF-8, through this tokenizer.

    Raises (when called):
        UnreadableSample: a member is missing or can't be read.
    """

    image: ImageTransform
    label: bool = False
    text: Tokenize | None = None

    def __call__(self, sample: RawSample, seed: int) -> Example:
        return Example(
            image=self.image(_image_member(sample), seed),
            text=None if self.text is None else self.text([_caption(sample)])[0],
            label=_label(sample) if self.label else None,
        )

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


def _cut(
    data: bytes, header: Header, box: Box, size: tuple[int, int], interpolation: Interpolation, *, mirror: bool
) -> UInt8[Tensor, "3 h w"]:
    """The part `box` of an encoded image at `size`, decoded no larger than that needs."""
    whole = (header.height, header.width)
    min_size = None
    if header.format == "jpeg":
        scale = scale_for_crop((box.bottom - box.top, box.right - box.left), size)
        min_size = scaled_size(whole, scale) if scale < 1 else None
    pixels = decode(data, min_size)
    if pixels.shape[:2] != whole:
        y, x = pixels.shape[0] / whole[0], pixels.shape[1] / whole[1]
        box = Box(box.left * x, box.top * y, box.right * x, box.bottom * y)
    if pixels.shape[:2] == size and tuple(box) == (0, 0, size[1], size[0]):
        resized = pixels
    else:
        box = Box(max(box.left, 0), max(box.top, 0), min(box.right, pixels.shape[1]), min(box.bottom, pixels.shape[0]))
        image = Image.fromarray(pixels)
        resized = np.asarray(image.resize((size[1], size[0]), _RESAMPLING[interpolation], box=box))
    if mirror:
        resized = resized[:, ::-1]
    return torch.from_numpy(resized.transpose(2, 0, 1).copy())


def _image_member(sample: RawSample) -> bytes:
    for extension in _IMAGE_EXTENSIONS:
        data = sample.members.get(extension)
        if data is not None:
            return data
    raise UnreadableSample(f"no image among its members ({', '.join(sorted(sample.members)) or 'none'})")


def _caption(sample: RawSample) -> str:
    data = sample.members.get("txt")
    if data is None:
        raise UnreadableSample("no txt member")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableSample("txt is no UTF-8") from error


def _label(sample: RawSample) -> int:
    data = sample.members.get("cls")
    if data is None:
        raise UnreadableSample("no cls member")
    text = data.strip()
    if not text.isdigit() or len(text) > 9:
        raise UnreadableSample(f"cls {data[:20]!r} is no class number")
    return int(text)
