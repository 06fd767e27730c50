"""Hugging Face's CLIPModel: CLIP under other names, with query, key and value apart.

Legend: D width of the trunk, W width of the text tower, N patches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.config import Document
from pipeline.convert.huggingface import ACTIVATION_OF, ACTIVATIONS
from pipeline.convert.two_towers import Towers, assembled, facts, renamed, taken_apart, without_patch_bias
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
from pipeline.models.text.tokenizer import BYTE_PAIRS

CONVENTIONS = Conventions(interpolation="bicubic", norm_eps=1e-5, gelu="quick", pixels="clip")
BLOCKS = {
    "encoder.layers.": "blocks.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.out_proj.": ".attn.proj.",
}
IMAGE = BLOCKS | {
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "pre_layrnorm.": "norm_pre.",
    "post_layernorm.": "norm.",
}
TEXT = BLOCKS | {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "pos_embed",
    "final_layer_norm.": "norm.",
}
SPLIT = re.compile(r"(blocks\.\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")


class HuggingFaceClip(Format):
    """`transformers.CLIPModel`: stage `flip` with cls pooling and a causal text tower."""

    name: ClassVar[str] = "hf_clip"
    takes: ClassVar[tuple[str, ...]] = (
        "heads", "text_heads", "image_size", "norm_eps", "gelu", "pixels", "tokenizer",
    )  # fmt: skip
    config_file: ClassVar[str | None] = "config.json"

    def read(self, source: WeightFile, known: Known) -> Weights:
        state = {name: value for name, value in source.state.items() if not name.endswith(".position_ids")}
        image, text = facts(source.config, "vision_config"), facts(source.config, "text_config")
        said = _known_from_config(image, text, source.where)
        trunk = _joined(renamed(under(state, "vision_model."), IMAGE), source.where)
        if "embeddings.class_embedding" not in trunk:
            raise CheckpointError(
                "no vision_model.embeddings.class_embedding", where=source.where, fix="give a CLIPModel"
            )
        trunk["cls_token"] = trunk.pop("embeddings.class_embedding")[None, None]
        trunk["pos_embed"] = trunk.pop("embeddings.position_embedding.weight")[None]
        tower = _joined(renamed(under(state, "text_model."), TEXT), source.where)
        rest = {"logit_scale": state["logit_scale"], "image_projection.weight": state["visual_projection.weight"]}
        tower["projection.weight"] = state["text_projection.weight"]
        return assembled(
            Towers(trunk, tower, rest),
            complete(known, said, where=source.where),
            CONVENTIONS,
            where=source.where,
            image={},
            text={},
            options={"pooling": "cls"},
        )

    def write(self, weights: Weights, known: Known) -> Written:
        parts = taken_apart(weights, self.name)
        options, model, text = parts.options, parts.options.model, parts.options.text
        reasons = {
            f"pooling {options.pooling} (train with cls)": options.pooling != "cls",
            "a trunk without CLIP's norm before the blocks": not model.pre_norm,
            "a text tower other than CLIP's": not text.causal or text.pooling != "eot" or text.projection != "linear",
            "another tokenizer than CLIP's": text.tokenizer != BYTE_PAIRS,
            "SigLIP's loss": options.loss != "clip",
            "images without projection": not options.projection,
            "LayerScale": model.layer_scale is not None,
        }
        refuse(self.name, weights.where, reasons)
        trunk = without_patch_bias(parts.trunk)
        cls, table = trunk.pop("cls_token"), trunk.pop("pos_embed")
        image = renamed(_split(trunk), {ours: theirs for theirs, ours in IMAGE.items()})
        image |= {"embeddings.class_embedding": cls[0, 0], "embeddings.position_embedding.weight": table[0]}
        tower = {name: value for name, value in parts.text.items() if name != "projection.weight"}
        state = prefixed(image, "vision_model.")
        state |= prefixed(renamed(_split(tower), {ours: theirs for theirs, ours in TEXT.items()}), "text_model.")
        state["visual_projection.weight"] = parts.rest["image_projection.weight"]
        state["text_projection.weight"] = parts.text["projection.weight"]
        state["logit_scale"] = parts.rest["logit_scale"].reshape(())
        width, depth, mlp_width, heads = model.shape
        vision = {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "intermediate_size": mlp_width,
            "image_size": model.image_hw[0],
            "patch_size": model.patch_size,
            "hidden_act": ACTIVATION_OF[model.gelu],
            "layer_norm_eps": model.norm_eps,
            "projection_dim": options.embed_dim,
        }
        words = {
            "hidden_size": text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "intermediate_size": text.mlp_width or 4 * text.width,
            "max_position_embeddings": text.context_length,
            "vocab_size": parts.text["token_embedding.weight"].shape[0],
            "hidden_act": ACTIVATION_OF[text.gelu],
            "layer_norm_eps": text.norm_eps,
            "projection_dim": options.embed_dim,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        }
        config = {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": options.embed_dim,
            "vision_config": vision,
            "text_config": words,
        }
        return Written(state, config, ())


def _known_from_config(image: Document, text: Document, where: str) -> Document:
    """What config.json says, as fields of Known."""
    activation = image.get("hidden_act", "quick_gelu" if image else None)
    if activation is not None and activation not in ACTIVATIONS:
        raise CheckpointError(
            f"its activation is {activation!r}", where=where, fix=f"give a model with one of {', '.join(ACTIVATIONS)}"
        )
    return {
        "heads": image.get("num_attention_heads", 12 if image else None),
        "text_heads": text.get("num_attention_heads", 8 if text else None),
        "norm_eps": image.get("layer_norm_eps"),
        "image_size": image.get("image_size", 224 if image else None),
        "gelu": None if activation is None else ACTIVATIONS[activation],
    }


def _joined(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Query, key and value as one."""
    joined: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = SPLIT.fullmatch(name)
        if match is None:
            joined[name] = value
        else:
            parts.setdefault(f"{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = value
    for name, letters in parts.items():
        if set(letters) != set("qkv"):
            raise CheckpointError(
                f"query, key and value of {name} aren't all there", where=where, fix="fetch the file again"
            )
        joined[name] = torch.cat([letters[letter] for letter in "qkv"])
    return joined


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    apart: dict[str, Tensor] = {}
    for name, value in state.items():
        block, _, kind = name.partition(".attn.qkv.")
        if not kind:
            apart[name] = value
            continue
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            apart[f"{block}.self_attn.{letter}_proj.{kind}"] = part
    return apart
