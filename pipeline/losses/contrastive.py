"""Contrastive losses of image-text pairs over all ranks: exact gradients, memory independent of the number of ranks.

Every rank scores its pairs against all ranks' pairs. Embeddings are passed around the ranks in a ring, one rank's block
at a time, and no score is stored: forward stores two numbers per pair; backward computes the scores again and passes
those numbers around with the blocks. Each rank thus computes the whole gradient of its own embeddings, nothing is
reduced, and memory is O(local batch x (chunk + E)) for any number of ranks. There are no flags that could be combined
wrongly.

Legend: B pairs of this rank, C pairs scored at a time, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pipeline import ranks

CHUNK = 4096
"""Pairs scored at a time. With a local batch of 4096 the scores take 64 MiB."""

Rule = Literal["clip", "siglip"]


def clip_loss(
    images: Float[Tensor, "b e"],
    texts: Float[Tensor, "b e"],
    weight: Float[Tensor, " b"],
    scale: Float[Tensor, ""] | Float[Tensor, " 1"],
    *,
    chunk: int = CHUNK,
) -> Float[Tensor, " b"]:
    """CLIP's loss of each of this rank's pairs against all ranks' pairs (Radford et al. 2021), unweighted.

    Summed over ranks and divided by the number of pairs, it is open_clip's `ClipLoss` of the full batch. Collective,
    backward too; all ranks pass the same number of pairs.

    Args:
        images: normalised embeddings.
        texts: normalised embeddings of their texts.
        weight: pairs of weight 0 are absent: they are nobody's negatives, and their own loss is finite but meaningless.
        scale: the logits' factor.
        chunk: pairs scored at a time.
    """
    bias = torch.zeros(1, device=images.device)
    return _loss("clip", images, texts, weight, scale, bias, chunk)


def siglip_loss(
    images: Float[Tensor, "b e"],
    texts: Float[Tensor, "b e"],
    weight: Float[Tensor, " b"],
    scale: Float[Tensor, ""] | Float[Tensor, " 1"],
    bias: Float[Tensor, ""] | Float[Tensor, " 1"],
    *,
    chunk: int = CHUNK,
) -> Float[Tensor, " b"]:
    """SigLIP's loss of each of this rank's images against all ranks' texts (Zhai et al. 2023), unweighted.

    Summed over ranks and divided by the number of pairs, it is open_clip's `SigLipLoss` of the full batch. Arguments
    are those of `clip_loss`; `bias` is added to the scaled cosines.
    """
    return _loss("siglip", images, texts, weight, scale, bias, chunk)


def _loss(rule: Rule, images: Tensor, texts: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, chunk: int) -> Tensor:
    present = (weight > 0).float()
    scale, bias = scale.float().reshape(1), bias.float().reshape(1)
    loss: Tensor = _Pairs.apply(rule, images.float(), texts.float(), present, scale, bias, chunk)
    return loss


class _Side(NamedTuple):
    """What backward needs about some pairs: two embeddings [n,E], all else [n]."""

    images: Tensor
    texts: Tensor
    present: Tensor
    gradient: Tensor  # of the total with respect to the pair's loss
    by_image: Tensor  # CLIP: log sum exp of the image's logits with all texts
    by_text: Tensor  # and of the text's with all images

    def packed(self) -> Tensor:
        columns = torch.stack([self.present, self.gradient, self.by_image, self.by_text], dim=1)
        return torch.cat([self.images, self.texts, columns], dim=1)

    @staticmethod
    def unpacked(block: Tensor) -> _Side:
        width = (block.shape[1] - 4) // 2
        return _Side(block[:, :width], block[:, width : 2 * width], *block[:, 2 * width :].unbind(1))


class _Pairs(torch.autograd.Function):
    """Both losses are `spread_i - z_ii` with logits z = scale x cosine + bias. CLIP's spread is the mean of two
    log-sum-exps (over row i and over column i), SigLIP's the sum of softplus over row i.
    """

    @staticmethod
    def forward(
        ctx: Any, rule: Rule, images: Tensor, texts: Tensor, present: Tensor, scale: Tensor, bias: Tensor, chunk: int
    ) -> Tensor:
        own_logits = scale * (images * texts).sum(1) + bias
        # An absent pair counts only in its own loss, which keeps that loss finite.
        start = torch.where(present > 0, float("-inf"), own_logits) if rule == "clip" else torch.zeros_like(own_logits)
        by_image, by_text = start, start
        for _, block in _around(torch.cat([images, texts, present.unsqueeze(1)], dim=1)):
            width = images.shape[1]
            for part in torch.split(block, chunk):
                absent = part[:, -1] == 0
                z = _logits(images, part[:, width : 2 * width], scale, bias)
                if rule == "siglip":
                    by_image = by_image + F.softplus(z).masked_fill_(absent, 0).sum(1)
                    continue
                by_image = torch.logaddexp(by_image, z.masked_fill_(absent, float("-inf")).logsumexp(1))
                z = _logits(texts, part[:, :width], scale, bias).masked_fill_(absent, float("-inf"))
                by_text = torch.logaddexp(by_text, z.logsumexp(1))
        ctx.rule, ctx.chunk = rule, chunk
        ctx.save_for_backward(images, texts, present, scale, bias, by_image, by_text)
        return (by_image + by_text) / 2 - own_logits if rule == "clip" else by_image - own_logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, present, scale, bias, by_image, by_text = ctx.saved_tensors
        local = _Side(images, texts, present, gradients[0].float() * present, by_image, by_text)
        to_images, to_texts = torch.zeros_like(images), torch.zeros_like(texts)
        to_scale, to_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        for source, block in _around(local.packed()):
            for number, part in enumerate(torch.split(block, ctx.chunk)):
                others = _Side.unpacked(part)
                diagonal = number * ctx.chunk if source == ranks.world().rank else None
                cosines = images @ others.texts.T
                to_z = _to_logits(ctx.rule, scale * cosines + bias, local, others, diagonal)
                to_images.addmm_(to_z, others.texts)
                to_scale += (to_z * cosines).sum()
                to_bias += to_z.sum()
                z = _logits(others.images, texts, scale, bias)
                to_z = _to_logits(ctx.rule, z, others, local, None if diagonal is None else -diagonal)
                to_texts.addmm_(to_z.T, others.images)
        return None, scale * to_images, scale * to_texts, None, to_scale, to_bias, None


def _logits(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return (images @ texts.T).mul_(scale).add_(bias)


def _to_logits(
    rule: Rule, z: Float[Tensor, "m n"], rows: _Side, columns: _Side, diagonal: int | None
) -> Float[Tensor, "m n"]:
    """Gradient of the total with respect to the logits of images (rows) and texts (columns).

    Args:
        diagonal: the logits of matching pairs are z[i, i - diagonal]; None when there are none in z.
    """
    if rule == "siglip":
        to_z = torch.sigmoid(z) * rows.gradient.unsqueeze(1) * columns.present
    else:
        to_z = (z - rows.by_image.unsqueeze(1)).exp_() * (rows.gradient.unsqueeze(1) * columns.present / 2)
        to_z += (z - columns.by_text).exp_() * (rows.present.unsqueeze(1) * columns.gradient / 2)
    if diagonal is not None:
        to_own = to_z.diagonal(-diagonal)
        first = max(diagonal, 0)
        to_own -= rows.gradient[first : first + len(to_own)]
    return to_z


def _around(block: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every rank's block with its rank, this rank's first; the next block is received while the caller works on one.

    Exhaust it: every rank must pass on what it received.
    """
    world = ranks.world()
    block = block.contiguous()
    for step in range(world.size):
        pending: list[dist.Work] = []
        incoming = block
        if step < world.size - 1:
            incoming = torch.empty_like(block)
            pending = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, block, (world.rank + 1) % world.size),
                    dist.P2POp(dist.irecv, incoming, (world.rank - 1) % world.size),
                ]
            )
        yield (world.rank - step) % world.size, block
        for work in pending:
            work.wait()
        block = incoming
