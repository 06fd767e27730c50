"""The values derived from a configuration and the machine: printed and saved, never read back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pipeline.errors import ConfigError
from pipeline.ranks import World
from pipeline.train.config import TrainConfig
from pipeline.train.optim import peak_rate


class Resolved(NamedTuple):
    """Derived values of one run."""

    world_size: int
    device: str
    zero_stage: int
    precision: Literal["bf16", "fp32"]
    global_batch: int
    rank_batch: int  # samples per rank and step
    micro_batch: int  # samples per rank and forward
    num_micro: int
    peak_lr: float
    length_samples: int
    num_steps: int
    warmup_steps: int

    def document(self) -> dict[str, Any]:
        """As written to resolved.yaml."""
        return self._asdict()

    def lines(self) -> list[str]:
        """For the log."""
        return [
            f"{self.world_size} rank(s) on {self.device}, ZeRO stage {self.zero_stage}, {self.precision}",
            f"global batch {self.global_batch} = {self.world_size} ranks x {self.num_micro} x {self.micro_batch}",
            f"{self.length_samples} samples = {self.num_steps} steps, {self.warmup_steps} of them warm-up; "
            f"peak learning rate {self.peak_lr:.3g}",
        ]


def resolve(config: TrainConfig, world: World, device: torch.device) -> Resolved:
    """Derive what the configuration leaves to the machine.

    Raises:
        ConfigError: the world size doesn't divide the global batch, or ZeRO would partition an optimizer that can't be
            partitioned.
    """
    batch = config.data.global_batch
    if batch % world.size:
        sizes = [n for n in range(1, min(batch, 4 * world.size) + 1) if batch % n == 0]
        raise ConfigError(
            f"a global batch of {batch} can't be shared equally by {world.size} ranks",
            where="data.global_batch",
            fix=f"run with one of {', '.join(map(str, sizes))} ranks, or change the global batch",
        )
    rank_batch = batch // world.size
    bound = config.engine.micro_batch or rank_batch
    micro_batch = max(n for n in range(1, min(bound, rank_batch) + 1) if rank_batch % n == 0)
    if config.optim.name == "lars" and config.engine.zero_stage > 0:
        raise ConfigError(
            "LARS needs whole parameters for its trust ratio, and ZeRO partitions them",
            where="engine.zero_stage",
            fix="set engine.zero_stage=0 with optim.name=lars",
        )
    precision = config.engine.precision
    return Resolved(
        world_size=world.size,
        device=device.type,
        zero_stage=config.engine.zero_stage,
        precision=("bf16" if multiplies_bf16(device) else "fp32") if precision == "auto" else precision,
        global_batch=batch,
        rank_batch=rank_batch,
        micro_batch=micro_batch,
        num_micro=rank_batch // micro_batch,
        peak_lr=peak_rate(config.optim, batch),
        length_samples=config.length_samples,
        num_steps=math.ceil(config.length_samples / batch),
        warmup_steps=math.ceil(config.optim.warmup_samples / batch),
    )


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices faster than fp32 ones (AMX or AVX-512 BF16 on a CPU)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return bool(flags & {"amx_bf16", "avx512_bf16"})
