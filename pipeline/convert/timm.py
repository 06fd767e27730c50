"""timm's VisionTransformer, and what other projects' supervised ViTs share with it.

Its keys are our trunk's own. Legend: D width, N patches.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.classes import numbered
from pipeline.config import Document
from pipeline.convert.weights import (
    Conventions,
    Format,
    Known,
    Trunk,
    TrunkShape,
    WeightFile,
    Weights,
    Written,
    chosen,
    complete,
    heads_hint,
    model_options,
    native_grid,
    prefixed,
    require_known,
    tensor,
    trunk_of,
    trunk_shape,
)
from pipeline.errors import CheckpointError
from pipeline.models.trunk.config import Gelu

CONVENTIONS = Conventions(interpolation="bicubic_antialias", norm_eps=1e-6, gelu="erf", pixels="half")
ACTIVATIONS: dict[Gelu, str] = {"erf": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}


class TimmVit(Format):
    """`timm.models.vision_transformer.VisionTransformer` with a linear head or none.

    A model with `fc_norm` pools the average, any other the cls token. One without a head comes as stage `mae`, whose
    `encode` gives features. Positions of register tokens are added to the tokens, which is the same model.
    """

    name: ClassVar[str] = "timm"
    takes: ClassVar[tuple[str, ...]] = ("heads", "image_size", "norm_eps", "gelu", "pixels")

    def read(self, source: WeightFile, known: Known) -> Weights:
        if any(name == "mask_token" or name.startswith("decoder_") for name in source.state):
            raise CheckpointError("it has a mask token or a decoder", where=source.where, fix="read it as format mae")
        arguments = source.config.get("arguments")
        heads = arguments.get("num_heads") if isinstance(arguments, dict) else None
        return supervised(source, complete(known, {"heads": heads}, where=source.where), CONVENTIONS)

    def write(self, weights: Weights, known: Known) -> Written:
        trunk = trunk_of(weights)
        state, config = dict(trunk.state), _arguments(trunk)
        dropped = [name for name in weights.state if not name.startswith("trunk.")]
        if weights.stage == "classify":
            state |= {name: weights.state[name] for name in dropped}
            config["arguments"] |= {"num_classes": len(weights.classes)}
            dropped = []
        table, embeds_class = _with_registers(trunk)
        config["arguments"]["no_embed_class"] = not embeds_class
        return Written(state | {"pos_embed": table}, config, tuple(dropped))


def supervised(source: WeightFile, known: Known, conventions: Conventions, classes: tuple[str, ...] = ()) -> Weights:
    """A ViT under timm's names, with a head (stage `classify`) or without (`mae`, of which it is the trunk)."""
    state, where = dict(source.state), source.where
    shape = trunk_shape(state, where=where)
    require_known(known, {"heads": heads_hint(shape.width, shape.depth)}, where=where)
    table = tensor(state, "pos_embed", 3, where)
    grid = native_grid(shape, table, known, where=where)
    if shape.registers:
        table, state["reg_token"] = _without_registers(shape, table, grid, state["reg_token"])
    model, learned = model_options(shape, table, grid, known, conventions)
    state.pop("pos_embed")
    state |= {} if learned is None else {"pos_embed": learned}
    head = {name: state.pop(name) for name in list(state) if name.startswith(("head.", "fc_norm."))}
    options: Document = {"pixels": chosen(known.pixels, conventions.pixels)}
    ours = prefixed(state, "trunk.")
    if not any(name.startswith("head.") for name in head):
        model["final_norm"] = "norm.weight" in state
        return Weights(where, "mae", {**options, "model": model}, ours, parts=("trunk.",), ignored=tuple(head))
    num_classes = tensor(head, "head.weight", 2, where).shape[0]
    pooling = "avg" if "fc_norm.weight" in head else "cls"
    if pooling == "cls" and not shape.cls_token:
        raise CheckpointError(
            "it averages after the final norm (neither fc_norm nor cls_token)",
            where=where,
            fix="make it with fc_norm; the classify stage averages before the norm",
        )
    names = classes if len(classes) == num_classes else numbered(num_classes)
    return Weights(where, "classify", {**options, "model": model, "pooling": pooling}, {**ours, **head}, names)


def _without_registers(
    shape: TrunkShape, table: Tensor, grid: tuple[int, int], registers: Tensor
) -> tuple[Tensor, Tensor]:
    """Table and register tokens, the tokens' positions added to them."""
    first = int(shape.cls_token)
    extra = table.shape[1] - grid[0] * grid[1] - first
    if extra <= 0:
        return table, registers
    positions = table[:, first : first + extra]
    return torch.cat([table[:, :first], table[:, first + extra :]], dim=1), registers + positions


def _with_registers(trunk: Trunk) -> tuple[Tensor, bool]:
    """The table as timm keeps it, and whether prefix tokens have positions in it."""
    first = int(trunk.model.cls_token)
    if not trunk.model.registers:
        return trunk.table, True
    if not trunk.table[:, :first].any():
        return trunk.table[:, first:], False
    blank = torch.zeros(1, trunk.model.registers, trunk.table.shape[2], dtype=trunk.table.dtype)
    return torch.cat([trunk.table[:, :first], blank, trunk.table[:, first:]], dim=1), True


def _arguments(trunk: Trunk) -> dict[str, Any]:
    """What `VisionTransformer` must be given to hold the weights."""
    model = trunk.model
    width, depth, mlp_width, heads = model.shape
    averages = "norm.weight" not in trunk.state
    return {
        "architecture": "VisionTransformer",
        "norm_eps": model.norm_eps,
        "arguments": {
            "img_size": list(model.image_hw),
            "patch_size": model.patch_size,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            # timm rounds down, and a quotient may lie just below the whole number
            "mlp_ratio": mlp_width // width if mlp_width % width == 0 else (mlp_width + 0.5) / width,
            "num_classes": 0,
            "class_token": model.cls_token,
            "reg_tokens": model.registers,
            "global_pool": "token" if model.cls_token and not averages else "avg",
            "fc_norm": averages,
            "act_layer": ACTIVATIONS[model.gelu],
        },
    }
