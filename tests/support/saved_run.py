"""A run's checkpoint, written by a process of its own as training does."""

from __future__ import annotations

import multiprocessing

from torch import Tensor

from pipeline.train.checkpoints.commits import begin_attempt
from pipeline.train.checkpoints.saving import CheckpointWriter
from pipeline.train.engine.base import Fragment, TensorFacts


def save_checkpoint(url: str, state: dict[str, Tensor]) -> None:
    """Commit these weights at step 3 of the checkpoints folder `url`, without telling anything of the run."""
    process = multiprocessing.get_context("spawn").Process(target=_save, args=(url, state))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def _save(url: str, state: dict[str, Tensor]) -> None:
    attempt = begin_attempt(url, 0, enforced=True)
    assert attempt is not None
    fragments = [Fragment(name, 0, v.numel(), {"value": v.reshape(-1)}, {}) for name, v in state.items()]
    facts = {name: TensorFacts(tuple(v.shape), "parameter", str(v.dtype)) for name, v in state.items()}
    checkpoints = CheckpointWriter(url, attempt, keep_last=1, keep_every_samples=None, info={})
    checkpoints.finish(3, fragments, facts, {})
    checkpoints.close()
