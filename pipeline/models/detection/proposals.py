"""Region proposals from torchvision's parts, with detectron2's behaviour (Ren et al. 2015).

Legend: B images, L levels of the pyramid, A anchors over all levels, N objects of an image, P proposals of an image.

Where torchvision differs from detectron2, this follows detectron2: anchors aren't rounded, regression is plain L1,
losses are divided by the number of anchors that should be sampled (not by how many were), NMS ranks by logits. Losses
are computed for each image by itself, so that a batch's gradient is the same however images are divided among ranks;
detectron2 does the same when each GPU holds one image.

Boxes are x0 y0 x1 y1 in pixels, fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from pipeline.config import Config
from pipeline.models.detection.pyramid import HeadNorm
from pipeline.models.noise import uniform

LARGEST_GROWTH = math.log(1000 / 16)  # of a box's side by one regression, as a logarithm


class DetectorConfig(Config):
    """Pyramid, proposals and heads; the defaults are ViTDet's Mask R-CNN in detectron2."""

    pyramid_channels: int = Field(default=256, gt=0)
    head_norm: HeadNorm = "layer"
    masks: bool = True  # False: boxes only
    cascade: bool = False  # Cai & Vasconcelos 2018: three box heads at rising overlaps, class-agnostic boxes
    anchor_strides: float = Field(default=8.0, gt=0)  # side of a level's anchors, in strides of the level
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height over width
    rpn_samples: int = Field(default=256, gt=0)  # anchors an image's loss is taken over, at most half of them objects
    train_proposals: tuple[int, int] = (2000, 1000)  # best of each level before NMS, and of all levels after it
    test_proposals: tuple[int, int] = (1000, 1000)
    rpn_nms: float = Field(default=0.7, gt=0, le=1)
    box_samples: int = Field(default=512, gt=0)  # proposals an image's loss is taken over
    box_positives: float = Field(default=0.25, gt=0, le=1)  # share of them that are objects, at most
    box_convs: int = Field(default=4, ge=0)
    box_width: int = Field(default=1024, gt=0)  # of the fully connected layer
    mask_convs: int = Field(default=4, ge=0)
    mask_width: int | None = Field(default=None, gt=0)  # None: the pyramid's channels
    score_threshold: float = Field(default=0.05, ge=0, lt=1)
    nms: float = Field(default=0.5, gt=0, le=1)
    detections: int = Field(default=100, gt=0)  # per image, at most


class Targets(NamedTuple):
    """An image's objects, on the features' device; crowd regions are left out, as in detectron2's training."""

    boxes: Float[Tensor, "n 4"]
    classes: Int[Tensor, " n"]


class AnchorPredictions(NamedTuple):
    """Scores and box deltas of every anchor."""

    logits: Float[Tensor, "b a"]
    deltas: Float[Tensor, "b a 4"]
    anchors: Float[Tensor, "a 4"]
    per_level: tuple[int, ...]


def anchors_of(
    grid: tuple[int, int], stride: float, side: float, ratios: Sequence[float], device: torch.device
) -> Float[Tensor, "a 4"]:
    """Anchors of one level, row by row: at every location one of each ratio, of area side^2, centred on the location's
    upper left corner.

    detectron2's `DefaultAnchorGenerator` with offset 0.
    """
    cell = torch.tensor(
        [[-(w := math.sqrt(side**2 / ratio)) / 2, -ratio * w / 2, w / 2, ratio * w / 2] for ratio in ratios],
        device=device,
    )
    y = torch.arange(grid[0], device=device, dtype=torch.float32) * stride
    x = torch.arange(grid[1], device=device, dtype=torch.float32) * stride
    corners = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1] * 2, dim=-1)
    return (corners.view(-1, 1, 4) + cell).view(-1, 4)


