"""GradCache (Gao et al. 2021): the contrastive loss over all micro batches of a step, in the memory of one.

The first pass embeds every micro batch without a graph; the loss over all embeddings gives the gradient of each. The
second pass embeds once more, with a graph, and sends these gradients through it. Both passes of a micro batch draw the
same random numbers (dropout, drop path), so their embeddings are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.data.batch import Batch, derive_seed
from pipeline.stages.base import Losses

Forward = Callable[[str, Any], Any]  # a `ContrastiveStage`'s forward: the name of the call, and its argument


class GradCache:
    """One step of a `ContrastiveStage`. The caller runs the backward passes: of the loss, then of each surrogate.

    Args:
        forward: of the stage.
        batches: this rank's micro batches, on its device.
        seed: of the random numbers drawn in the forward passes.
    """

    def __init__(self, forward: Forward, batches: Sequence[Batch], seed: int) -> None:
        self._forward = forward
        self._batches = batches
        self._seeds = [derive_seed("embed", seed, batch.position, k) for k, batch in enumerate(batches)]
        self._embeddings: tuple[Tensor, ...] = ()  # images', texts', ...: [samples of all micro batches, ...]

    def embed(self) -> None:
        """The first pass."""
        embedded: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for batch, seed in zip(self._batches, self._seeds, strict=True):
                torch.manual_seed(seed)
                embedded.append(self._forward("embed", batch))
        self._embeddings = tuple(torch.cat(parts).requires_grad_() for parts in zip(*embedded, strict=True))

    def losses(self) -> Losses:
        """The losses over all micro batches; the backward pass of their total reaches the embeddings, and the
        parameters of the loss itself.
        """
        weight = torch.cat([batch.weight for batch in self._batches])
        losses: Losses = self._forward("contrast", (self._embeddings, weight))
        return losses

    def surrogates(self) -> Iterator[Tensor]:
        """The second pass: for each micro batch a scalar whose backward pass gives the parameters the gradients of the
        loss through this micro batch's embeddings. Run it before taking the next one.
        """
        start = 0
        for batch, seed in zip(self._batches, self._seeds, strict=True):
            torch.manual_seed(seed)
            stop = start + len(batch)
            products = [
                (embedding.float() * _gradient(cached)[start:stop].float()).sum()
                for embedding, cached in zip(self._forward("embed", batch), self._embeddings, strict=True)
            ]
            yield torch.stack(products).sum()
            start = stop


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "the backward pass of the loss comes first"
    return leaf.grad
