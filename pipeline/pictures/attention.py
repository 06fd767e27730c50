"""Pictures of a trunk's attention, as heat maps over the images."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.pixels import PixelStatistics, normalize
from pipeline.models.trunk.attention_maps import attention_map, attention_weights, global_blocks, rollout
from pipeline.models.trunk.vit import ViT
from pipeline.pictures.picture import Picture


def attention_pictures(
    trunk: ViT, images: UInt8[Tensor, "b 3 h w"], statistics: PixelStatistics, block: int = -1
) -> list[Picture]:
    """One block's attention to each image: the mean of its heads, all blocks together (rollout), and each head.

    Rollout is left out where some blocks attend within windows.

    Raises:
        ValueError: see `attention_weights`.
    """
    pixels = normalize(images, statistics)
    p = trunk.config.patch_size
    grid = (images.shape[2] // p, images.shape[3] // p)
    all_blocks = list(range(len(trunk.blocks)))
    all_global = global_blocks(trunk) == all_blocks
    *of_all_blocks, of_block = attention_weights(trunk, pixels, [*(all_blocks if all_global else []), block])
    attention = attention_map(trunk, of_block, grid)
    queries = "cls" if attention.from_cls else "patches"
    maps = {f"{queries}, mean of heads": attention.heads.mean(1)}
    if of_all_blocks:
        maps["through all blocks"] = attention_map(trunk, rollout(of_all_blocks).unsqueeze(1), grid).heads[:, 0]
    maps |= {f"head {head}": attention.heads[:, head] for head in range(attention.heads.shape[1])}
    number = block % len(trunk.blocks)
    return [
        Picture(
            f"attention of block {number}",
            (("original", image.cpu()), *((name, heat_map(image, weights[i]).cpu()) for name, weights in maps.items())),
        )
        for i, image in enumerate(images)
    ]


def heat_map(image: UInt8[Tensor, "3 h w"], weights: Float[Tensor, "rows columns"]) -> UInt8[Tensor, "3 h w"]:
    """The image in gray, tinted by the weights of its patches: from blue (least) over red to yellow (greatest)."""
    span = weights.max() - weights.min()
    heat = (weights - weights.min()) / span.clamp(min=1e-12)
    heat = F.interpolate(heat.view(1, 1, *heat.shape).float(), size=image.shape[1:], mode="nearest")[0, 0]
    colour = torch.stack([(2 * heat).clamp(0, 1), (2 * heat - 1).clamp(0, 1), (1 - 2 * heat).clamp(0, 1) * 0.6])
    gray = image.float().mean(0, keepdim=True) / 255
    mixed = 0.55 * colour + 0.45 * gray
    return (255 * mixed).round().clamp(0, 255).to(torch.uint8)
