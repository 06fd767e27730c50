"""What status.json says of a run as an attempt begins."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from pipeline.train.engine.base import TensorFacts
from pipeline.train.resume import Start
from pipeline.train.setup import RunSetup


def status_at_start(
    setup: RunSetup, start: Start, facts: Mapping[str, TensorFacts], attempt_hint: str | None
) -> dict[str, Any]:
    """The entries of status.json that an attempt sets; rank 0 alone needs them.

    Args:
        facts: of all tensors of the model.
        attempt_hint: the launcher's name for this start.
    """
    sizes = [torch.Size(tensor.shape).numel() for tensor in facts.values() if tensor.kind != "buffer"]
    return {
        "state": "running",
        "stage": setup.config.stage,
        "step": start.state.step,
        "samples": start.state.samples,
        "length_samples": setup.config.length_samples,
        "attempt": None if start.attempt is None else start.attempt.number,
        "attempt_hint": attempt_hint,
        "started": setup.run_dir.status().get("started", time.time()),
        "resumed_from": start.origin,
        "checkpoints": setup.checkpoints_url,
        "message": "",
        "world_size": setup.resolved.world_size,
        "zero_stage": setup.resolved.zero_stage,
        "precision": setup.resolved.precision,
        "num_parameters": sum(sizes),
    }
