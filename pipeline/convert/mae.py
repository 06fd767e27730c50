"""The official MAE's files (github.com/facebookresearch/mae): encoder, full, fine-tuned and linear probe.

Legend: D width of the encoder, W of the decoder, N patches.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pipeline.classes import numbered
from pipeline.config import Document
from pipeline.convert.timm import supervised
from pipeline.convert.weights import (
    FIXED_POSITIONS,
    Conventions,
    Format,
    Known,
    Trunk,
    WeightFile,
    Weights,
    Written,
    checked_options,
    chosen,
    complete,
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
)
from pipeline.errors import CheckpointError
from pipeline.models.trunk.config import Position
from pipeline.models.trunk.position import sincos2d
from pipeline.stages.classify import ClassifyOptions
from pipeline.stages.mae import MaeOptions

CONVENTIONS = Conventions(interpolation="bicubic", norm_eps=1e-6, gelu="erf", pixels="imagenet")
DECODER = ("mask_token", "decoder_")
PROBE_NORM = {"running_mean": "running_mean", "running_var": "running_var", "num_batches_tracked": "num_updates"}
SAME_TABLE = 1e-5  # libraries differ in the last bit of sines


class Mae(Format):
    """`{"model": ...}` as main_pretrain.py, main_finetune.py and main_linprobe.py write it.

    What a file is shows in its keys: full ones (the visualisation models among them) are stage `mae`, fine-tuned ones
    `classify`, linear probes `probe`; an encoder alone is stage `mae` with a decoder that starts anew.
    """

    name: ClassVar[str] = "mae"
    takes: ClassVar[tuple[str, ...]] = ("heads", "decoder_heads", "norm_pix", "image_size", "pixels", "probe_head")
    wrapped_in: ClassVar[str | None] = "model"

    def read(self, source: WeightFile, known: Known) -> Weights:
        known = _known_from_file(known, source)
        if "head.1.weight" in source.state:
            return _probe(source, known)
        if "head.weight" in source.state:
            return supervised(source, known, CONVENTIONS)
        return autoencoder(source, known, CONVENTIONS)

    def write(self, weights: Weights, known: Known) -> Written:
        trunk = trunk_of(weights)
        refuse(self.name, weights.where, _unlike_mae(trunk))
        state = trunk.state | {"pos_embed": trunk.table}
        if weights.stage == "mae":
            return Written(state | decoder_of(weights), describe(weights, trunk), ())
        if weights.stage == "classify":
            head = {name: value for name, value in weights.state.items() if not name.startswith("trunk.")}
            return Written(state | head, describe(weights, trunk), ())
        if weights.stage == "probe":
            head, dropped = _probe_head(weights, known)
            return Written(state | head, describe(weights, trunk), dropped)
        return MaeEncoder().write(weights, known)


class MaeEncoder(Format):
    """A file of the encoder alone, such as `mae_pretrain_vit_base.pth`, from any stage's trunk."""

    name: ClassVar[str] = "mae_encoder"
    takes: ClassVar[tuple[str, ...]] = ("heads", "image_size", "pixels")
    wrapped_in: ClassVar[str | None] = "model"

    def read(self, source: WeightFile, known: Known) -> Weights:
        others = tuple(name for name in source.state if name.startswith((*DECODER, "head.", "fc_norm.")))
        state = {name: value for name, value in source.state.items() if name not in others}
        weights = autoencoder(source._replace(state=state), _known_from_file(known, source), CONVENTIONS)
        return weights._replace(ignored=others)

    def write(self, weights: Weights, known: Known) -> Written:
        trunk = trunk_of(weights)
        refuse(self.name, weights.where, _unlike_mae(trunk))
        dropped = tuple(name for name in weights.state if not name.startswith("trunk."))
        return Written(trunk.state | {"pos_embed": trunk.table}, describe(weights, trunk), dropped)


def autoencoder(source: WeightFile, known: Known, conventions: Conventions) -> Weights:
    """An encoder under MAE's names, with a decoder or without: stage `mae`."""
    state, where = source.state, source.where
    decoder = {name: value for name, value in state.items() if name.startswith(DECODER)}
    encoder = {name: value for name, value in state.items() if name not in decoder}
    shape = trunk_shape(encoder, where=where)
    unknown = {"heads": heads_hint(shape.width, shape.depth)}
    if decoder:
        unknown |= {
            "decoder_heads": "MAE's decoders have 16",
            "norm_pix": "true where the targets were normalised patches, false for the visualisation models",
        }
    require_known(known, unknown, where=where)
    table = tensor(encoder, "pos_embed", 3, where)
    grid = native_grid(shape, table, known, where=where)
    model, learned = model_options(shape, table, grid, known, conventions)
    encoder.pop("pos_embed")
    encoder |= {} if learned is None else {"pos_embed": learned}
    model["final_norm"] = "norm.weight" in encoder
    options: Document = {"model": model, "pixels": chosen(known.pixels, conventions.pixels)}
    if not decoder:
        return Weights(where, "mae", options, prefixed(encoder, "trunk."), parts=("trunk.",))
    options |= {"decoder": _decoder_options(decoder, known, where), "norm_pix": known.norm_pix}
    _check_decoder_table(tensor(decoder, "decoder_pos_embed", 3, where), str(model["position"]), grid, where)
    del decoder["decoder_pos_embed"]
    return Weights(where, "mae", options, {**prefixed(encoder, "trunk."), **prefixed(decoder, "decoder.")})


