"""What formats of contrastive models share: putting two towers together as stage `flip`, and taking them apart.

Legend: D width of the trunk, W width of the text tower, E width of the embedding, L tokens, N patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.config import Document
from pipeline.convert.weights import (
    CHECK_FORMAT,
    Conventions,
    Known,
    Trunk,
    TrunkShape,
    Weights,
    checked_options,
    chosen,
    heads_hint,
    model_options,
    native_grid,
    num_blocks,
    prefixed,
    refuse,
    require_known,
    tensor,
    trunk_of,
    trunk_shape,
    under,
)
from pipeline.errors import CheckpointError
from pipeline.models.text.tokenizer import BYTE_PAIRS, VOCAB_SIZE
from pipeline.stages.flip import FlipOptions


class Towers(NamedTuple):
    """Both towers under our names."""

    trunk: dict[str, Tensor]  # without `trunk.`; `pos_embed` [1,R,D]
    text: dict[str, Tensor]  # without `text.`
    rest: dict[str, Tensor]  # image_projection.weight, attn_pool.*, logit_scale, logit_bias


def assembled(
    towers: Towers,
    known: Known,
    conventions: Conventions,
    *,
    where: str,
    image: Document,
    text: Document,
    options: Document,
) -> Weights:
    """Stage `flip` from its parts.

    Args:
        image, text, options: options of the trunk, the text tower and the stage that follow from the format itself.

    Raises:
        CheckpointError: the tensors are no such model.
        ConfigError: something that tensors can't tell isn't known.
    """
    shape = trunk_shape(towers.trunk, where=where)
    width = tensor(towers.text, "token_embedding.weight", 2, where).shape[1]
    hints = {"heads": heads_hint(shape.width, shape.depth), "text_heads": f"usually width / 64, {max(1, width // 64)}"}
    require_known(known, hints, where=where)
    model, trunk = _trunk(towers.trunk, shape, known, conventions, where)
    tower = _text_tower(towers.text, known, conventions, where) | text
    if tower["tokenizer"] == BYTE_PAIRS and tower["vocab_size"] != VOCAB_SIZE:
        hint = f"vocab.txt or tokenizer.json of the {tower['vocab_size']} tokens; CLIP's has {VOCAB_SIZE}"
        require_known(known, {"tokenizer": hint}, where=where)
    scalars = {name: towers.rest[name].reshape(1) for name in ("logit_scale", "logit_bias") if name in towers.rest}
    rest = towers.rest | scalars
    document: Document = {
        "model": model | image,
        "text": tower,
        "embed_dim": _embed_dim(towers, shape, where),
        "projection": "image_projection.weight" in towers.rest,
        "pixels": chosen(known.pixels, conventions.pixels),
        "loss": "siglip" if "logit_bias" in rest else "clip",
        **options,
    }
    return Weights(where, "flip", document, {**prefixed(trunk, "trunk."), **prefixed(towers.text, "text."), **rest})


def _trunk(
    tensors: dict[str, Tensor], shape: TrunkShape, known: Known, conventions: Conventions, where: str
) -> tuple[Document, dict[str, Tensor]]:
    """Options of the trunk, and its tensors with the position table as the stage keeps it."""
    trunk = dict(tensors)
    table = tensor(trunk, "pos_embed", 3, where)
    pre_norm = "norm_pre.weight" in trunk
    if not pre_norm and "patch_embed.proj.bias" not in trunk:  # ours has one: nothing is added
        trunk["patch_embed.proj.bias"] = torch.zeros(shape.width, dtype=trunk["patch_embed.proj.weight"].dtype)
    model, learned = model_options(shape, table, native_grid(shape, table, known, where=where), known, conventions)
    scale = 1.0 if "blocks.0.ls1.gamma" in trunk else None
    model |= {"pre_norm": pre_norm, "layer_scale": scale, "final_norm": "norm.weight" in trunk}
    del trunk["pos_embed"]
    return model, trunk if learned is None else trunk | {"pos_embed": learned}


def _text_tower(text: Mapping[str, Tensor], known: Known, conventions: Conventions, where: str) -> Document:
    """Options of the text tower that follow from its tensors and from what is known."""
    projection = "none" if "projection.weight" not in text else "linear"
    vocabulary, width = tensor(text, "token_embedding.weight", 2, where).shape
    return {
        "vocab_size": vocabulary,
        "context_length": tensor(text, "pos_embed", 2, where).shape[0],
        "width": width,
        "heads": known.text_heads,
        "layers": num_blocks(text, "blocks."),
        "mlp_width": tensor(text, "blocks.0.mlp.fc1.weight", 2, where).shape[0],
        "projection": "linear_bias" if projection == "linear" and "projection.bias" in text else projection,
        "norm_eps": chosen(known.norm_eps, conventions.norm_eps),
        "gelu": chosen(known.gelu, conventions.gelu),
        "tokenizer": chosen(known.tokenizer, BYTE_PAIRS),
    }


def _embed_dim(towers: Towers, shape: TrunkShape, where: str) -> int:
    """The width of both towers' embeddings."""
    projection = towers.rest.get("image_projection.weight")
    text_projection = towers.text.get("projection.weight")
    embed_dim = projection.shape[0] if projection is not None else shape.width
    if text_projection is not None and text_projection.shape[0] != embed_dim:
        raise CheckpointError(
            f"images are embedded in {embed_dim} dimensions, texts in {text_projection.shape[0]}",
            where=where,
            fix=CHECK_FORMAT,
        )
    return embed_dim


