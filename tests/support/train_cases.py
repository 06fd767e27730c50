"""A small MAE run: its data, its configuration, and how to start it."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.unit.data.conftest import numbered, write_data_set

REPOSITORY = Path(__file__).resolve().parents[2]


def write_data(folder: Path) -> None:
    """Training samples in two shards, and a small evaluation set."""
    write_data_set(str(folder / "train"), numbered([40, 24]))
    write_data_set(str(folder / "heldout"), numbered([10]))


def document(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Configuration of run `name` under `folder`; `changes` as {"a.b": value}."""
    made: dict[str, Any] = {
        "name": name,
        "stage": "mae",
        "options": {
            "model": {"width": 16, "depth": 2, "heads": 2, "image_size": 16, "patch_size": 8, "drop_path": 0.2},
            "decoder": {"width": 16, "depth": 1, "heads": 2},
            "mask_ratio": 0.5,
        },
        "data": {
            "train": str(folder / "train"),
            "evaluate": {"heldout": str(folder / "heldout")},
            "global_batch": 16,
            "loader_workers": 0,
            "block": 8,
            "lanes": 4,
            "window": 16,
            "evaluate_batch": 4,
        },
        "length_samples": 320,
        "optim": {"lr": 1e-3, "warmup_samples": 64, "weight_decay": 0.05},
        "engine": {"zero_stage": 2, "precision": "fp32"},
        "checkpoint": {"every_samples": 64},
        "runs": str(folder / "runs"),
    }
    made = copy.deepcopy(made)
    for key, value in changes.items():
        at = made
        *path, last = key.split(".")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return made


def start_workers(config: dict[str, Any], folder: Path, num_ranks: int) -> list[subprocess.Popen[bytes]]:
    """One `launch.worker` process per rank, as torchrun starts them; output goes to files beside the config."""
    path = folder / f"{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(num_ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
        environment = {**os.environ, **{key: str(value) for key, value in {**place, **settings}.items()}}
        environment["PYTHONPATH"] = str(REPOSITORY)
        with (folder / f"{config['name']}.rank{rank}.log").open("ab") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "launch.worker", str(path)],
                    cwd=folder,
                    env=environment,
                    stdout=output,
                    stderr=output,
                )
            )
    return processes


def wait(processes: list[subprocess.Popen[bytes]], timeout_s: float = 240) -> list[int]:
    """Exit codes; kills what doesn't end in time."""
    try:
        return [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
