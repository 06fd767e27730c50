"""A chain small enough for a test, with real images, real training and the real command."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = {"width": 32, "depth": 1, "heads": 2, "image_size": 32, "patch_size": 8}


def write_table(folder: Path, num_images: int = 48) -> Path:
    """Images of noise around a colour, with captions and labels, and a table of them."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    rows = []
    for number in range(num_images):
        label = number % 3
        pixels = draw.integers(0, 80, (40, 32, 3)) + np.eye(3)[label] * 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")
        rows.append({"url": f"{number:03d}.png", "caption": f"noise that is {['red', 'green', 'blue'][label]}"})
    table = folder / "pairs.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["url", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    return table


def prep_config(table: Path | str, **settings: Any) -> dict[str, Any]:
    return {
        "source": {"url": str(table)},
        "splits": {"shares": {"train": 0.75, "heldout": 0.25}, "by": "url"},
        "ray": {"tasks": 0},
        **settings,
    }


def mae_config(num_steps: int, **settings: Any) -> dict[str, Any]:
    return {
        "stage": "mae",
        "options": {"model": MODEL, "decoder": {"width": 32, "depth": 1, "heads": 2}},
        "data": {
            "train": "@pairs/train",
            "evaluate": {"heldout": "@pairs/heldout"},
            "global_batch": 16,
            "lanes": 2,
            "loader_workers": 0,
            "evaluate_batch": 16,
        },
        "length_samples": 16 * num_steps,
        "optim": {"lr": 1e-3},
        "engine": {"zero_stage": 2, "precision": "fp32"},
        "checkpoint": {"every_samples": 16 * 5},
        **settings,
    }


def write_chain(folder: Path, steps: dict[str, Any]) -> Path:
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({"steps": steps}, sort_keys=False))
    return path


class Command:
    """One `vitrail` command of its own process, its stderr kept in a file."""

    def __init__(self, *arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> None:
        self.log = cwd / f"stderr-{time.monotonic_ns()}.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch", *arguments],
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def finish(self, timeout_s: float = 240) -> tuple[int, dict[str, Any]]:
        """Exit code, and the JSON object that came last on stdout ({} without --json)."""
        out, _ = self.process.communicate(timeout=timeout_s)
        last = out.strip().splitlines()[-1:] or ["{}"]
        return self.process.returncode, json.loads(last[0]) if last[0].startswith("{") else {}

    def descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def worker(self, rank: int) -> psutil.Process:
        """The training process of a rank, once it is there."""
        return wait_for(lambda: self._worker(rank), f"rank {rank}")

    def _worker(self, rank: int) -> psutil.Process | None:
        for process in self.descendants():
            try:
                if "launch.worker" in process.cmdline() and process.environ().get("RANK") == str(rank):
                    return process
            except psutil.Error:
                continue
        return None

    def kill_everything(self) -> None:
        """Clean-up after a test, whatever happened in it."""
        for process in [*self.descendants(), psutil.Process()]:
            if process.pid != os.getpid():
                try:
                    process.kill()
                except psutil.Error:
                    continue
        self.process.kill()
        self.process.wait()


def wait_for(probe: Callable[[], Any], what: str, timeout_s: float = 200) -> Any:
    """The first answer of `probe` that isn't false."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := probe():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout_s} s in vain for {what}")


def commits(checkpoints: Path) -> list[int]:
    """Steps with a complete checkpoint."""
    return sorted(int(path.parts[-3].removeprefix("step-")) for path in checkpoints.glob("step-*/*/commit.json"))


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs any more (a zombie doesn't)."""
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            continue
    return True


SIGKILL = signal.SIGKILL
SIGTERM = signal.SIGTERM
