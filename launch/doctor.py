"""What this machine offers, found out by trying."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from launch.s3_server import find_rclone
from launch.worker import set_defaults
from pipeline import storage
from pipeline.errors import StorageError, UserError
from pipeline.machine import available_cores

_PACKAGES = ("torch", "torchvision", "deepspeed", "ray", "open_clip_torch", "s3fs", "timm")


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    finding: str
    good: bool = True


def examine(places: Sequence[str]) -> list[Finding]:
    """Look at cores, memory, disk, accelerators, packages, Ray, rclone, and try to list each of `places`."""
    set_defaults()
    findings = [
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("cores", f"{available_cores()} usable of {os.cpu_count()}"),
        _memory(),
        _disk(),
        _packages(),
        *_compute(),
        _jpeg(),
        _rclone(),
        _ray(),
        *_surroundings(),
    ]
    return [*findings, *(_place(place) for place in places)]


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    return Finding("memory", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    return Finding("disk", f"{free / 2**30:.1f} GiB free in this folder", good=free > 2**30)


def _packages() -> Finding:
    versions, missing = [], []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding("packages", f"missing: {', '.join(missing)}; install requirements.lock", good=False)
    return Finding("packages", ", ".join(versions))


def _compute() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("torch", f"can't be imported ({error})", good=False)]
    from pipeline.train.resolve import multiplies_bf16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    precision = "bf16" if multiplies_bf16(device) else "fp32 (no hardware for bf16 products)"
    return [
        Finding("gpus", ", ".join(names) or "none: everything runs on the cores"),
        Finding("precision", f"auto means {precision}"),
    ]


def _jpeg() -> Finding:
    from pipeline.data.images import turbojpeg

    library = turbojpeg.find()
    if library is None:
        return Finding(
            "jpeg", "no TurboJPEG 3: crops are cut from whole images, which takes a fifth more of the workers"
        )
    return Finding("jpeg", f"decoded no further than the crop, by {Path(library.path).name}")


def _rclone() -> Finding:
    binary = find_rclone()
    if binary is None:
        return Finding("rclone", "not found: the demo will use a plain folder instead of an S3 server")
    version = subprocess.run([str(binary), "version"], capture_output=True, text=True, check=False, timeout=30)
    return Finding("rclone", version.stdout.partition("\n")[0] or version.stderr.strip(), good=version.returncode == 0)


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Finding("ray", "RAY_ADDRESS isn't set: commands start one of their own")
    from pipeline import ray_cluster as cluster

    try:
        joined = cluster.connect(address)
    except UserError as error:
        return Finding("ray", str(error), good=False)
    try:
        return Finding("ray", f"{joined.address}: {joined.num_cpus} cores, {joined.num_gpus} GPUs")
    finally:
        cluster.disconnect()


def _surroundings() -> list[Finding]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    own_files = [Path.home() / ".aws" / name for name in ("credentials", "config")]
    if "AWS_ACCESS_KEY_ID" in os.environ:
        credentials = "from the environment"
    elif "AWS_PROFILE" in os.environ or any(path.is_file() for path in own_files):
        credentials = "from a profile"
    else:
        credentials = "none set (an instance role may still give some)"
    return [Finding("s3", f"endpoint {endpoint or 'AWS'}, credentials {credentials}")]


def _place(place: str) -> Finding:
    """Try to list a folder or prefix."""
    try:
        first = next(iter(storage.entries(place)), None)
    except StorageError as error:
        return Finding("storage", str(error), good=False)
    return Finding("storage", f"{place}: {'can be listed' if first else 'nothing there yet'}")