class FlipParts(NamedTuple):
    """A stage `flip` taken apart."""

    options: FlipOptions
    trunk: Trunk
    text: dict[str, Tensor]
    rest: dict[str, Tensor]


def taken_apart(weights: Weights, format_name: str) -> FlipParts:
    """The towers of stage `flip`.

    Raises:
        ConfigError: another stage, or a tokenizer whose numbers mean something else elsewhere.
    """
    refuse(format_name, weights.where, {f"stage {weights.stage!r} (it has two towers)": weights.stage != "flip"})
    _, options = checked_options(weights)
    assert isinstance(options, FlipOptions)
    cut = options.text.tokenizer == BYTE_PAIRS and (options.text.vocab_size or VOCAB_SIZE) != VOCAB_SIZE
    reasons = {
        f"a byte-pair vocabulary of {options.text.vocab_size} tokens (its users would number tokens otherwise)": cut,
        "register tokens": bool(options.model.registers),
        "a trunk with windows or convolutions": options.model.spatial or options.model.patch_embed != "linear",
    }
    refuse(format_name, weights.where, reasons)
    rest = {name: value for name, value in weights.state.items() if not name.startswith(("trunk.", "text."))}
    return FlipParts(options, trunk_of(weights), under(weights.state, "text."), rest)


def without_patch_bias(trunk: Trunk) -> dict[str, Tensor]:
    """The trunk's tensors with `pos_embed`, for models whose patches have no bias: it is added to the positions, which
    is the same model. A bias of zeros changes no bit.
    """
    state = dict(trunk.state)
    table, bias = trunk.table, state.pop("patch_embed.proj.bias", None)
    if bias is not None and bool(bias.any()):
        first = int(trunk.model.cls_token)
        table = torch.cat([table[:, :first], table[:, first:] + bias], dim=1)
    return state | {"pos_embed": table}


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Every name with those beginnings (or inner parts, written with dots around) replaced that `names` lists."""
    tensors = {}
    for name, value in state.items():
        for before, after in names.items():
            if name.startswith(before) or (before.startswith(".") and before in name):
                name = name.replace(before, after, 1)
        tensors[name] = value
    return tensors


def facts(source: Mapping[str, Any], *names: str) -> Document:
    """The nested mapping at `names`; {} where there is none."""
    section: Any = source
    for name in names:
        section = section.get(name) if isinstance(section, Mapping) else None
    return dict(section) if isinstance(section, Mapping) else {}
