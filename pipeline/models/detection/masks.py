"""The mask head of Mask R-CNN (He et al. 2017), its targets, and pasting of masks, all as in detectron2.

Legend: B images, P regions of all images, N objects of an image, K classes, F channels, M side of a predicted mask.

Boxes are x0 y0 x1 y1 in pixels, fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import roi_align

from pipeline.models.detection.proposals import DetectorConfig
from pipeline.models.detection.pyramid import norm_layer
from pipeline.models.detection.rcnn import Sampled, by_image

POOLED_SIDE = 14
MASK_SIDE = 28
_PASTED_AT_ONCE = 2**26  # pixels of fp32: 256 MB


class MaskHead(nn.Module):
    """Convolutions, a deconvolution, and a mask for each class."""

    def __init__(self, config: DetectorConfig, num_classes: int) -> None:
        super().__init__()
        width = config.mask_width or config.pyramid_channels
        norm = norm_layer(config.head_norm)
        self.head = MaskRCNNHeads(config.pyramid_channels, [width] * config.mask_convs, 1, norm)
        before = width if config.mask_convs else config.pyramid_channels
        self.deconv = nn.ConvTranspose2d(before, width, 2, stride=2)
        self.predictor = nn.Conv2d(width, num_classes, 1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for bias in (self.deconv.bias, self.predictor.bias):
            assert bias is not None
            nn.init.zeros_(bias)

    def forward(self, regions: Float[Tensor, "p f s s"]) -> Float[Tensor, "p k m m"]:
        """Logits of each class's mask."""
        x = self.head(regions.to(self.predictor.weight.dtype))
        out: Tensor = self.predictor(F.relu(self.deconv(x)))
        return out.float()


def mask_losses(
    logits: Float[Tensor, "p k m m"], objects: Sequence[Sampled], masks: Sequence[Bool[Tensor, "_ h w"]]
) -> Float[Tensor, " b"]:
    """Binary cross-entropy of each image's regions, on the mask of their true class, averaged over the image's pixels.

    Args:
        objects: each image's regions that show objects.
        masks: each image's object masks, at the images' size.
    """
    losses = []
    for image_logits, regions, truth in zip(by_image(logits, [o.boxes for o in objects]), objects, masks, strict=True):
        class_logits = image_logits[torch.arange(len(image_logits), device=image_logits.device), regions.classes]
        target = mask_targets(truth, regions.boxes, regions.matched, logits.shape[-1])
        total = F.binary_cross_entropy_with_logits(class_logits, target.to(class_logits.dtype), reduction="sum")
        losses.append(total / max(class_logits.numel(), 1))
    return torch.stack(losses)


def mask_targets(
    masks: Bool[Tensor, "n h w"], boxes: Float[Tensor, "p 4"], matched: Int[Tensor, " p"], side: int
) -> Bool[Tensor, "p m m"]:
    """Each region's part of its object's mask: RoIAlign of the pixels, thresholded at one half.

    detectron2's `BitMasks.crop_and_resize`. Its ViTDet recipe rasterises polygons instead; our shards hold pixels.
    """
    if len(boxes) == 0:
        return torch.zeros(0, side, side, dtype=torch.bool, device=boxes.device)
    # RoIAlign's "image" of a region is its object's mask, so masks needn't be repeated.
    regions = torch.cat([matched.to(boxes.dtype).unsqueeze(1), boxes], dim=1)
    covered: Tensor = roi_align(masks.unsqueeze(1).float(), regions, side, 1.0, 0, True)[:, 0]
    return covered >= 0.5


def paste_masks(
    masks: Float[Tensor, "d m m"], boxes: Float[Tensor, "d 4"], size: tuple[int, int], threshold: float = 0.5
) -> Bool[Tensor, "d h w"]:
    """Predicted masks, pasted at their boxes into an image of `size` (detectron2's `paste_masks_in_image`).

    Masks are sampled bilinearly at every pixel's centre; pixels outside the box don't belong to the object.
    """
    height, width = size
    out = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    step = max(1, _PASTED_AT_ONCE // max(height * width, 1))
    y = torch.arange(height, device=masks.device, dtype=torch.float32) + 0.5
    x = torch.arange(width, device=masks.device, dtype=torch.float32) + 0.5
    for start in range(0, len(masks), step):
        part, box = masks[start : start + step].float(), boxes[start : start + step]
        left, top, right, bottom = (side.unsqueeze(1) for side in box.unbind(1))
        across = (x - left) / (right - left) * 2 - 1
        down = (y - top) / (bottom - top) * 2 - 1
        across, down = (torch.where(torch.isfinite(at), at, 2.0) for at in (across, down))  # boxes of no area
        places = torch.stack(
            [across.unsqueeze(1).expand(-1, height, -1), down.unsqueeze(2).expand(-1, -1, width)], dim=3
        )
        out[start : start + step] = F.grid_sample(part.unsqueeze(1), places, align_corners=False)[:, 0] >= threshold
    return out


def encode_masks(masks: Bool[Tensor, "d h w"]) -> list[dict[str, object]]:
    """COCO's compressed run lengths of each mask."""
    from pycocotools import mask as coco_mask

    pixels = np.asfortranarray(masks.cpu().numpy().astype(np.uint8).transpose(1, 2, 0))
    return [dict(encoded) for encoded in coco_mask.encode(pixels)]
