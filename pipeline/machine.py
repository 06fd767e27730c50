"""What this machine grants the process: cores, GPUs, a free port. Nothing heavy is imported."""

from __future__ import annotations

import glob
import os
import socket
from typing import NamedTuple


class Machine(NamedTuple):
    """A machine, of a cluster or this one, and what it offers."""

    id: str
    resources: dict[str, float]  # by Ray's names: CPU, GPU
    address: str = ""


def this_machine() -> Machine:
    """What this machine grants the process."""
    return Machine("", {"CPU": float(available_cores()), "GPU": float(num_gpus())}, "127.0.0.1")


def available_cores() -> int:
    """Cores this process may use: its CPU affinity where the system has that."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def has_gpu() -> bool:
    """Whether there is an NVIDIA device that this process may use, without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def num_gpus() -> int:
    """GPUs that torch sees; torch is imported only where there is a device at all."""
    if not has_gpu():
        return 0
    import torch

    return max(1, torch.cuda.device_count())


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on at `host` ("" for all interfaces); another process may take it before you."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