class ProposalNetwork(nn.Module):
    """Two 3x3 convolutions, then a score and box deltas for each anchor; shared by all levels."""

    def __init__(self, config: DetectorConfig, strides: Sequence[float]) -> None:
        super().__init__()
        self.config = config
        self.strides = tuple(strides)
        self.head = RPNHead(config.pyramid_channels, len(config.anchor_ratios), conv_depth=2)
        self.matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0), LARGEST_GROWTH)

    def forward(self, levels: Sequence[Float[Tensor, "b f _ _"]]) -> AnchorPredictions:
        """Score and regress every anchor."""
        logits, deltas = self.head(list(levels))
        b = levels[0].shape[0]
        flat = [x.permute(0, 2, 3, 1).reshape(b, -1).float() for x in logits]
        moves = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(b, -1, 4).float() for x in deltas]
        anchors = [
            anchors_of(
                (x.shape[2], x.shape[3]), stride, self.config.anchor_strides * stride, self.config.anchor_ratios,
                x.device,
            )
            for x, stride in zip(levels, self.strides, strict=True)
        ]  # fmt: skip
        return AnchorPredictions(
            torch.cat(flat, dim=1), torch.cat(moves, dim=1), torch.cat(anchors), tuple(len(a) for a in anchors)
        )

    def propose(self, predicted: AnchorPredictions, sizes: Sequence[tuple[int, int]]) -> list[Float[Tensor, "_ 4"]]:
        """The best boxes of each image after NMS within levels, without gradients.

        Args:
            sizes: height and width of each image's content, to which boxes are clipped.
        """
        before, after = self.config.train_proposals if self.training else self.config.test_proposals
        logits = predicted.logits.detach()
        best, levels, start = [], [], 0
        for level, count in enumerate(predicted.per_level):
            top = logits[:, start : start + count].topk(min(before, count), dim=1).indices + start
            best.append(top)
            levels.append(torch.full_like(top[0], level))
            start += count
        chosen, level_of = torch.cat(best, dim=1), torch.cat(levels)
        proposals = []
        for i, size in enumerate(sizes):
            deltas, anchors = predicted.deltas.detach()[i, chosen[i]], predicted.anchors[chosen[i]]
            boxes = clip_boxes_to_image(self.coder.decode_single(deltas, anchors), list(size))
            scores = logits[i, chosen[i]]
            usable = torch.isfinite(boxes).all(1) & torch.isfinite(scores) & has_area(boxes)
            boxes, scores = boxes[usable], scores[usable]
            best_boxes = batched_nms(boxes, scores, level_of[usable], self.config.rpn_nms)[:after]
            proposals.append(boxes[best_boxes])
        return proposals

    def losses(
        self, predicted: AnchorPredictions, targets: Sequence[Targets], seeds: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Objectness and box loss of each image, over sampled anchors.

        Args:
            seeds: the images' seeds, from which anchors are sampled.
        """
        draws = uniform(seeds, "rpn", len(predicted.anchors))
        objectness, regression = [], []
        for i, target in enumerate(targets):
            matches = match(self.matcher, target.boxes, predicted.anchors)
            positive, negative = sample(matches >= 0, matches == -1, self.config.rpn_samples, 0.5, draws[i])
            truth = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]).to(predicted.logits.dtype)
            logits = predicted.logits[i, torch.cat([positive, negative])]
            objectness.append(F.binary_cross_entropy_with_logits(logits, truth, reduction="sum"))
            target_deltas = self.coder.encode_single(target.boxes[matches[positive]], predicted.anchors[positive])
            regression.append((predicted.deltas[i, positive] - target_deltas).abs().sum())
        return torch.stack(objectness) / self.config.rpn_samples, torch.stack(regression) / self.config.rpn_samples


def match(matcher: Matcher, truth: Float[Tensor, "n 4"], boxes: Float[Tensor, "p 4"]) -> Int[Tensor, " p"]:
    """Index of the object each box is matched with; -1 for background, -2 for boxes that are neither."""
    if len(truth) == 0 or len(boxes) == 0:
        return torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
    numbers: Tensor = matcher(box_iou(truth, boxes))
    return numbers


def sample(
    positive: Bool[Tensor, " p"],
    negative: Bool[Tensor, " p"],
    num: int,
    share: float,
    draws: Float[Tensor, " p"],
) -> tuple[Int[Tensor, " s"], Int[Tensor, " t"]]:
    """Indices of up to `num` boxes, at most `share` of them positive: those with the smallest draws."""
    positives = _smallest(positive, int(num * share), draws)
    return positives, _smallest(negative, num - len(positives), draws)


def _smallest(among: Tensor, num: int, draws: Tensor) -> Tensor:
    places = among.nonzero().flatten()
    if len(places) <= num:
        return places
    return places[draws[places].topk(num, largest=False).indices]


def has_area(boxes: Float[Tensor, "p 4"]) -> Bool[Tensor, " p"]:
    """Whether each box has a positive width and height."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
