"""Segment Anything's own checkpoints, and Hugging Face's `SamModel`: stage `sam`.

Names differ, nothing else does: round trips are bit for bit. Everything but the decoder's number of heads can be read
off the tensors: heads of the trunk and the window from the tables of relative positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from pipeline.config import Document
from pipeline.convert.weights import (
    CHECK_FORMAT,
    Format,
    Known,
    WeightFile,
    Weights,
    Written,
    checked_options,
    chosen,
    num_blocks,
    refuse,
    tensor,
)
from pipeline.errors import CheckpointError
from pipeline.models.sam.model import SamConfig
from pipeline.models.trunk.config import SIZES, ModelConfig, Size
from pipeline.models.trunk.position import FixedPositions, interpolate
from pipeline.stages.sam import SamOptions

TABLE = "trunk.pos_embed"
DECODER_HEADS = 8  # of every released model
SHARED = "prompt_encoder.shared_embedding.positional_embedding"
GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"

# (theirs, ours): the first pattern that matches a name is replaced; names that match none are equal in both.
OFFICIAL = [
    (r"image_encoder\.patch_embed\.", "trunk.patch_embed."),
    (r"image_encoder\.pos_embed", TABLE),
    (r"image_encoder\.blocks\.(\d+)\.mlp\.lin([12])\.", r"trunk.blocks.\1.mlp.fc\2."),
    (r"image_encoder\.blocks\.", "trunk.blocks."),
    (r"image_encoder\.neck\.", "neck."),
]
OFFICIAL_BACK = [
    (r"trunk\.blocks\.(\d+)\.mlp\.fc([12])\.", r"image_encoder.blocks.\1.mlp.lin\2."),
    (r"trunk\.", "image_encoder."),
    (r"neck\.", "image_encoder.neck."),
]
HF_NECK = {"conv1": "0", "layer_norm1": "1", "conv2": "2", "layer_norm2": "3"}
HF_MASK = {"conv1": "0", "layer_norm1": "1", "conv2": "3", "layer_norm2": "4", "conv3": "6"}
HF_UPSCALE = {"upscale_conv1": "0", "upscale_layer_norm": "1", "upscale_conv2": "3"}


class SegmentAnythingFormat(Format):
    """The package segment-anything: `sam_vit_b_01ec64.pth` and its like."""

    name: ClassVar[str] = "segment_anything"
    takes: ClassVar[tuple[str, ...]] = ("decoder_heads", "pixels")

    def read(self, source: WeightFile, known: Known) -> Weights:
        state = {_renamed(name, OFFICIAL): value for name, value in source.state.items()}
        return _weights(source.where, state, known, {})

    def write(self, weights: Weights, known: Known) -> Written:
        options, state = _outgoing(self.name, weights)
        eps = {"a norm_eps of the decoder other than 1e-5": options.sam.norm_eps != 1e-5}
        refuse(self.name, weights.where, eps)
        return Written({_renamed(name, OFFICIAL_BACK): value for name, value in state.items()}, {}, ())


class HuggingFaceSam(Format):
    """transformers' `SamModel`."""

    name: ClassVar[str] = "hf_sam"
    takes: ClassVar[tuple[str, ...]] = ("decoder_heads", "norm_eps", "pixels")
    config_file: ClassVar[str | None] = "config.json"

    def read(self, source: WeightFile, known: Known) -> Weights:
        state = dict(source.state)
        prompt_embedding = state.pop(SHARED, None)
        image_embedding = state.get("shared_image_embedding.positional_embedding")
        if prompt_embedding is not None and (image_embedding is None or not image_embedding.equal(prompt_embedding)):
            raise CheckpointError(
                "its two position embeddings differ", where=source.where, fix="save it with tied weights"
            )
        deepest = num_blocks(state, "mask_decoder.iou_prediction_head.layers.") + 1
        renamed = {_from_hugging_face(name, deepest): value for name, value in state.items()}
        decoder = source.config.get("mask_decoder_config")
        return _weights(
            source.where, renamed, known, decoder if isinstance(decoder, Mapping) else {"layer_norm_eps": 1e-6}
        )

    def write(self, weights: Weights, known: Known) -> Written:
        options, state = _outgoing(self.name, weights)
        written = {_to_hugging_face(name): value for name, value in state.items()}
        written[SHARED] = state[GAUSSIAN]
        return Written(written, _describe(options), ())


