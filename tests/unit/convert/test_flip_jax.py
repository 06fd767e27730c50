"""The official FLIP's parameters: its forward pass, written down in numpy from its code, on the same arrays."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import convert
from pipeline.errors import CheckpointError
from pipeline.models.trunk.position import sincos2d

D, W, E, L, HEADS = 16, 12, 8, 10, 2
WORDS = ["[PAD]", "[UNK]", "a", "red", "ring", "blue"]
Arrays = dict[str, np.ndarray[Any, Any]]


def block(rng: np.random.Generator, name: str, width: int) -> Arrays:
    attention, mlp = f"{name}/MultiHeadDotProductAttention_0", f"{name}/MlpBlock_0"
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}/LayerNorm_{i}/{k}": (width,) for i in (0, 1) for k in ("scale", "bias")
    }
    for part in ("query", "key", "value", "out"):
        shapes |= {f"{attention}/{part}/kernel": (width, width), f"{attention}/{part}/bias": (width,)}
    shapes |= {f"{mlp}/Dense_0/kernel": (width, 4 * width), f"{mlp}/Dense_0/bias": (4 * width,)}
    shapes |= {f"{mlp}/Dense_1/kernel": (4 * width, width), f"{mlp}/Dense_1/bias": (width,)}
    return {key: rng.normal(0, 0.3, shape).astype(np.float32) for key, shape in shapes.items()}


def parameters() -> Arrays:
    """Of a tiny FLIP: 4 x 4 patches of 4 pixels, two blocks in each tower, one token more than words."""
    rng = np.random.default_rng(0)
    named: Arrays = {}
    for tower, width in (("img_encoder", D), ("txt_encoder", W)):
        for i in range(2):
            named |= block(rng, f"{tower}/Transformer/encoderblock_{i:02d}", width)
        for kind in ("scale", "bias"):
            named[f"{tower}/Transformer/encoder_norm/{kind}"] = rng.normal(0, 1, width).astype(np.float32)
    table = torch.cat([torch.zeros(1, D), sincos2d((4, 4), D)])[None]
    more: dict[str, tuple[int, ...]] = {
        "img_encoder/cls": (1, 1, D), "img_encoder/embedding/kernel": (4, 4, 3, D), "img_encoder/embedding/bias": (D,),
        "txt_encoder/token_embedding/embedding": (len(WORDS) + 1, W),
        "txt_encoder/posembed_encoder/pos_embedding": (1, L, W),
        "img_mlp1/kernel": (D, E), "txt_mlp1/kernel": (W, E), "logit_scale": (1,),
    }  # fmt: skip
    named |= {key: rng.normal(0, 0.3, shape).astype(np.float32) for key, shape in more.items()}
    return named | {"img_encoder/posembed_encoder/pos_embedding": table.numpy()}


def norm(x: Any, p: Arrays, name: str) -> Any:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]


def dense(x: Any, p: Arrays, name: str) -> Any:
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def encoder(x: Any, p: Arrays, tower: str) -> Any:
    """`Encoder` of models_flip.py: pre-norm blocks, softmax attention, GELU by tanh, a final norm."""
    for i in range(2):
        name = f"{tower}/Transformer/encoderblock_{i:02d}"
        y = norm(x, p, f"{name}/LayerNorm_0")
        attention = f"{name}/MultiHeadDotProductAttention_0"
        q, k, v = (
            dense(y, p, f"{attention}/{part}").reshape(*y.shape[:2], HEADS, -1) for part in ("query", "key", "value")
        )
        scores = np.einsum("bqhd,bkhd->bhqk", q / np.sqrt(q.shape[-1]), k)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v).reshape(y.shape)
        x = x + dense(mixed, p, f"{attention}/out")
        y = dense(norm(x, p, f"{name}/LayerNorm_1"), p, f"{name}/MlpBlock_0/Dense_0")
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + dense(y, p, f"{name}/MlpBlock_0/Dense_1")
    return norm(x, p, f"{tower}/Transformer/encoder_norm")


def features(p: Arrays, pixels: Any, tokens: Any) -> tuple[Any, Any]:
    """`FLIP.__call__` without masking: the mean over all image tokens, the first text token."""
    patches = pixels.reshape(-1, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(pixels), 16, -1)
    x = patches @ p["img_encoder/embedding/kernel"].reshape(-1, D) + p["img_encoder/embedding/bias"]
    x = x + p["img_encoder/posembed_encoder/pos_embedding"][:, 1:]
    x = np.concatenate([np.tile(p["img_encoder/cls"], (len(x), 1, 1)), x], axis=1)
    image = encoder(x, p, "img_encoder").mean(1) @ p["img_mlp1/kernel"]
    y = p["txt_encoder/token_embedding/embedding"][tokens] + p["txt_encoder/posembed_encoder/pos_embedding"]
    text = encoder(y, p, "txt_encoder")[:, 0] @ p["txt_mlp1/kernel"]
    return tuple(z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (image, text))  # type: ignore[return-value]


def as_t5x(p: Arrays, folder: Path) -> str:
    """As t5x writes them: zarr arrays cut into chunks, compressed by gzip."""
    for name, array in p.items():
        place = folder / ("target." + name.replace("/", "."))
        place.mkdir(parents=True)
        chunks = [max(1, -(-size // 2)) for size in array.shape]
        said = {"shape": array.shape, "chunks": chunks, "dtype": "<f4", "order": "C", "compressor": {"id": "gzip"}}
        (place / ".zarray").write_text(json.dumps(said | {"fill_value": None, "filters": None, "zarr_format": 2}))
        for at in np.ndindex(*(-(-size // chunk) for size, chunk in zip(array.shape, chunks, strict=True))):
            part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, chunks, strict=True))]
            whole = np.zeros(chunks, np.float32)
            whole[tuple(slice(0, size) for size in part.shape)] = part
            (place / ".".join(map(str, at))).write_bytes(gzip.compress(whole.tobytes()))
    return str(folder)


@pytest.fixture
def known(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return {"heads": HEADS, "text_heads": HEADS, "tokenizer": str(tmp_path / "vocab.txt")}


@pytest.mark.parametrize("kind", ["t5x", "fused", "archive"])
def test_features_equal_the_official_forward_pass(tmp_path: Path, known: dict[str, Any], kind: str) -> None:
    p = parameters()
    stored = dict(p)
    if kind == "fused":
        for name in [key for key in p if "/query/" in key]:
            three = [stored.pop(name.replace("query", part)) for part in ("query", "key", "value")]
            stored[name.replace("query", "qkv")] = np.concatenate(three, axis=-1)
    if kind == "t5x":
        path = as_t5x(stored, tmp_path / "checkpoint_1")
    else:
        path = str(tmp_path / "flip.npz")
        np.savez(path, **stored)
    stage = convert.load(path, "flip_jax", **known)
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    tokens = stage.tokenizer(["a red ring", "blue", "a zebra ring a red a red"])
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (images.permute(0, 2, 3, 1).numpy() / 255 - mean) / deviation
    expected = features({k: v.astype(np.float64) for k, v in p.items()}, pixels, tokens.numpy())
    with torch.no_grad():
        embeddings = stage.embed_images(images), stage.embed_texts(tokens)
    for ours, theirs in zip(embeddings, expected, strict=True):
        assert np.abs(ours.numpy() - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert stage.options.model.position == "sincos2d"


def test_parameters_come_back_bit_for_bit(tmp_path: Path, known: dict[str, Any]) -> None:
    p = parameters()
    np.savez(tmp_path / "flip.npz", **p)
    convert.save(convert.read(str(tmp_path / "flip.npz"), "flip_jax", **known), str(tmp_path / "again.npz"), "flip_jax")
    again = np.load(tmp_path / "again.npz")
    assert set(again.files) == set(p)
    assert all(np.array_equal(again[name], p[name]) for name in p)


def test_damaged_checkpoints_are_refused(tmp_path: Path, known: dict[str, Any]) -> None:
    p = parameters()
    folder = as_t5x(p, tmp_path / "checkpoint_1")
    (tmp_path / "checkpoint_1" / "target.img_encoder.cls" / "0.0.0").unlink()
    with pytest.raises(CheckpointError, match="chunk"):
        convert.load(folder, "flip_jax", **known)
    p.pop("txt_mlp1/kernel")
    np.savez(tmp_path / "flip.npz", **p)
    with pytest.raises(CheckpointError, match="lacks txt_mlp1/kernel"):
        convert.load(str(tmp_path / "flip.npz"), "flip_jax", **known)
