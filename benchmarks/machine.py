"""What a measurement was taken on: processor, memory, accelerators, versions, source revision."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
# Instruction sets that decide how fast matrix products and image codecs are.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
PACKAGES = ("torch", "torchvision", "deepspeed", "ray", "open_clip_torch", "webdataset", "timm", "transformers",
            "numpy", "pillow", "simplejpeg", "pyarrow", "fsspec", "s3fs", "safetensors", "vitrail")  # fmt: skip


def machine() -> dict[str, Any]:
    """Facts about this computer; nothing that identifies it or its user."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_field("model name") or platform.processor() or "unknown",
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in (_cpu_field("flags") or "").split()],
        "logical_cores": psutil.cpu_count(),
        "usable_cores": affinity,
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": round(psutil.getloadavg()[0], 2),
        "gpus": _gpus(),
    }


def versions(also: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of Python and of the packages that matter, those that are installed."""
    known = {"python": platform.python_version()}
    for name in (*PACKAGES, *also):
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return known


def revision() -> dict[str, Any] | None:
    """The source's git revision and whether files differ from it; None outside a repository or before a commit."""
    try:
        head = _git("rev-parse", "HEAD")
        return {"revision": head, "modified": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu_field(name: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
