"""Where a trunk looks: its blocks' attention weights, and what they say of an image's patches.

Legend: B samples, H heads, height x width pixels, T tokens (R prefix tokens, then N patches row by row), Q blocks.
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


class Looks(NamedTuple):
    """A block's attention, as the image sees it."""

    heads: Float[Tensor, "b h rows columns"]  # weight of each patch, a head at a time
    from_cls: bool  # whether the cls token asks; otherwise it is the mean over all patches that ask


@torch.no_grad()
def attention_weights(
    trunk: ViT, pixels: Float[Tensor, "b 3 height width"], blocks: Sequence[int]
) -> tuple[Float[Tensor, "b h t t"], ...]:
    """The attention weights of the blocks asked for, of whole images; rows ask, columns are attended to.

    Raises:
        ValueError: there is no such block, or it attends within windows, where no token sees the whole image.
    """
    depth = len(trunk.blocks)
    numbers = [block + depth if block < 0 else block for block in blocks]
    for asked, number in zip(blocks, numbers, strict=True):
        if not 0 <= number < depth:
            raise ValueError(f"no block {asked}; there are 0 to {depth - 1}")
        if number not in global_blocks(trunk):
            raise ValueError(f"block {asked} attends within windows; the global ones are {global_blocks(trunk)}")
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(attention: nn.Module, arguments: tuple[Any, ...]) -> None:
            assert isinstance(attention, Attention)
            given = arguments if isinstance(attention, SpatialAttention) else arguments[:1]  # with its bias
            found[number] = attention.weights(*given)

        return hook

    handles = [_attention(trunk, number).register_forward_pre_hook(keep(number)) for number in set(numbers)]
    try:
        trunk(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found[number] for number in numbers)


def global_blocks(trunk: ViT) -> list[int]:
    """Numbers of the blocks that attend to the whole image."""
    return [i for i, block in enumerate(trunk.blocks) if not isinstance(block, SpatialBlock) or block.window is None]


def looks(trunk: ViT, weights: Float[Tensor, "b h t t"], grid: tuple[int, int]) -> Looks:
    """What the cls token attends to, or, without one, what all patches attend to on average."""
    patches = weights[..., trunk.num_prefix :]
    has_cls = trunk.config.cls_token
    rows = patches[:, :, 0] if has_cls else patches[:, :, trunk.num_prefix :].mean(2)
    return Looks(rows.reshape(*rows.shape[:2], *grid), has_cls)


def rollout(weights: Sequence[Float[Tensor, "b h t t"]]) -> Float[Tensor, "b t t"]:
    """How much of every input token reaches every output token, through all blocks (Abnar & Zuidema 2020).

    A block passes on half of what it had, the residual stream, and half of what the mean of its heads brings.
    """
    first = weights[0].mean(1)
    identity = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    passed = identity.expand_as(first)
    for one in weights:
        passed = (one.mean(1) + identity) / 2 @ passed
    return passed


def _attention(trunk: ViT, number: int) -> Attention:
    block = trunk.blocks[number]
    assert isinstance(block, Block)
    return block.attn