def decoder_of(weights: Weights) -> dict[str, Tensor]:
    """The decoder of a stage `mae` under MAE's names, with its position table; nothing where there is none."""
    decoder = {
        name.removeprefix("decoder."): value for name, value in weights.state.items() if name.startswith("decoder.")
    }
    if not decoder:
        return {}
    _, options = checked_options(weights)
    assert isinstance(options, MaeOptions)
    kind = "sincos2d" if options.model.position == "learned" else options.model.position
    table = sincos2d(options.model.grid, options.decoder.width, kind).to(decoder["mask_token"].dtype)
    blank = torch.zeros(int(options.model.cls_token), options.decoder.width, dtype=table.dtype)
    return decoder | {"decoder_pos_embed": torch.cat([blank, table])[None]}


def describe(weights: Weights, trunk: Trunk) -> Document:
    """Arguments of the official model class."""
    width, depth, _, heads = trunk.model.shape
    document: Document = {
        "img_size": trunk.model.image_hw[0],
        "patch_size": trunk.model.patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
    }
    _, options = checked_options(weights)
    if isinstance(options, MaeOptions):
        document |= {
            "decoder_embed_dim": options.decoder.width,
            "decoder_depth": options.decoder.depth,
            "decoder_num_heads": options.decoder.heads,
            "norm_pix_loss": options.norm_pix,
        }
    if isinstance(options, ClassifyOptions):
        document |= {"num_classes": len(weights.classes), "global_pool": options.pooling == "avg"}
    return document


def _known_from_file(known: Known, source: WeightFile) -> Known:
    """With what the file's training arguments, or our own description of it, say."""
    names = {"heads": "num_heads", "decoder_heads": "decoder_num_heads", "norm_pix": "norm_pix_loss"}
    return complete(known, {ours: source.config.get(name) for ours, name in names.items()}, where=source.where)


def _unlike_mae(trunk: Trunk) -> dict[str, bool]:
    model = trunk.model
    rows, columns = model.grid
    return {
        "register tokens": bool(model.registers),
        "a model without cls token": not model.cls_token,
        f"the {model.gelu} GELU (it has the exact one)": model.gelu != "erf",
        f"LayerNorm's epsilon {model.norm_eps} (it has 1e-6)": model.norm_eps != CONVENTIONS.norm_eps,
        f"a grid of {rows}x{columns} patches (it has square ones)": rows != columns,
    }


def _decoder_options(decoder: dict[str, Tensor], known: Known, where: str) -> Document:
    return {
        "width": tensor(decoder, "decoder_embed.weight", 2, where).shape[0],
        "depth": num_blocks(decoder, "decoder_blocks."),
        "heads": known.decoder_heads,
    }


def _check_decoder_table(table: Tensor, position: str, grid: tuple[int, int], where: str) -> None:
    """Refuse a decoder whose position table isn't the one that ours computes."""
    kind: Position = next((kind for kind in FIXED_POSITIONS if kind == position), "sincos2d")
    prefix = table.shape[1] - grid[0] * grid[1]
    if prefix >= 0 and table.shape[0] == 1 and table.shape[2] % 4 == 0:
        ours = sincos2d(grid, table.shape[2], kind).to(table.dtype)
        near = SAME_TABLE if table.dtype == torch.float32 else 1e-2
        if not table[:, :prefix].any() and torch.allclose(table[0, prefix:], ours, rtol=0, atol=near):
            return
    raise CheckpointError(
        f"decoder_pos_embed isn't the fixed {kind} table of a {grid[0]}x{grid[1]} grid",
        where=where,
        fix="read the encoder alone (format mae_encoder, or leave the decoder's tensors out)",
    )


def _probe(source: WeightFile, known: Known) -> Weights:
    """main_linprobe.py's head, BatchNorm1d(affine=False) and Linear, as stage `probe` with one head."""
    state, where = source.state, source.where
    head = {name: value for name, value in state.items() if name.startswith("head.")}
    encoder = {name: value for name, value in state.items() if name not in head}
    weights = autoencoder(source._replace(state=encoder), known, CONVENTIONS)
    ours = {}
    for theirs, name in PROBE_NORM.items():
        value = head.pop(f"head.0.{theirs}", None)
        if value is None:
            raise CheckpointError(f"no head.0.{theirs}", where=where, fix="check that the file is whole")
        ours[f"feature_norm.{name}"] = value.reshape(1) if name == "num_updates" else value
    num_classes = tensor(head, "head.1.weight", 2, where).shape[0]
    ours |= {name.replace("head.1.", "heads.0."): value for name, value in head.items()}
    options = {**weights.options, "pooling": "cls", "lr_multipliers": [1.0]}
    return Weights(where, "probe", options, weights.state | ours, numbered(num_classes))


def _probe_head(weights: Weights, known: Known) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """One of a probe's heads under MAE's names, and the names of the others."""
    _, options = checked_options(weights)
    num_heads = num_blocks(weights.state, "heads.")
    refuse(
        "mae",
        weights.where,
        {
            "a probe on pixels": getattr(options, "features", "") != "trunk",
            "a probe that pools other than by cls token": getattr(options, "pooling", "") != "cls",
        },
    )
    if num_heads > 1:
        require_known(
            known, {"probe_head": f"one of 0 ... {num_heads - 1}, in the order of lr_multipliers"}, where=weights.where
        )
    chosen_head = f"heads.{known.probe_head or 0}."
    if chosen_head + "weight" not in weights.state:
        raise CheckpointError(
            f"no head {known.probe_head}", where=weights.where, fix=f"choose one of 0 ... {num_heads - 1}"
        )
    state = {f"head.1.{part}": weights.state[chosen_head + part] for part in ("weight", "bias")}
    for theirs, name in PROBE_NORM.items():
        value = weights.state[f"feature_norm.{name}"]
        state[f"head.0.{theirs}"] = value.reshape(()) if name == "num_updates" else value
    others = [name for name in weights.state if name.startswith("heads.") and not name.startswith(chosen_head)]
    return state, tuple(others)
