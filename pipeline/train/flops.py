"""What training costs in floating-point operations, by which runs of different kinds are compared fairly.

A multiplication and an addition count as two, as usual (Kaplan et al. 2020); what isn't a matrix product (norms,
softmax, the optimizer) isn't counted. torch's own counter looks at every product of one forward and backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data.batch import Batch
from pipeline.stages.base import Stage


def flops_per_sample(stage: Stage, batch: Batch) -> float:
    """Forward and backward of the stage's loss on one process, by sample. The stage is left in bf16.

    Args:
        batch: a few typical samples; its position decides what schedules say, its captions' lengths what texts cost.
    """
    stage.to(torch.bfloat16)  # on a CPU attention is written out then, in products that the counter knows
    stage.train()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(stage.loss(batch).total)
    stage.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / len(batch)


def flops_of_run(build: Callable[[], Stage], batch: Batch, length_samples: int) -> float:
    """All of a run's training, schedules by samples seen included.

    Args:
        build: makes the stage.
        batch: typical samples.
        length_samples: of the run.
    """
    stage = build()
    changes = sorted({0, *stage.schedule_changes})
    ends = [*changes[1:], length_samples]
    total = 0.0
    for start, end in zip(changes, ends, strict=True):
        if start < length_samples:
            each = flops_per_sample(stage, dataclasses.replace(batch, position=start))
            total += each * (min(end, length_samples) - start)
    return total
