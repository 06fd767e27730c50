"""Hugging Face's ViTMAE and ViT: MAE's and timm's models under other names, with query, key and value apart.

Two spellings are read, that of files and that of transformers 5's modules; files are written. What tensors don't tell
is taken from the config.json beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.config import Document
from pipeline.convert.mae import autoencoder, decoder_of
from pipeline.convert.timm import supervised
from pipeline.convert.weights import (
    Conventions,
    Format,
    Known,
    Trunk,
    WeightFile,
    Weights,
    Written,
    checked_options,
    complete,
    prefixed,
    refuse,
    trunk_of,
)
from pipeline.errors import CheckpointError
from pipeline.models.trunk.config import Gelu
from pipeline.stages.mae import MaeOptions

MAE_CONVENTIONS = Conventions(interpolation="bicubic", norm_eps=1e-12, gelu="erf", pixels="imagenet")
VIT_CONVENTIONS = MAE_CONVENTIONS._replace(pixels="half")
ACTIVATIONS: dict[str, Gelu] = {
    "gelu": "erf",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "quick_gelu": "quick",
}
ACTIVATION_OF: dict[Gelu, str] = {"erf": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}

TRUNK_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QKV = ("query", "key", "value")
OURS = {theirs: ours for ours, theirs in {**TRUNK_NAMES, **BLOCK_NAMES}.items()} | {
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
BLOCK = re.compile(r"(decoder\.)?(?:encoder\.layer|layers|decoder_layers|decoder_encoder\.layer)\.(\d+)\.(.+)\.(\w+)")
SPLIT = re.compile(r"attention\.(?:attention\.(query|key|value)|([qkv])_proj)")


class HuggingFaceVitMae(Format):
    """`ViTMAEForPreTraining`, or the encoder alone (`ViTMAEModel`): stage `mae`."""

    name: ClassVar[str] = "hf_vit_mae"
    takes: ClassVar[tuple[str, ...]] = (
        "heads", "decoder_heads", "norm_pix", "image_size", "norm_eps", "gelu", "pixels",
    )  # fmt: skip
    config_file: ClassVar[str | None] = "config.json"

    def read(self, source: WeightFile, known: Known) -> Weights:
        said = {
            **_known_from_config(source),
            "decoder_heads": source.config.get("decoder_num_attention_heads"),
            "norm_pix": source.config.get("norm_pix_loss"),
        }
        state = _our_names(source.state, source.where)
        return autoencoder(source._replace(state=state), complete(known, said, where=source.where), MAE_CONVENTIONS)

    def write(self, weights: Weights, known: Known) -> Written:
        trunk = trunk_of(weights)
        stage = {f"stage {weights.stage!r} (it has an autoencoder)": weights.stage != "mae"}
        refuse(self.name, weights.where, {**stage, **_unlike_theirs(trunk)})
        decoder = decoder_of(weights)
        _, options = checked_options(weights)
        assert isinstance(options, MaeOptions)
        config = {
            "architectures": ["ViTMAEForPreTraining" if decoder else "ViTMAEModel"],
            "model_type": "vit_mae",
            **_describe(trunk),
            "decoder_hidden_size": options.decoder.width,
            "decoder_num_hidden_layers": options.decoder.depth,
            "decoder_num_attention_heads": options.decoder.heads,
            "decoder_intermediate_size": 4 * options.decoder.width,
            "mask_ratio": options.mask_ratio,
            "norm_pix_loss": options.norm_pix,
        }
        encoder = _their_trunk(trunk)
        if not decoder:
            return Written(encoder, config, ())
        return Written({**prefixed(encoder, "vit."), **_their_decoder(decoder)}, config, ())


class HuggingFaceVit(Format):
    """`ViTForImageClassification` (stage `classify` with pooling `cls`), or `ViTModel` without its pooler."""

    name: ClassVar[str] = "hf_vit"
    takes: ClassVar[tuple[str, ...]] = ("heads", "image_size", "norm_eps", "gelu", "pixels")
    config_file: ClassVar[str | None] = "config.json"

    def read(self, source: WeightFile, known: Known) -> Weights:
        ignored = tuple(
            name for name in source.state if "pooler.dense." in name or name.endswith("embeddings.mask_token")
        )
        state = {name: value for name, value in source.state.items() if name not in ignored}
        renamed = _our_names(state, source.where)
        facts = complete(known, _known_from_config(source), where=source.where)
        weights = supervised(source._replace(state=renamed), facts, VIT_CONVENTIONS, _classes(source.config))
        return weights._replace(ignored=weights.ignored + ignored)

    def write(self, weights: Weights, known: Known) -> Written:
        trunk = trunk_of(weights)
        averages = {"average pooling (it classifies by the cls token)": "norm.weight" not in trunk.state}
        refuse(self.name, weights.where, {**averages, **_unlike_theirs(trunk)})
        config = {"architectures": ["ViTModel"], "model_type": "vit", **_describe(trunk)}
        state = _their_trunk(trunk)
        others = [name for name in weights.state if not name.startswith("trunk.")]
        if weights.stage != "classify":
            return Written(state, config, tuple(others))
        config |= {
            "architectures": ["ViTForImageClassification"],
            "id2label": {str(number): name for number, name in enumerate(weights.classes)},
            "label2id": {name: number for number, name in enumerate(weights.classes)},
        }
        head = {name.replace("head.", "classifier."): weights.state[name] for name in others}
        return Written({**prefixed(state, "vit."), **head}, config, ())


def _known_from_config(source: WeightFile) -> Document:
    """What config.json says, as fields of Known."""
    config = source.config
    activation = config.get("hidden_act")
    if activation is not None and activation not in ACTIVATIONS:
        raise CheckpointError(
            f"its activation is {activation!r}",
            where=source.where,
            fix=f"give a model with one of {', '.join(ACTIVATIONS)}",
        )
    return {
        "heads": config.get("num_attention_heads"),
        "norm_eps": config.get("layer_norm_eps"),
        "gelu": None if activation is None else ACTIVATIONS[activation],
        "image_size": config.get("image_size"),
    }


def _classes(config: Document) -> tuple[str, ...]:
    names = config.get("id2label")
    if not isinstance(names, Mapping) or not all(str(number).isdecimal() for number in names):
        return ()
    return tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))


def _our_names(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """MAE's names for theirs; a name that isn't known stays, and is refused later."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        short = name.removeprefix("vit.")
        match = BLOCK.fullmatch(short)
        if match is None:
            short = short.replace("classifier.", "head.").removeprefix("decoder.")
            renamed[OURS.get(short, short)] = value
            continue
        block = f"{'decoder_' if match[1] else ''}blocks.{match[2]}"
        split = SPLIT.fullmatch(match[3])
        if split is None:
            renamed[f"{block}.{OURS.get(match[3], match[3])}.{match[4]}"] = value
        else:
            letter = (split[1] or split[2])[0]
            parts.setdefault(f"{block}.attn.qkv.{match[4]}", {})[letter] = value
    for name, letters in parts.items():
        if set(letters) != set("qkv") or len({part.shape for part in letters.values()}) > 1:
            raise CheckpointError(
                f"query, key and value of {name} aren't all there in one shape", where=where, fix="fetch the file again"
            )
        renamed[name] = torch.cat([letters[letter] for letter in "qkv"])
    return renamed


