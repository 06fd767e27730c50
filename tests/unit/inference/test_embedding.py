"""Vectors of images and texts, against what the stages compute from the same pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline import convert
from pipeline.config import validate
from pipeline.data.images.transforms import EvalImage
from pipeline.errors import ConfigError, DataError
from pipeline.inference.embedding import embed_images, embed_texts
from pipeline.inference.loading import Model, load
from pipeline.models.pixels import normalize
from pipeline.stages import stage_class
from pipeline.stages.base import DataFacts
from tests.unit.inference.test_predicting import OPTIONS, noise


def model_of(name: str, folder: Path) -> Model:
    torch.manual_seed(0)
    cls = stage_class(name)
    stage = cls(validate(cls.options_class, OPTIONS[name], where="test"), DataFacts(("cat", "dog", "owl")))
    convert.save(stage, str(folder / f"{name}.safetensors"), "vitrail")
    return load(str(folder / f"{name}.safetensors"))


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / f"{seed}.png") for seed in range(3)]
    for seed, path in enumerate(paths):
        noise(seed).save(path)
    return paths


def pixels_of(paths: list[str]) -> torch.Tensor:
    return torch.stack([EvalImage(size=(32, 32))(Path(path).read_bytes(), 0) for path in paths])


def test_flip_embeds_images_and_texts_side_by_side(photos: list[str], tmp_path: Path) -> None:
    model = model_of("flip", tmp_path)
    stage: Any = model.stage
    images = embed_images(model, photos, batch=2)
    texts = embed_texts(model, ["a cat", "a dog", "an owl"], batch=2)
    with torch.no_grad():
        torch.testing.assert_close(images, stage.embed_images(pixels_of(photos)))
        torch.testing.assert_close(texts, stage.embed_texts(stage.tokenizer(["a cat", "a dog", "an owl"])))
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    assert (images @ texts.T).shape == (3, 3)
    assert embed_images(model, []).shape[0] == embed_texts(model, []).shape[0] == 0


@pytest.mark.parametrize("pooling", ["avg", "cls"])
def test_other_stages_embed_by_their_pooled_trunk(photos: list[str], tmp_path: Path, pooling: Any) -> None:
    model = model_of("classify", tmp_path)
    with torch.no_grad():
        tokens = model.stage.trunk(normalize(pixels_of(photos), "imagenet"))
    expected = tokens.patches.mean(1) if pooling == "avg" else tokens.prefix[:, 0]
    torch.testing.assert_close(embed_images(model, photos, pooling=pooling), expected)


def test_what_cannot_be_embedded_is_named(photos: list[str], tmp_path: Path) -> None:
    Path(photos[1]).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png: bytes that are no image"):
        embed_images(model_of("mae", tmp_path), photos)
    with pytest.raises(ConfigError, match="no cls token"):
        embed_images(model_of("vitdet", tmp_path), [Image.new("RGB", (8, 8))], pooling="cls")
    with pytest.raises(ConfigError, match="'mae' has no text tower"):
        embed_texts(model_of("mae", tmp_path), ["a cat"])
