"""Records what detectron2's own ViTDet makes of `vitdet_case`, in float64: losses, gradients' norms, detections, and
what its optimizer would do to each parameter. Not run by any test: detectron2 is on no package index.

    PYTHONPATH=DETECTRON2_SOURCE python tests/support/record_detectron2.py tests/unit/stages/detectron2_vitdet.json

needs fvcore, iopath, omegaconf, yacs, hydra-core and cloudpickle; its compiled part isn't used. The record at hand is
of commit 02b5c4e (2026-06-06) with torch 2.15.
"""

from __future__ import annotations

import json
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.vitdet_case import NUM_CLASSES, SIDE, shown, weights_of

compiled = types.ModuleType("detectron2._C")
sys.modules["detectron2._C"] = compiled
import detectron2  # noqa: E402

detectron2._C = compiled
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import proposal_generator, roi_heads  # noqa: E402
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator  # noqa: E402
from detectron2.modeling.backbone.fpn import LastLevelMaxPool  # noqa: E402
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT, get_vit_lr_decay_rate  # noqa: E402
from detectron2.modeling.box_regression import Box2BoxTransform  # noqa: E402
from detectron2.modeling.matcher import Matcher  # noqa: E402
from detectron2.modeling.meta_arch import GeneralizedRCNN  # noqa: E402
from detectron2.modeling.poolers import ROIPooler  # noqa: E402
from detectron2.solver.build import get_default_optimizer_params  # noqa: E402
from detectron2.structures import BitMasks, Boxes, Instances  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402

CHANNELS = 16
FINE = ["p2", "p3", "p4", "p5"]
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
ALL = 100_000  # samples: more than there are, so that nothing is drawn


def detector(cascade: bool) -> GeneralizedRCNN:
    net = ViT(
        img_size=SIDE, patch_size=16, embed_dim=32, depth=2, num_heads=2, drop_path_rate=0.0, window_size=3,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), window_block_indexes=[0], residual_block_indexes=[0],
        use_rel_pos=True, out_feature="last_feat", pretrain_img_size=64,
    )  # fmt: skip
    pyramid = SimpleFeaturePyramid(
        net, in_feature="last_feat", out_channels=CHANNELS, scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool(), norm="LN", square_pad=SIDE,
    )  # fmt: skip
    proposals = proposal_generator.RPN(
        in_features=[*FINE, "p6"],
        head=proposal_generator.StandardRPNHead(in_channels=CHANNELS, num_anchors=3, conv_dims=[-1, -1]),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[32], [64], [128], [256], [512]], aspect_ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=ALL, positive_fraction=1.0, pre_nms_topk=(200, 100), post_nms_topk=(100, 60),
        nms_thresh=0.7,
    )  # fmt: skip
    return GeneralizedRCNN(
        backbone=pyramid, proposal_generator=proposals, roi_heads=heads(cascade), pixel_mean=MEAN, pixel_std=STD,
        input_format="RGB",
    )  # fmt: skip


def pooler(side: int) -> ROIPooler:
    scales = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    return ROIPooler(output_size=side, scales=scales, sampling_ratio=0, pooler_type="ROIAlignV2")


def heads(cascade: bool) -> Any:
    def box_head() -> Any:
        shape = ShapeSpec(channels=CHANNELS, height=7, width=7)
        return roi_heads.FastRCNNConvFCHead(input_shape=shape, conv_dims=[CHANNELS] * 2, fc_dims=[32], conv_norm="LN")

    def predictor(xy: int, wh: int) -> Any:
        return roi_heads.FastRCNNOutputLayers(
            input_shape=ShapeSpec(channels=32), test_score_thresh=0.02, test_topk_per_image=20,
            box2box_transform=Box2BoxTransform(weights=(xy, xy, wh, wh)), cls_agnostic_bbox_reg=cascade,
            num_classes=NUM_CLASSES,
        )  # fmt: skip

    common = {
        "num_classes": NUM_CLASSES, "batch_size_per_image": ALL, "positive_fraction": 1.0,
        "box_in_features": FINE, "box_pooler": pooler(7), "mask_in_features": FINE, "mask_pooler": pooler(14),
        "mask_head": roi_heads.MaskRCNNConvUpsampleHead(
            input_shape=ShapeSpec(channels=CHANNELS, width=14, height=14), num_classes=NUM_CLASSES,
            conv_dims=[CHANNELS] * 3, conv_norm="LN",
        ),
    }  # fmt: skip
    if not cascade:
        matcher = Matcher(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False)
        return roi_heads.StandardROIHeads(
            proposal_matcher=matcher, box_head=box_head(), box_predictor=predictor(10, 5), **common
        )
    return roi_heads.CascadeROIHeads(
        box_heads=[box_head() for _ in range(3)],
        box_predictors=[predictor(10, 5), predictor(20, 10), predictor(30, 15)],
        proposal_matchers=[Matcher([t], [0, 1], allow_low_quality_matches=False) for t in (0.5, 0.6, 0.7)],
        **common,
    )


def optimizer(model: nn.Module, norm_decay: float | None, overrides: Any) -> dict[str, list[float]]:
    """Factor of the rate and weight decay, by name."""
    rate = partial(get_vit_lr_decay_rate, lr_decay_rate=0.7, num_layers=2)
    groups = get_default_optimizer_params(
        model, base_lr=1.0, weight_decay=0.1, weight_decay_norm=norm_decay, lr_factor_func=rate, overrides=overrides
    )
    named = {id(p): name for name, p in model.named_parameters()}
    return {named[id(p)]: [group["lr"], group["weight_decay"]] for group in groups for p in group["params"]}


def record(cascade: bool) -> dict[str, Any]:
    model = detector(cascade).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights_of(name, tuple(p.shape)))
    image, boxes, classes, masks = shown()
    canvas = torch.tensor(MEAN).double().view(3, 1, 1).repeat(1, SIDE, SIDE)
    canvas[:, : image.shape[1], : image.shape[2]] = image.double()
    pixels = torch.zeros(len(masks), SIDE, SIDE, dtype=torch.bool)
    pixels[:, : image.shape[1], : image.shape[2]] = masks
    there = Instances((SIDE, SIDE))
    there.gt_boxes, there.gt_classes, there.gt_masks = Boxes(boxes), classes, BitMasks(pixels)
    there.gt_boxes.tensor = boxes.double()
    with EventStorage():
        losses = model.train()([{"image": canvas, "instances": there}])
    sum(losses.values()).backward()
    with torch.no_grad():
        found = model.eval()([{"image": image.double(), "height": 192, "width": 240}])[0]["instances"]
    return {
        "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
        "losses": {name: float(value.detach()) for name, value in losses.items()},
        "gradients": {name: float(p.grad.norm()) for name, p in model.named_parameters()},
        "boxes": found.pred_boxes.tensor.tolist(),
        "scores": found.scores.tolist(),
        "classes": found.pred_classes.tolist(),
        "mask_areas": found.pred_masks.flatten(1).sum(1).tolist(),
        "optimizer": optimizer(model, 0.0, {"pos_embed": {"weight_decay": 0.0}}),
        "optimizer_huge": optimizer(model, None, {}),
    }


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = lambda self, *_, **__: self.double()  # its casts to fp32 included
    found = {"mask": record(False), "cascade": record(True)}
    lines = [
        f'"{case}": {{\n' + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in part.items()) + "}"
        for case, part in found.items()
    ]
    Path(sys.argv[1]).write_text("{" + ",\n".join(lines) + "}\n")
