"""Box heads of Faster and Cascade R-CNN from torchvision's parts, with detectron2's behaviour.

Legend: B images, P proposals of all images, N objects of an image, K classes, F channels, S side of a pooled region.

Where torchvision differs from detectron2, this follows detectron2: RoIAlign is aligned and adapts its sampling density
to the region, a region's level has its epsilon inside the logarithm, the background is the last class, box regression
is plain L1. Losses are computed for each image by itself (see `proposals`).

Boxes are x0 y0 x1 y1 in pixels, fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align

from pipeline.models.detection.proposals import LARGEST_GROWTH, DetectorConfig, Targets, has_area, match, sample
from pipeline.models.detection.pyramid import norm_layer
from pipeline.models.noise import uniform

BOX_SIDE = 7  # of a region pooled for the box head
CANONICAL_PATCHES = 14  # side of a region that is pooled from the level of one patch a stride, in patches
PLAIN_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
CASCADE_OVERLAPS = (0.5, 0.6, 0.7)
CASCADE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


class Detections(NamedTuple):
    """Detections of one image, best first."""

    boxes: Float[Tensor, "d 4"]
    scores: Float[Tensor, " d"]
    classes: Int[Tensor, " d"]


class Sampled(NamedTuple):
    """Proposals of one image that the losses are computed over, and their targets."""

    boxes: Float[Tensor, "p 4"]
    classes: Int[Tensor, " p"]  # K for background
    matched: Int[Tensor, " p"]  # index of the object; meaningless for background


class BoxLosses(NamedTuple):
    """Losses of each image, and the sampled regions that show objects."""

    classes: Float[Tensor, " b"]
    boxes: Float[Tensor, " b"]
    objects: list[Sampled]  # foreground only, of the first head: what the mask head learns from


def pool(
    levels: Sequence[Float[Tensor, "b f _ _"]],
    boxes: Sequence[Float[Tensor, "_ 4"]],
    strides: Sequence[float],
    side: int,
) -> Float[Tensor, "p f s s"]:
    """Regions of all images, each pooled from the level that suits its size (Lin et al. 2017, FPN, equation 1).

    In fp32, as torchvision's kernels require and as detectron2 does in mixed precision.

    Args:
        levels: without the coarsest, which only proposals use.
        strides: of the levels, in pixels; doubling.
    """
    together = torch.cat(list(boxes))
    number = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
    regions = torch.cat([number, together], dim=1)
    sides = ((together[:, 2] - together[:, 0]) * (together[:, 3] - together[:, 1])).clamp(min=0).sqrt()
    middle = strides[0] * 4 * CANONICAL_PATCHES  # a patch is four strides of the finest level
    level_of = (2 + torch.log2(sides / middle + 1e-8)).floor().clamp(0, len(levels) - 1)
    places, pooled = [], []
    for number_of_level, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        rows = (level_of == number_of_level).nonzero().flatten()
        places.append(rows)
        # Also for a level without regions, so that every rank runs the same operations in backward.
        pooled.append(roi_align(level.float(), regions[rows], side, 1 / stride, sampling_ratio=0, aligned=True))
    return torch.cat(pooled)[torch.cat(places).argsort()]


class BoxHead(nn.Module):
    """Convolutions, one fully connected layer, and linear layers for classes and boxes."""

    def __init__(self, config: DetectorConfig, num_classes: int, weights: tuple[float, float, float, float]) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.per_class = not config.cascade
        f = config.pyramid_channels
        norm = norm_layer(config.head_norm)
        self.head = FastRCNNConvFCHead((f, BOX_SIDE, BOX_SIDE), [f] * config.box_convs, [config.box_width], norm)
        for part in self.head:
            if isinstance(part, nn.Linear):  # detectron2's `c2_xavier_fill`
                nn.init.kaiming_uniform_(part.weight, a=1)
                nn.init.zeros_(part.bias)
        self.cls_score = nn.Linear(config.box_width, num_classes + 1)
        self.bbox_pred = nn.Linear(config.box_width, 4 * (num_classes if self.per_class else 1))
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        self.coder = BoxCoder(weights, LARGEST_GROWTH)

    def forward(self, regions: Float[Tensor, "p f s s"]) -> tuple[Float[Tensor, "p _"], Float[Tensor, "p _ 4"]]:
        """Logits of classes and background, and box deltas for each class (in a cascade: for all classes together)."""
        x = self.head(regions.to(self.cls_score.weight.dtype))
        return self.cls_score(x).float(), self.bbox_pred(x).float().view(len(x), -1, 4)

    def losses(
        self, logits: Tensor, deltas: Tensor, sampled: Sequence[Sampled], targets: Sequence[Targets]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Class and box loss of each image, both divided by the image's number of regions."""
        class_losses, box_losses = [], []
        boxes = [regions.boxes for regions in sampled]
        per_image = zip(by_image(logits, boxes), by_image(deltas, boxes), sampled, targets, strict=True)
        for scores, moves, regions, target in per_image:
            num = max(len(regions.boxes), 1)
            class_losses.append(F.cross_entropy(scores, regions.classes, reduction="sum") / num)
            front = (regions.classes < self.num_classes).nonzero().flatten()
            target_deltas = self.coder.encode_single(target.boxes[regions.matched[front]], regions.boxes[front])
            which = regions.classes[front] if self.per_class else torch.zeros_like(front)
            box_losses.append((moves[front, which] - target_deltas).abs().sum() / num)
        return torch.stack(class_losses), torch.stack(box_losses)


