"""The official FLIP's weights: parameters of its JAX code as arrays named by their path, such as
`img_encoder/Transformer/encoderblock_00/MlpBlock_0/Dense_0/kernel`.

Read from an .npz file, or from a folder of t5x, where each array is a folder of zarr (`target.img_encoder.cls/.zarray`
and its chunks). Query, key and value may be one matrix (`qkv`) or three. Kernels are transposed; nothing else changes.

Legend: D width, H heads, N patches, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.convert.two_towers import Towers, assembled, taken_apart
from pipeline.convert.weights import (
    Conventions,
    Format,
    Known,
    WeightFile,
    Weights,
    Written,
    complete,
    prefixed,
    refuse,
    under,
)
from pipeline.errors import CheckpointError

CONVENTIONS = Conventions(interpolation="bicubic", norm_eps=1e-6, gelu="tanh", pixels="imagenet")
BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(.+)")
PARTS = {
    "LayerNorm_0/scale": "norm1.weight",
    "LayerNorm_0/bias": "norm1.bias",
    "LayerNorm_1/scale": "norm2.weight",
    "LayerNorm_1/bias": "norm2.bias",
    "MultiHeadDotProductAttention_0/out/kernel": "attn.proj.weight",
    "MultiHeadDotProductAttention_0/out/bias": "attn.proj.bias",
    "MlpBlock_0/Dense_0/kernel": "mlp.fc1.weight",
    "MlpBlock_0/Dense_0/bias": "mlp.fc1.bias",
    "MlpBlock_0/Dense_1/kernel": "mlp.fc2.weight",
    "MlpBlock_0/Dense_1/bias": "mlp.fc2.bias",
}
QKV = re.compile(r"MultiHeadDotProductAttention_0/(query|key|value|qkv)/(kernel|bias)")
ROOT = {
    "cls": "cls_token",
    "posembed_encoder/pos_embedding": "pos_embed",
    "embedding/kernel": "patch_embed.proj.weight",
    "embedding/bias": "patch_embed.proj.bias",
    "token_embedding/embedding": "token_embedding.weight",
    "Transformer/encoder_norm/scale": "norm.weight",
    "Transformer/encoder_norm/bias": "norm.bias",
}


class FlipJax(Format):
    """`models_flip.FLIP`: stage `flip` with FLIP's own text tower."""

    name: ClassVar[str] = "flip_jax"
    takes: ClassVar[tuple[str, ...]] = ("heads", "text_heads", "image_size", "pixels", "tokenizer")
    pickles: ClassVar[bool] = False
    named_arrays: ClassVar[bool] = True

    def read(self, source: WeightFile, known: Known) -> Weights:
        state = {name.replace(".", "/").removeprefix("target/"): value for name, value in source.state.items()}
        trunk = _ours(under(state, "img_encoder/"), source.where)
        text = _ours(under(state, "txt_encoder/"), source.where)
        needed = {"img_mlp1/kernel", "txt_mlp1/kernel", "logit_scale"}
        if missing := sorted(needed - state.keys()):
            raise CheckpointError(
                f"it lacks {', '.join(missing)}", where=source.where, fix="give FLIP's parameters, or t5x's target"
            )
        text["pos_embed"] = text["pos_embed"][0]
        text["projection.weight"] = state["txt_mlp1/kernel"].T
        rest = {"image_projection.weight": state["img_mlp1/kernel"].T, "logit_scale": state["logit_scale"]}
        return assembled(
            Towers(trunk, text, rest),
            complete(known, {"norm_eps": 1e-6, "gelu": "tanh"}, where=source.where),
            CONVENTIONS,
            where=source.where,
            image={},
            text={"causal": False, "pooling": "first"},
            options={"pooling": "avg_with_cls", "decay_positions": False},
        )

    def write(self, weights: Weights, known: Known) -> Written:
        parts = taken_apart(weights, self.name)
        options, text = parts.options, parts.options.text
        reasons = {
            f"pooling {options.pooling}": options.pooling != "avg_with_cls",
            "a norm before the blocks": options.model.pre_norm,
            "LayerScale": options.model.layer_scale is not None,
            "a GELU other than tanh's": "tanh" not in (options.model.gelu, text.gelu),
            "a text tower other than FLIP's": text.causal or text.pooling != "first" or text.projection != "linear",
            "SigLIP's loss": options.loss != "clip",
        }
        refuse(self.name, weights.where, reasons)
        image = _theirs(parts.trunk.state | {"pos_embed": parts.trunk.table})
        words = {name: value for name, value in parts.text.items() if name != "projection.weight"}
        words["pos_embed"] = words["pos_embed"][None]
        state = prefixed(image, "img_encoder/") | prefixed(_theirs(words), "txt_encoder/")
        state["img_mlp1/kernel"] = parts.rest["image_projection.weight"].T
        state["txt_mlp1/kernel"] = parts.text["projection.weight"].T
        state["logit_scale"] = parts.rest["logit_scale"]
        return Written(state, {}, ())


def _ours(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    split: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name in ROOT:
            renamed[ROOT[name]] = value.permute(3, 2, 0, 1) if name == "embedding/kernel" else value
            continue
        match = BLOCK.fullmatch(name)
        block, part = (int(match[1]), match[2]) if match else (0, "")
        attention = QKV.fullmatch(part)
        if attention is not None:
            kind = "weight" if attention[2] == "kernel" else "bias"
            flat = value.reshape(-1) if kind == "bias" else value.reshape(value.shape[0], -1).T
            split.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[attention[1]] = flat
        elif part in PARTS:
            target = PARTS[part]
            if target.endswith("weight") and not target.startswith("norm"):
                value = value.reshape(-1, value.shape[-1]).T
            renamed[f"blocks.{block}.{target}"] = value
        else:
            raise CheckpointError(f"it holds {name}", where=where, fix="give the parameters of FLIP alone")
    for name, parts in split.items():
        if "qkv" in parts:
            renamed[name] = parts["qkv"]
        elif set(parts) == {"query", "key", "value"}:
            renamed[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
        else:
            raise CheckpointError(
                f"query, key and value of {name} aren't all there", where=where, fix="fetch the file again"
            )
    return renamed


def _theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    roots, parts = ({ours: theirs for theirs, ours in names.items()} for names in (ROOT, PARTS))
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in roots:
            renamed[roots[name]] = value.permute(2, 3, 1, 0) if name == "patch_embed.proj.weight" else value
            continue
        _, number, part = name.split(".", 2)
        block = f"Transformer/encoderblock_{int(number):02d}"
        if part.startswith("attn.qkv."):
            kind = "kernel" if part.endswith("weight") else "bias"
            for which, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                matrix = piece.T if kind == "kernel" else piece
                renamed[f"{block}/MultiHeadDotProductAttention_0/{which}/{kind}"] = matrix
        else:
            is_matrix = part.endswith("weight") and not part.startswith("norm")
            renamed[f"{block}/{parts[part]}"] = value.T if is_matrix else value
    return renamed
