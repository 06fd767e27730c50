"""Weights of detectron2's ViTDet detectors: Mask R-CNN and Cascade Mask R-CNN with the simple pyramid.

Their files are pickles of numpy arrays (`.pkl`); files.py reads those through an unpickler that builds nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.classes import numbered
from pipeline.config import Document
from pipeline.convert.weights import (
    Conventions,
    Format,
    Known,
    WeightFile,
    Weights,
    Written,
    checked_options,
    chosen,
    native_grid,
    num_blocks,
    refuse,
    require_known,
    tensor,
    trunk_shape,
)
from pipeline.models.detection.rcnn import CASCADE_OVERLAPS
from pipeline.models.trunk.config import SIZES, Size
from pipeline.stages.vitdet import VitDetOptions

CONVENTIONS = Conventions(interpolation="bicubic", norm_eps=1e-6, gelu="erf", pixels="imagenet")
NET, PYRAMID = "backbone.net.", "backbone."  # in this order: one is the other's beginning
RPN, ROI = "proposal_generator.rpn_head.", "roi_heads."
PARTS = ("weight", "bias")
CONSTANTS = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cell_anchors.")
"""Of the model's state, but no weights."""


class Detectron2(Format):
    """A whole detector, as `mask_rcnn_vitdet_*` and `cascade_mask_rcnn_vitdet_*` of its projects/ViTDet are."""

    name: ClassVar[str] = "detectron2"
    takes: ClassVar[tuple[str, ...]] = ("heads", "image_size", "pixels")
    wrapped_in: ClassVar[str | None] = "model"
    arrays: ClassVar[bool] = True

    def read(self, source: WeightFile, known: Known) -> Weights:
        where, state = source.where, source.state
        constants = tuple(name for name in state if name.startswith(CONSTANTS))
        cascade = "roi_heads.box_predictor.0.cls_score.weight" in state
        number = "0." if cascade else ""
        classes = tensor(state, f"roi_heads.box_predictor.{number}cls_score.weight", 2, where)
        box_convs = num_blocks(state, f"roi_heads.box_head.{number}conv") - 1
        mask_convs = num_blocks(state, "roi_heads.mask_head.mask_fcn") - 1
        masks = "roi_heads.mask_head.predictor.weight" in state
        detector: Document = {
            "cascade": cascade,
            "masks": masks,
            "pyramid_channels": tensor(state, "backbone.simfp_4.0.weight", 4, where).shape[0],
            "box_convs": box_convs,
            "box_width": classes.shape[1],
        }
        if masks:
            width = tensor(state, "roi_heads.mask_head.predictor.weight", 4, where).shape[1]
            detector |= {"mask_convs": mask_convs, "mask_width": width}
        ours_of = {theirs: ours for ours, theirs in names(list(state), cascade, box_convs, mask_convs).items()}
        ours = {ours_of.get(name, name): value for name, value in state.items() if name not in constants}
        net = {name.removeprefix("trunk."): value for name, value in ours.items() if name.startswith("trunk.")}
        model, ours["trunk.pos_embed"] = _model(net, known, where)
        options = {"model": model, "detector": detector, "pixels": chosen(known.pixels, CONVENTIONS.pixels)}
        return Weights(where, "vitdet", options, ours, numbered(classes.shape[0] - 1), ignored=constants)

    def write(self, weights: Weights, known: Known) -> Written:
        _, options = checked_options(weights)
        refuse(self.name, weights.where, _unlike(options))
        assert isinstance(options, VitDetOptions)
        detector = options.detector
        theirs = names(list(weights.state), detector.cascade, detector.box_convs, detector.mask_convs)
        state = {theirs[name]: value for name, value in weights.state.items()}
        table = weights.state["trunk.pos_embed"]
        # Its position table has a row for a cls token, which its forward pass leaves out.
        state[NET + "pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        return Written(state, {}, ())


def names(tensors: Sequence[str], cascade: bool, box_convs: int, mask_convs: int) -> dict[str, str]:
    """Our name -> detectron2's. The heads' names follow from their structure; trunk and pyramid have the same names but
    for a prefix, so theirs are taken from `tensors`, which may be called either way.
    """
    table = {f"rpn.head.conv.{i}.0.{part}": f"{RPN}conv.conv{i}.{part}" for i in range(2) for part in PARTS}
    for part in PARTS:
        table |= {
            f"rpn.head.cls_logits.{part}": f"{RPN}objectness_logits.{part}",
            f"rpn.head.bbox_pred.{part}": f"{RPN}anchor_deltas.{part}",
            f"masks.deconv.{part}": f"{ROI}mask_head.deconv.{part}",
            f"masks.predictor.{part}": f"{ROI}mask_head.predictor.{part}",
        }
    for head in range(len(CASCADE_OVERLAPS) if cascade else 1):
        box_head, number = f"boxes.heads.{head}.", f"{head}." if cascade else ""
        for part in PARTS:
            table[f"{box_head}head.{box_convs + 1}.{part}"] = f"{ROI}box_head.{number}fc1.{part}"
            table[f"{box_head}cls_score.{part}"] = f"{ROI}box_predictor.{number}cls_score.{part}"
            table[f"{box_head}bbox_pred.{part}"] = f"{ROI}box_predictor.{number}bbox_pred.{part}"
        table |= _convs(f"{box_head}head.", f"{ROI}box_head.{number}conv", box_convs)
    table |= _convs("masks.head.", f"{ROI}mask_head.mask_fcn", mask_convs)
    for name in tensors:
        for ours, theirs in (("trunk.", NET), ("pyramid.", PYRAMID)):
            if name.startswith((ours, theirs)):
                rest = name.removeprefix(ours).removeprefix(theirs)
                table[ours + rest] = theirs + rest
                break
    return table


def _convs(ours: str, theirs: str, count: int) -> dict[str, str]:
    """Names of convolutions, each with its norm; detectron2 numbers them from 1."""
    weights = {f"{ours}{i}.0.weight": f"{theirs}{i + 1}.weight" for i in range(count)}
    return weights | {f"{ours}{i}.1.{part}": f"{theirs}{i + 1}.norm.{part}" for i in range(count) for part in PARTS}


def _model(net: dict[str, Tensor], known: Known, where: str) -> tuple[Document, Tensor]:
    """Options of the trunk, and its position table without the row of the cls token."""
    shape = trunk_shape(net, where=where)
    table = tensor(net, "pos_embed", 3, where)
    tables = {int(name.split(".")[1]): value.shape for name, value in net.items() if name.endswith("attn.rel_pos_h")}
    heads = known.heads
    if tables:
        heads = shape.width // tables[0][1]
    require_known(known.model_copy(update={"heads": heads}), {"heads": "ViT-B has 12, L and H have 16"}, where=where)
    assert heads is not None
    convs = sorted({int(name.split(".")[1]) for name in net if ".residual." in name})
    lengths = {number: (length + 1) // 2 for number, (length, _) in tables.items()}
    shortest, longest = min(lengths.values(), default=0), max(lengths.values(), default=0)
    implied_size = longest * shape.patch_size if longest > shortest else None
    size = chosen(known.image_size, implied_size)
    require_known(
        known.model_copy(update={"image_size": size}),
        {"image_size": "the released models have 1024; without global blocks tensors don't tell"},
        where=where,
    )
    named = Size(shape.width, shape.depth, shape.mlp_width, heads)
    label = next((name for name, known_size in SIZES.items() if known_size == named), None)
    model: Document = {"size": label} if label else named._asdict()
    # Trained at one size: their tables of positions tell it, and the square is the only grid they have.
    native = native_grid(
        shape._replace(cls_token=True), table, known.model_copy(update={"image_size": None}), where=where
    )
    model |= {
        "image_size": size,
        "patch_size": shape.patch_size,
        "cls_token": False,
        "final_norm": False,
        "position": "learned",
        "position_image_size": [side * shape.patch_size for side in native],
        "interpolation": CONVENTIONS.interpolation,
        "norm_eps": CONVENTIONS.norm_eps,
        "gelu": CONVENTIONS.gelu,
        "relative_positions": bool(tables),
        "conv_blocks": convs,
    }
    if tables:
        model["window"] = shortest
        model["global_blocks"] = [number for number, side in lengths.items() if side == longest > shortest]
    return model, table[:, -native[0] * native[1] :]


def _unlike(options: object) -> dict[str, bool]:
    if not isinstance(options, VitDetOptions):
        return {"a stage other than vitdet": True}
    model, detector = options.model, options.detector
    return {
        "the FPN variant's pyramid": options.pyramid != "simple",
        f"heads with {detector.head_norm} norm (it has layer norm)": detector.head_norm != "layer",
        f"the {model.gelu} GELU (it has the exact one)": model.gelu != "erf",
        f"LayerNorm's epsilon {model.norm_eps} (it has 1e-6)": model.norm_eps != CONVENTIONS.norm_eps,
        "a position table that isn't trained": model.position != "learned" and not model.position_trained,
        "a patch embedding that isn't linear": model.patch_embed != "linear",
        "LayerScale": model.layer_scale is not None,
        "relative positions that blocks share": model.relative_positions == "shared",
    }
