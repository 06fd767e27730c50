"""The losses of a step over all ranks, and the samples a bad one may come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pipeline import ranks
from pipeline.data.batch import Batch
from pipeline.stages.base import Losses


class GlobalLosses(NamedTuple):
    """Losses of one global batch; the same on every rank."""

    mean: float  # of the total, by the samples' weights
    parts: dict[str, float]  # means too
    any_bad: bool  # some rank's loss isn't finite
    stop: bool  # some rank was asked to stop


def over_all_ranks(losses: Sequence[Losses], weight: float, *, bad: bool, stop: bool) -> GlobalLosses:
    """Sum this rank's losses, then those of all ranks, in one reduction. Collective.

    Args:
        losses: of this rank's micro batches, sums over samples; all ranks' have the same parts.
        weight: of the global batch's samples, in sum.
        bad: whether one of this rank's losses isn't finite.
        stop: whether this rank was asked to stop.
    """
    names = sorted({name for micro in losses for name in micro.parts})
    sums = [torch.stack([micro.total.detach().double() for micro in losses]).sum()]
    sums += [torch.stack([micro.parts[name].detach().double() for micro in losses]).sum() for name in names]
    votes = [torch.tensor(float(vote), dtype=torch.float64, device=sums[0].device) for vote in (bad, stop)]
    total, *parts, num_bad, num_stop = ranks.sum_over_ranks(torch.stack([*sums, *votes])).tolist()
    means = {name: part / weight for name, part in zip(names, parts, strict=True)}
    return GlobalLosses(total / weight, means, num_bad > 0, num_stop > 0)


def present_ids(batches: Sequence[Batch]) -> tuple[int, ...]:
    """Ids of the samples present in these batches of all ranks, sorted. Collective."""
    present = [
        int(sample_id)
        for batch in batches
        for sample_id, weight in zip(batch.ids.tolist(), batch.weight.tolist(), strict=True)
        if weight > 0
    ]
    return tuple(sorted({sample_id for of_rank in ranks.gather(present) for sample_id in of_rank}))


def total_weight(batches: Sequence[Batch]) -> float:
    """Sum of the weights of the samples in these batches of all ranks. Collective."""
    return float(ranks.sum_over_ranks(torch.cat([batch.weight.double() for batch in batches]).sum()))