def _their_trunk(trunk: Trunk) -> dict[str, Tensor]:
    ours = trunk.state | {"pos_embed": trunk.table}
    state = {TRUNK_NAMES[name]: value for name, value in ours.items() if not name.startswith("blocks.")}
    return state | _their_blocks(ours, "blocks.", "encoder.layer.")


def _their_decoder(decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {f"decoder.{name}": value for name, value in decoder.items() if not name.startswith("decoder_blocks.")}
    return state | _their_blocks(decoder, "decoder_blocks.", "decoder.decoder_layers.")


def _their_blocks(state: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.startswith(ours):
            continue
        number, _, rest = name.removeprefix(ours).partition(".")
        part, _, kind = rest.rpartition(".")
        if part == "attn.qkv":
            for which, piece in zip(QKV, value.chunk(3), strict=True):
                renamed[f"{theirs}{number}.attention.attention.{which}.{kind}"] = piece
        else:
            renamed[f"{theirs}{number}.{BLOCK_NAMES[part]}.{kind}"] = value
    return renamed


def _describe(trunk: Trunk) -> Document:
    model = trunk.model
    width, depth, mlp_width, heads = model.shape
    height, across = model.image_hw
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": mlp_width,
        "hidden_act": ACTIVATION_OF[model.gelu],
        "layer_norm_eps": model.norm_eps,
        "image_size": height if height == across else [height, across],
        "patch_size": model.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
    }


def _unlike_theirs(trunk: Trunk) -> dict[str, bool]:
    return {
        "register tokens": bool(trunk.model.registers),
        "a model without cls token": not trunk.model.cls_token,
    }
