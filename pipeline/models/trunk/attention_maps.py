"""Attention maps: the attention weights of a trunk's blocks, and their view of an image's patches.

Legend: B samples, H heads, height x width pixels, T tokens (R prefix tokens, then N patches row by row).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.models.trunk.attention import Attention
from pipeline.models.trunk.block import Block
from pipeline.models.trunk.vit import ViT
from pipeline.models.trunk.windows import SpatialAttention, SpatialBlock


class AttentionMap(NamedTuple):
    """A block's attention to each patch of the image."""

    heads: Float[Tensor, "b h rows columns"]  # weight of each patch, by head
    from_cls: bool  # the queries: the cls token; or, if False, all patches, averaged


@torch.no_grad()
def attention_weights(
    trunk: ViT, pixels: Float[Tensor, "b 3 height width"], blocks: Sequence[int]
) -> tuple[Float[Tensor, "b h t t"], ...]:
    """The attention weights of some blocks for whole images; rows are queries, columns are keys.

    Args:
        blocks: numbers of blocks; negative ones count from the last.

    Raises:
        ValueError: there is no such block, or it attends within windows, where no token sees the whole image.
    """
    depth = len(trunk.blocks)
    numbers = [block + depth if block < 0 else block for block in blocks]
    for block, number in zip(blocks, numbers, strict=True):
        if not 0 <= number < depth:
            raise ValueError(f"no block {block}; there are 0 to {depth - 1}")
        if number not in global_blocks(trunk):
            raise ValueError(f"block {block} attends within windows; the global ones are {global_blocks(trunk)}")
    weights: dict[int, Tensor] = {}

    def recording(number: int) -> Any:
        def hook(attention: nn.Module, arguments: tuple[Any, ...]) -> None:
            assert isinstance(attention, Attention)
            inputs = arguments if isinstance(attention, SpatialAttention) else arguments[:1]  # spatial: with the bias
            weights[number] = attention.weights(*inputs)

        return hook

    handles = [_attention(trunk, number).register_forward_pre_hook(recording(number)) for number in set(numbers)]
    try:
        trunk(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(weights[number] for number in numbers)


def global_blocks(trunk: ViT) -> list[int]:
    """Numbers of the blocks that attend to the whole image."""
    return [i for i, block in enumerate(trunk.blocks) if not isinstance(block, SpatialBlock) or block.window is None]


def attention_map(trunk: ViT, weights: Float[Tensor, "b h t t"], grid: tuple[int, int]) -> AttentionMap:
    """The patches that the cls token attends to or, without a cls token, that all patches attend to on average."""
    patches = weights[..., trunk.num_prefix :]
    has_cls = trunk.config.cls_token
    rows = patches[:, :, 0] if has_cls else patches[:, :, trunk.num_prefix :].mean(2)
    return AttentionMap(rows.reshape(*rows.shape[:2], *grid), has_cls)


def rollout(weights: Sequence[Float[Tensor, "b h t t"]]) -> Float[Tensor, "b t t"]:
    """How much each input token contributes to each output token, through all blocks (attention rollout, Abnar &
    Zuidema 2020).

    A block passes on half its input, the residual stream, and half of what the mean of its heads attends to.
    """
    first = weights[0].mean(1)
    identity = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    contributions = identity.expand_as(first)
    for block in weights:
        contributions = (block.mean(1) + identity) / 2 @ contributions
    return contributions


def _attention(trunk: ViT, number: int) -> Attention:
    block = trunk.blocks[number]
    assert isinstance(block, Block)
    return block.attn