class BoxHeads(nn.Module):
    """One box head, or a cascade of three."""

    def __init__(self, config: DetectorConfig, num_classes: int, strides: Sequence[float]) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.strides = tuple(strides)
        weights = CASCADE_WEIGHTS if config.cascade else (PLAIN_WEIGHTS,)
        self.heads = nn.ModuleList(BoxHead(config, num_classes, w) for w in weights)
        self.matchers = tuple(Matcher(overlap, overlap) for overlap in CASCADE_OVERLAPS[: len(weights)])

    def losses(
        self,
        levels: Sequence[Tensor],
        proposals: Sequence[Float[Tensor, "_ 4"]],
        targets: Sequence[Targets],
        sizes: Sequence[tuple[int, int]],
        seeds: Int[Tensor, " b"],
    ) -> BoxLosses:
        """Losses of each image over sampled proposals, summed over the heads."""
        # The annotated boxes are proposals too, or an untrained network would never see an object.
        boxes = [torch.cat([p, t.boxes]) for p, t in zip(proposals, targets, strict=True)]
        draws = uniform(seeds, "boxes", max(len(b) for b in boxes))
        sampled = [self._sample(b, t, d) for b, t, d in zip(boxes, targets, draws, strict=True)]
        objects = [self._objects(regions) for regions in sampled]
        class_losses, box_losses = [], []
        for number, head in enumerate(self._all()):
            logits, deltas = self._apply_head(head, levels, [regions.boxes for regions in sampled])
            classes, moves = head.losses(logits, deltas, sampled, targets)
            class_losses.append(classes)
            box_losses.append(moves)
            if number + 1 < len(self.heads):
                moved = self._moved(head, deltas.detach(), [regions.boxes for regions in sampled], sizes)
                matcher = self.matchers[number + 1]
                sampled = [self._labelled(b[has_area(b)], t, matcher) for b, t in zip(moved, targets, strict=True)]
        return BoxLosses(torch.stack(class_losses).sum(0), torch.stack(box_losses).sum(0), objects)

    def forward(
        self,
        levels: Sequence[Tensor],
        proposals: Sequence[Float[Tensor, "_ 4"]],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Detections]:
        """Detections of each image; in a cascade, scores are averaged over the heads and boxes are the last head's."""
        boxes = list(proposals)
        scores: list[Tensor] = []
        for number, head in enumerate(self._all()):
            logits, deltas = self._apply_head(head, levels, boxes)
            scores.append(logits.softmax(dim=1))
            if number + 1 < len(self.heads):
                boxes = self._moved(head, deltas, boxes, sizes)
        mean = torch.stack(scores).mean(0)
        decoded = _decode(head.coder, deltas, torch.cat(boxes))
        return [
            self._best(b, s, size)
            for b, s, size in zip(by_image(decoded, boxes), by_image(mean, boxes), sizes, strict=True)
        ]

    def _all(self) -> list[BoxHead]:
        return [head for head in self.heads if isinstance(head, BoxHead)]

    def _apply_head(self, head: BoxHead, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        regions = pool(levels, boxes, self.strides, BOX_SIDE)
        if len(self.heads) > 1 and torch.is_grad_enabled():
            regions = _ScaledGradient.apply(regions, 1 / len(self.heads))
        logits, deltas = head(regions)
        return logits, deltas

    def _sample(self, boxes: Tensor, target: Targets, draws: Tensor) -> Sampled:
        labelled = self._labelled(boxes, target, self.matchers[0])
        is_object = labelled.classes < self.num_classes
        num, share = self.config.box_samples, self.config.box_positives
        chosen = torch.cat(sample(is_object, ~is_object, num, share, draws[: len(boxes)]))
        return Sampled(*(part[chosen] for part in labelled))

    def _labelled(self, boxes: Tensor, target: Targets, matcher: Matcher) -> Sampled:
        matched = match(matcher, target.boxes, boxes)
        classes = torch.full_like(matched, self.num_classes)
        front = matched >= 0
        classes[front] = target.classes[matched[front]]
        return Sampled(boxes, classes, matched.clamp(min=0))

    def _objects(self, regions: Sampled) -> Sampled:
        front = regions.classes < self.num_classes
        return Sampled(regions.boxes[front], regions.classes[front], regions.matched[front])

    def _moved(
        self, head: BoxHead, deltas: Tensor, boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Boxes after class-agnostic regression, clipped to the images."""
        moved = _decode(head.coder, deltas, torch.cat(list(boxes)))[:, 0]
        parts = zip(by_image(moved, boxes), sizes, strict=True)
        return [clip_boxes_to_image(part, list(size)) for part, size in parts]

    def _best(self, boxes: Float[Tensor, "p c 4"], scores: Float[Tensor, "p _"], size: tuple[int, int]) -> Detections:
        """The best detections; every class of every region is a candidate, and NMS works within classes."""
        finite = torch.isfinite(boxes).flatten(1).all(1) & torch.isfinite(scores).all(1)
        boxes, scores = boxes[finite], scores[finite, :-1]
        boxes = clip_boxes_to_image(boxes, list(size))
        region, label = (scores > self.config.score_threshold).nonzero(as_tuple=True)
        score = scores[region, label]
        box = boxes[region, label if boxes.shape[1] > 1 else torch.zeros_like(label)]
        best = batched_nms(box, score, label, self.config.nms)[: self.config.detections]
        return Detections(box[best], score[best], label[best])


def by_image(x: Float[Tensor, "p *_"], boxes: Sequence[Float[Tensor, "_ 4"]]) -> tuple[Tensor, ...]:
    """The rows of x that belong to each image; x has one row for each box."""
    parts: tuple[Tensor, ...] = x.split([len(b) for b in boxes])  # type: ignore[no-untyped-call]
    return parts


def _decode(coder: BoxCoder, deltas: Float[Tensor, "p c 4"], boxes: Float[Tensor, "p 4"]) -> Float[Tensor, "p c 4"]:
    moved: Tensor = coder.decode_single(deltas.flatten(1), boxes)
    return moved.view(len(boxes), -1, 4)


class _ScaledGradient(torch.autograd.Function):
    """The identity, which scales gradients in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def level_strides(patch_size: int, num: int) -> tuple[float, ...]:
    """Strides of the first `num` levels, in pixels."""
    return tuple(patch_size / 4 * math.pow(2, i) for i in range(num))