def _weights(where: str, state: dict[str, Tensor], known: Known, decoder: Mapping[str, Any]) -> Weights:
    """Weights of stage `sam`, whose options are read off its tensors."""
    table = tensor(state, TABLE, 4, where)
    embed = tensor(state, "trunk.patch_embed.proj.weight", 4, where)
    width, patch = embed.shape[0], embed.shape[2]
    rows, columns = table.shape[1:3]
    depth = num_blocks(state, "trunk.blocks.")
    tables = [tensor(state, f"trunk.blocks.{i}.attn.rel_pos_h", 2, where) for i in range(depth)]
    if not tables or width % tables[0].shape[1]:
        raise CheckpointError("no relative positions tell its heads", where=where, fix=CHECK_FORMAT)
    sides = [(len(positions) + 1) // 2 for positions in tables]
    whole = tuple(i for i, side in enumerate(sides) if side == rows)
    windows = {side for side in sides if side != rows}
    if len(windows) > 1:
        raise CheckpointError(f"windows of different sides: {sorted(windows)}", where=where, fix=CHECK_FORMAT)
    size = Size(
        width, depth, tensor(state, "trunk.blocks.0.mlp.fc1.weight", 2, where).shape[0], width // tables[0].shape[1]
    )
    name = next((name for name, known_size in SIZES.items() if known_size == size), None)
    image = [rows * patch, columns * patch]
    model: Document = ({"size": name} if name else size._asdict()) | {
        "image_size": image[0] if rows == columns else image,
        "patch_size": patch,
        "cls_token": False,
        "final_norm": False,
        "position": "learned",
        "relative_positions": True,
    }
    if windows:
        model |= {"window": windows.pop(), "global_blocks": list(whole)}
    options = {
        "model": model,
        "sam": _decoder_options(state, known, decoder, where),
        "pixels": chosen(known.pixels, "imagenet"),
    }
    return Weights(where, "sam", options, state | {TABLE: table.reshape(1, rows * columns, width)})


def _decoder_options(state: Mapping[str, Tensor], known: Known, decoder: Mapping[str, Any], where: str) -> Document:
    """Options of what stands on the trunk, without those that have their usual value."""
    channels = tensor(state, "mask_decoder.iou_token.weight", 2, where).shape[1]
    lin1 = tensor(state, "mask_decoder.transformer.layers.0.mlp.lin1.weight", 2, where)
    iou = tensor(state, "mask_decoder.iou_prediction_head.layers.0.weight", 2, where)
    mask = tensor(state, "prompt_encoder.mask_downscaling.3.weight", 4, where)
    options = {
        "channels": channels,
        "heads": chosen(known.decoder_heads, decoder.get("num_attention_heads"), DECODER_HEADS),
        "depth": num_blocks(state, "mask_decoder.transformer.layers."),
        "mlp_width": lin1.shape[0],
        "iou_width": iou.shape[0],
        "mask_channels": mask.shape[0],
        "norm_eps": chosen(known.norm_eps, decoder.get("layer_norm_eps"), 1e-5),
    }
    usual = SamConfig()
    return {name: value for name, value in options.items() if value != getattr(usual, name)}


def _outgoing(format_name: str, weights: Weights) -> tuple[SamOptions, dict[str, Tensor]]:
    """Options, and our state with the position table in its grid.

    Tables that the other projects' model always has are filled in, so that it computes the same.

    Raises:
        ConfigError: another stage, or a trunk unlike any of Segment Anything's.
    """
    other = {f"stage {weights.stage!r} (it has prompts and a mask decoder)": weights.stage != "sam"}
    refuse(format_name, weights.where, other)
    _, options = checked_options(weights)
    assert isinstance(options, SamOptions)
    model = options.model
    refuse(
        format_name,
        weights.where,
        {
            "images that aren't square": model.grid[0] != model.grid[1],
            "convolutions between blocks": bool(model.conv_blocks),
            "relative positions that blocks share": model.relative_positions == "shared",
            "a GELU other than the exact one": model.gelu != "erf",
            "LayerNorm with an epsilon other than 1e-6": model.norm_eps != 1e-6,
            "another patch embedding, norm or scale": model.patch_embed != "linear"
            or model.pre_norm
            or model.layer_scale is not None,
        },
    )
    return options, dict(weights.state) | _tables(model, weights.state)


def _tables(model: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The position tables that make Segment Anything's model, which always has them, compute the same as ours: the
    absolute table is written out for the image's grid, and relative ones are zero where ours has none.
    """
    width, depth, _, heads = model.shape
    like = state["trunk.patch_embed.proj.weight"]
    table = state.get(TABLE)
    tables: dict[str, Tensor] = {}
    if model.position == "none":
        table = like.new_zeros(1, model.num_patches, width)
    elif table is None:
        native = FixedPositions(model.position_grid, width, model.position, model.interpolation)
        table = native(model.grid, like)[None]
    elif model.position_grid != model.grid:
        table = interpolate(table[0], model.position_grid, model.grid, model.interpolation)[None]
    tables[TABLE] = table.reshape(1, *model.grid, width)
    if not model.relative_positions:
        for i in range(depth):
            side = model.window if model.window is not None and i not in model.global_blocks else model.grid[0]
            for axis in ("h", "w"):
                tables[f"trunk.blocks.{i}.attn.rel_pos_{axis}"] = like.new_zeros(2 * side - 1, width // heads)
    return tables


def _renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name)
    return name


def _from_hugging_face(name: str, deepest: int) -> str:
    """Our name for theirs; one that isn't known stays, and is refused later."""
    parts = name.split(".")
    first = parts[0]
    if first == "shared_image_embedding":
        return GAUSSIAN
    if first == "vision_encoder":
        if parts[1] == "neck":
            return ".".join(["neck", HF_NECK.get(parts[2], parts[2]), *parts[3:]])
        short = ".".join(["trunk", *parts[1:]]).replace("patch_embed.projection", "patch_embed.proj")
        short = short.replace("trunk.layers.", "trunk.blocks.").replace(".layer_norm", ".norm")
        return re.sub(r"\.mlp\.lin([12])\.", r".mlp.fc\1.", short)
    if first == "prompt_encoder":
        if parts[1] == "mask_embed":
            return ".".join([first, "mask_downscaling", HF_MASK.get(parts[2], parts[2]), *parts[3:]])
        return name.replace(".point_embed.", ".point_embeddings.")
    if parts[1] in HF_UPSCALE:
        return ".".join([first, "output_upscaling", HF_UPSCALE[parts[1]], *parts[2:]])
    name = name.replace(".layer_norm_final_attn.", ".norm_final_attn.").replace(".layer_norm", ".norm")
    return _mlp_names(name, lambda which, number: {"proj_in": 0, "proj_out": deepest}.get(which, number + 1))


def _mlp_names(name: str, number_of: Callable[[str, int], int]) -> str:
    match = re.fullmatch(r"(.*(?:iou_prediction_head|_mlps\.\d+))\.(proj_in|proj_out|layers\.(\d+))\.(\w+)", name)
    return f"{match[1]}.layers.{number_of(match[2], int(match[3] or 0))}.{match[4]}" if match else name


def _to_hugging_face(name: str) -> str:
    if name == GAUSSIAN:
        return "shared_image_embedding.positional_embedding"
    parts = name.split(".")
    if parts[0] == "neck":
        return ".".join(["vision_encoder.neck", _key(HF_NECK, parts[1]), *parts[2:]])
    if parts[0] == "trunk":
        short = name.replace("trunk.blocks.", "vision_encoder.layers.").replace("trunk.", "vision_encoder.")
        short = short.replace("patch_embed.proj", "patch_embed.projection").replace(".norm", ".layer_norm")
        return re.sub(r"\.mlp\.fc([12])\.", r".mlp.lin\1.", short)
    if parts[1] == "mask_downscaling":
        return ".".join(["prompt_encoder.mask_embed", _key(HF_MASK, parts[2]), *parts[3:]])
    if parts[1] == "output_upscaling":
        return ".".join(["mask_decoder", _key(HF_UPSCALE, parts[2]), *parts[3:]])
    match = re.fullmatch(r"(.*(?:iou_prediction_head|_mlps\.\d+))\.layers\.([012])\.(\w+)", name)
    if match:
        return f"{match[1]}.{('proj_in', 'layers.0', 'proj_out')[int(match[2])]}.{match[3]}"
    name = name.replace(".point_embeddings.", ".point_embed.")
    return re.sub(r"\.norm(_final_attn|\d)\.", r".layer_norm\1.", name)


def _key(table: Mapping[str, str], value: str) -> str:
    return next(key for key, number in table.items() if number == value)


def _describe(options: SamOptions) -> Document:
    """The `SamConfig` of transformers."""
    model, sam = options.model, options.sam
    width, depth, mlp_width, heads = model.shape
    size, patch = model.image_hw[0], model.patch_size
    whole = range(depth) if model.window is None else model.global_blocks
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "hidden_size": width,
            "output_channels": sam.channels,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "num_channels": 3,
            "image_size": size,
            "patch_size": patch,
            "layer_norm_eps": model.norm_eps,
            "mlp_dim": mlp_width,
            "mlp_ratio": mlp_width / width,
            "window_size": model.window or 0,
            "global_attn_indexes": list(whole),
            "num_pos_feats": sam.channels // 2,
        },
        "prompt_encoder_config": {
            "hidden_size": sam.channels,
            "image_size": size,
            "patch_size": patch,
            "mask_input_channels": sam.mask_channels,
        },
        "mask_decoder_config": {
            "hidden_size": sam.channels,
            "mlp_dim": sam.mlp_width,
            "num_hidden_layers": sam.depth,
            "num_attention_heads": sam.heads,
            "iou_head_hidden_dim": sam.iou_width,
            "layer_norm_eps": sam.norm_eps,
        },
    }
