"""The private names of torchvision that pipeline/models/detection and segmenter.py lean on, and what they compute."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.misc import Conv2dNormActivation

ROOT = Path(__file__).resolve().parents[2]

# torchvision documents what `torchvision.ops`, `torchvision.utils` and the like export; anything deeper is its own.
DOCUMENTED = {"torchvision", "torchvision.io", "torchvision.ops", "torchvision.utils", "torchvision.transforms"}
DOCUMENTED |= {"torchvision.datasets", "torchvision.models"}

COVERED = {
    "torchvision.models.detection._utils.BoxCoder",
    "torchvision.models.detection._utils.Matcher",
    "torchvision.models.detection.faster_rcnn.FastRCNNConvFCHead",
    "torchvision.models.detection.mask_rcnn.MaskRCNNHeads",
    "torchvision.models.detection.rpn.RPNHead",
    "torchvision.ops.misc.Conv2dNormActivation",
}


def undocumented_imports(source: str) -> Iterator[str]:
    """Names imported from modules of torchvision that its documentation doesn't promise."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchvision":
            for alias in node.names:
                if node.module not in DOCUMENTED or alias.name.startswith("_"):
                    yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torchvision" and alias.name not in DOCUMENTED:
                    yield alias.name


def test_every_undocumented_name_in_use_is_covered() -> None:
    files = [
        path for package in ("pipeline", "data_prep", "launch", "vitrail") for path in (ROOT / package).rglob("*.py")
    ]
    assert {name for path in files for name in undocumented_imports(path.read_text())} == COVERED


@pytest.mark.parametrize(
    "source",
    [
        "from torchvision.models.detection._utils import Matcher",
        "from torchvision.ops import _utils",
        "def f():\n    import torchvision.ops.misc",
    ],
)
def test_a_planted_name_is_found(source: str) -> None:
    assert list(undocumented_imports(source))


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (BoxCoder.__init__, ["weights", "bbox_xform_clip"]),
        (BoxCoder.encode_single, ["reference_boxes", "proposals"]),
        (BoxCoder.decode_single, ["rel_codes", "boxes"]),
        (Matcher.__init__, ["high_threshold", "low_threshold", "allow_low_quality_matches"]),
        (Matcher.__call__, ["match_quality_matrix"]),
        (RPNHead.__init__, ["in_channels", "num_anchors", "conv_depth"]),
        (FastRCNNConvFCHead.__init__, ["input_size", "conv_layers", "fc_layers", "norm_layer"]),
        (MaskRCNNHeads.__init__, ["in_channels", "layers", "dilation", "norm_layer"]),
    ],
)
def test_parameters_stand_in_this_order(function: Callable[..., object], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == ["self", *parameters]


def test_the_matcher_says_minus_one_for_background_and_minus_two_for_neither() -> None:
    overlaps = torch.tensor([[0.8, 0.5, 0.1]])
    assert Matcher(0.7, 0.3)(overlaps).tolist() == [0, -2, -1]


def test_the_matcher_keeps_each_objects_best_box_where_low_quality_is_allowed() -> None:
    overlaps = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.4, 0.2]])
    assert Matcher(0.7, 0.3, allow_low_quality_matches=True)(overlaps).tolist() == [0, 1, -1]


def test_the_box_coder_weighs_moves_and_limits_growth() -> None:
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0), 1.0)
    boxes, target = torch.tensor([[0.0, 0.0, 10.0, 20.0]]), torch.tensor([[5.0, 0.0, 25.0, 20.0]])
    deltas = coder.encode_single(target, boxes)
    assert torch.allclose(deltas, torch.tensor([[10.0, 0.0, 5 * math.log(2), 0.0]]))
    assert torch.allclose(coder.decode_single(deltas, boxes), target)
    grown = coder.decode_single(torch.tensor([[0.0, 0.0, 50.0, 0.0]]), boxes)
    assert torch.allclose(grown[0, 2] - grown[0, 0], torch.tensor(10 * math.e))


@pytest.mark.parametrize(
    ("head", "names"),
    [
        (RPNHead(8, 3, conv_depth=2), {"conv.0.0", "conv.1.0", "cls_logits", "bbox_pred"}),
        (FastRCNNConvFCHead((8, 7, 7), [8], [16], nn.BatchNorm2d), {"0.0", "0.1", "2"}),
        (MaskRCNNHeads(8, [8, 8], 1, nn.BatchNorm2d), {"0.0", "0.1", "1.0", "1.1"}),
        (Conv2dNormActivation(8, 8, 3, norm_layer=nn.BatchNorm2d), {"0", "1"}),
    ],
)
def test_parameters_are_named_as_checkpoints_hold_them(head: nn.Module, names: set[str]) -> None:
    assert {name.rpartition(".")[0] for name, _ in head.named_parameters()} == names


def test_without_a_norm_convolutions_have_biases() -> None:
    assert {name for name, _ in Conv2dNormActivation(8, 8, 3, norm_layer=None).named_parameters()} == {
        "0.weight",
        "0.bias",
    }


def test_the_proposal_head_scores_and_regresses_every_anchor() -> None:
    logits, deltas = RPNHead(8, 3, conv_depth=2)([torch.zeros(2, 8, 4, 5)])
    assert (logits[0].shape, deltas[0].shape) == ((2, 3, 4, 5), (2, 12, 4, 5))


def test_heads_say_what_shape_they_give() -> None:
    assert FastRCNNConvFCHead((8, 7, 7), [8], [16], nn.BatchNorm2d)(torch.zeros(3, 8, 7, 7)).shape == (3, 16)
    assert MaskRCNNHeads(8, [6], 1, None)(torch.zeros(3, 8, 14, 14)).shape == (3, 6, 14, 14)
