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
    Habits,
    Known,
    Trunk,
    Weights,
    asked,
    checked_options,
    chosen,
    heads_hint,
    model_options,
    native_grid,
    num_blocks,
    prefixed,
    refuse,
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
    towers: Towers, known: Known, habits: Habits, *, where: str, image: Document, text: Document, options: Document
) -> Weights:
    """Stage `flip` from its parts.

    Args:
        image, text, options: what the format says of the trunk, the text tower and the stage beyond the tensors.
    """
    trunk = dict(towers.trunk)
    shape = trunk_shape(trunk, where=where)
    width = tensor(towers.text, "token_embedding.weight", 2, where).shape[1]
    hints = {"heads": heads_hint(shape.width, shape.depth), "text_heads": f"usually width / 64, {max(1, width // 64)}"}
    asked(known, hints, where=where)
    table = tensor(trunk, "pos_embed", 3, where)
    grid = native_grid(shape, table, known, where=where)
    pre_norm = "norm_pre.weight" in trunk
    if not pre_norm and "patch_embed.proj.bias" not in trunk:  # ours has one: nothing is added
        trunk["patch_embed.proj.bias"] = torch.zeros(shape.width, dtype=trunk["patch_embed.proj.weight"].dtype)
    model, learned = model_options(shape, table, grid, known, habits)
    scale = 1.0 if "blocks.0.ls1.gamma" in trunk else None
    model |= {"pre_norm": pre_norm, "layer_scale": scale, "final_norm": "norm.weight" in trunk, **image}
    trunk.pop("pos_embed")
    trunk |= {} if learned is None else {"pos_embed": learned}
    projection = towers.rest.get("image_projection.weight")
    text_projection = towers.text.get("projection.weight")
    embed_dim = projection.shape[0] if projection is not None else shape.width
    if text_projection is not None and text_projection.shape[0] != embed_dim:
        raise CheckpointError(
            f"images are embedded in {embed_dim} dimensions, texts in {text_projection.shape[0]}",
            where=where,
            fix=CHECK_FORMAT,
        )
    kind = "none" if text_projection is None else "linear_bias" if "projection.bias" in towers.text else "linear"
    vocabulary, context = towers.text["token_embedding.weight"].shape[0], tensor(towers.text, "pos_embed", 2, where)
    tower: Document = {
        "vocab_size": vocabulary,
        "context_length": context.shape[0],
        "width": width,
        "heads": known.text_heads,
        "layers": num_blocks(towers.text, "blocks."),
        "mlp_width": tensor(towers.text, "blocks.0.mlp.fc1.weight", 2, where).shape[0],
        "projection": kind,
        "norm_eps": chosen(known.norm_eps, habits.norm_eps),
        "gelu": chosen(known.gelu, habits.gelu),
        "tokenizer": chosen(known.tokenizer, BYTE_PAIRS),
        **text,
    }
    if tower["tokenizer"] == BYTE_PAIRS and vocabulary != VOCAB_SIZE:
        asked(
            known,
            {"tokenizer": f"vocab.txt or tokenizer.json of the {vocabulary} tokens; CLIP's has {VOCAB_SIZE}"},
            where=where,
        )
    rest = dict(towers.rest)
    for name in ("logit_scale", "logit_bias"):
        if name in rest:
            rest[name] = rest[name].reshape(1)
    document: Document = {
        "model": model,
        "text": tower,
        "embed_dim": embed_dim,
        "projection": projection is not None,
        "pixels": chosen(known.pixels, habits.pixels),
        "loss": "siglip" if "logit_bias" in rest else "clip",
        **options,
    }
    return Weights(where, "flip", document, {**prefixed(trunk, "trunk."), **prefixed(towers.text, "text."), **rest})


class Parts(NamedTuple):
    """A stage `flip` taken apart."""

    options: FlipOptions
    trunk: Trunk
    text: dict[str, Tensor]
    rest: dict[str, Tensor]


def taken_apart(weights: Weights, format_name: str) -> Parts:
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
    return Parts(options, trunk_of(weights), under(weights.state, "text."), rest)


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
    found = {}
    for name, value in state.items():
        for one, other in names.items():
            if name.startswith(one) or (one.startswith(".") and one in name):
                name = name.replace(one, other, 1)
        found[name] = value
    return found


def facts(source: Mapping[str, Any], *names: str) -> Document:
    """The nested mapping at `names`; {} where there is none."""
    found: Any = source
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}
