"""Vectors that stand for images and texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pipeline import ranks
from pipeline.data.batch import RawSample, derive_seed
from pipeline.data.images.decode import UnreadableSample, read_header
from pipeline.errors import ConfigError, DataError
from pipeline.inference.images import ImageInput, image_bytes, image_names
from pipeline.inference.loading import Model
from pipeline.models.pixels import normalize
from pipeline.models.trunk.pooling import Pooling, pool
from pipeline.stages.base import Stage
from pipeline.stages.flip import FlipStage
from pipeline.stages.images import ImageOptions


@torch.no_grad()
def embed_images(
    model: Model, images: Sequence[ImageInput], *, pooling: Pooling | None = None, batch: int = 16
) -> Float[Tensor, "n d"]:
    """One vector for each image, fp32, on the CPU.

    Args:
        images: as `pipeline.inference.predicting.predict` takes them.
        pooling: of the trunk's tokens; None: of stage flip the embedding that is compared with texts, of length 1, of
            others the mean over the patches.
        batch: images at a time.

    Raises:
        ConfigError: this trunk has no cls token to pool by.
        DataError: an image can't be read.
    """
    stage = model.stage
    if pooling == "cls" and not stage.trunk.config.cls_token:
        raise ConfigError("this trunk has no cls token", where="pooling", fix="use avg")
    names = image_names(images)
    vectors = []
    for start in range(0, len(images), batch):
        chunk = range(start, min(start + batch, len(images)))
        pixels = torch.stack([_pixels(stage, images[i], names[i]) for i in chunk]).to(ranks.device())
        if isinstance(stage, FlipStage) and pooling is None:
            vectors.append(stage.embed_images(pixels).float().cpu())
        else:
            vectors.append(trunk_features(stage, pixels, pooling or "avg").cpu())
    return torch.cat(vectors) if vectors else torch.empty(0, stage.trunk.width)


@torch.no_grad()
def embed_texts(model: Model, texts: Sequence[str], *, batch: int = 64) -> Float[Tensor, "n d"]:
    """The embedding of each text, of length 1, fp32, on the CPU: comparable with `embed_images` by a product.

    Raises:
        ConfigError: the stage has no text tower.
    """
    stage = model.stage
    if not isinstance(stage, FlipStage):
        raise ConfigError(
            f"stage {model.name!r} has no text tower", where=model.weights.where, fix="give weights of stage flip"
        )
    vectors = []
    for start in range(0, len(texts), batch):
        tokens = stage.tokenizer(list(texts[start : start + batch])).to(ranks.device())
        vectors.append(stage.embed_texts(tokens).float().cpu())
    return torch.cat(vectors) if vectors else torch.empty(0, stage.options.embed_dim)


def trunk_features(stage: Stage, images: UInt8[Tensor, "b 3 h w"], pooling: Pooling) -> Float[Tensor, "b d"]:
    """The trunk's pooled tokens of images that have its size and lie on its device, fp32."""
    options = stage.options
    assert isinstance(options, ImageOptions)
    return pool(stage.trunk(normalize(images, options.pixels)), pooling).float()


def _pixels(stage: Stage, image: ImageInput, name: str) -> UInt8[Tensor, "3 h w"]:
    """An image as evaluations see it: of the trunk's size."""
    try:
        data = image_bytes(image)
        header = read_header(data)
        sample = RawSample(0, name, {"png" if header.format == "png" else "jpg": data})
        pixels = stage.view()(sample, derive_seed("embed", name)).image
    except UnreadableSample as error:
        raise DataError(error.reason, where=name, fix="leave this image out") from error
    assert pixels is not None
    return pixels
