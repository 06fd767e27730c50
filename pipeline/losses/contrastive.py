"""Contrastive loss of image-text pairs over all ranks, with exact gradients.

Legend: B pairs of this rank, G pairs of all ranks, E width of an embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def clip_loss(
    images: Float[Tensor, "b e"],
    texts: Float[Tensor, "b e"],
    weight: Float[Tensor, " b"],
    scale: Float[Tensor, ""] | Float[Tensor, " 1"],
) -> Float[Tensor, " b"]:
    """CLIP's loss of each of this rank's pairs against all ranks' (Radford et al. 2021), not yet weighted.

    Summed over ranks and divided by G it is open_clip's loss of the full batch, and its gradients are exact: every
    rank scores its own rows and its own columns, and the backward pass of the gathering adds what other ranks' scores
    say about this rank's embeddings. Collective; all ranks pass equally many pairs.

    Args:
        images: normalised embeddings.
        texts: their texts' normalised embeddings.
        weight: pairs of weight 0 are absent: no pair's negatives. Their own loss is finite but means nothing.
        scale: the logits' factor.
    """
    all_images, all_texts, present = _gather_pairs(images.float(), texts.float(), weight > 0)
    own = torch.arange(len(images), device=images.device) + _rank() * len(images)
    absent = ~present.unsqueeze(0).repeat(len(images), 1)
    absent[torch.arange(len(images), device=images.device), own] = False
    scale = scale.float()
    by_image = (scale * images.float() @ all_texts.T).masked_fill(absent, float("-inf"))
    by_text = (scale * texts.float() @ all_images.T).masked_fill(absent, float("-inf"))
    return (F.cross_entropy(by_image, own, reduction="none") + F.cross_entropy(by_text, own, reduction="none")) / 2


def gather_with_gradient(rows: Float[Tensor, "b e"]) -> Float[Tensor, "g e"]:
    """All ranks' rows in rank order. Its backward pass sums what every rank's loss says about this rank's rows."""
    if _world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def _gather_pairs(images: Tensor, texts: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and presence of all ranks; the embeddings travel as one message, so backward is one as well."""
    both = gather_with_gradient(torch.cat([images, texts], dim=1))
    all_images, all_texts = both.chunk(2, dim=1)
    with torch.no_grad():
        all_present = gather_with_gradient(present.float().unsqueeze(1)).squeeze(1) > 0
    return all_images, all_texts, all_present


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        start = _rank() * ctx.num_rows
        return total[start : start + ctx.num_rows]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world_size() > 1 else 0
