"""Starting DeepSpeed: its import, the process group and its configuration. The only file that imports deepspeed."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from pipeline import ranks
from pipeline.machine import free_port
from pipeline.stages.base import Stage
from pipeline.train.config import OptimConfig
from pipeline.train.optim import ParamGroup

BUCKET_ELEMENTS = 50_000_000  # of a reduction; DeepSpeed's default of 5e8 allocates 2 GB at once


def join_group() -> None:
    """Enter the process group described by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without these variables, a
    group of this process alone.
    """
    deepspeed = _import_deepspeed()
    if ranks.device().type == "cuda":
        torch.cuda.set_device(ranks.device())
    if not dist.is_initialized():
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
            os.environ.setdefault(name, value)
        if "MASTER_PORT" not in os.environ and os.environ["WORLD_SIZE"] == "1":
            # With a fixed port two such processes on one machine would collide.
            os.environ["MASTER_PORT"] = str(free_port(os.environ["MASTER_ADDR"]))
    with _quiet():
        deepspeed.init_distributed(verbose=False)


def initialize(stage: Stage, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """A `deepspeed.DeepSpeedEngine` over the stage."""
    deepspeed = _import_deepspeed()
    with _quiet():
        engine, *_ = deepspeed.initialize(model=stage, optimizer=optimizer, config=settings)
    return engine


def settings_for(
    groups: Sequence[ParamGroup], optim: OptimConfig, *, zero_stage: int, precision: Literal["bf16", "fp32"]
) -> dict[str, Any]:
    """DeepSpeed's configuration: no accumulation, schedule or loss scaling of its own."""
    num_elements = sum(parameter.numel() for group in groups for parameter in group["params"])
    on_gpu = ranks.device().type == "cuda"
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: we call step() ourselves
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.clip_grad,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": on_gpu and zero_stage >= 2,
            "reduce_bucket_size": min(BUCKET_ELEMENTS, num_elements),
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": min(100_000, num_elements // 1000),
            "stage3_prefetch_bucket_size": min(BUCKET_ELEMENTS, num_elements),
        },
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True}
        if zero_stage >= 2:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _import_deepspeed() -> Any:
    """DeepSpeed, without the shared-memory operation that it would compile for a minute on a CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _quiet():
        import deepspeed
        import deepspeed.ops

        if ranks.device().type == "cpu":
            deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the hundreds of lines that DeepSpeed logs at INFO, and its warning of optimizers it hasn't tested."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(max(level, logging.WARNING))
