"""Where runs stand: state, figures, attempts and valid checkpoints, read from their directories."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.errors import UserError
from pipeline.run_dir import RunDir
from pipeline.train.checkpoints.listing import CheckpointListing, list_checkpoints

SILENT_S = 600.0  # without a status from a run that says it is running


class RunDescription(NamedTuple):
    """A run directory's content."""

    url: str
    status: dict[str, Any]  # of status.json, with the state of `state_of`
    figures: dict[str, float]  # of the last evaluation
    checkpoints: CheckpointListing

    def document(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "run": self.url,
            "status": self.status,
            "figures": self.figures,
            "checkpoints": self.checkpoints.document(),
        }


class RunSummary(NamedTuple):
    """A run among others."""

    name: str
    status: dict[str, Any]  # of status.json, with the state of `state_of`
    resumable_step: int | None  # of the newest valid checkpoint

    def document(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"name": self.name, **self.status, "resumable_step": self.resumable_step}


def is_run_directory(url: str) -> bool:
    """Whether a run has been started there."""
    return storage.exists(storage.join(url, "status.json"))


def describe_run(url: str, *, verify: bool = False) -> RunDescription:
    """State, figures, attempts and checkpoints of a run directory.

    Args:
        verify: read every checkpoint and compare hashes, instead of looking at presence and sizes only.
    """
    status = _status(url)
    return RunDescription(url, status, figures_of(url), list_checkpoints(_checkpoints_of(url, status), verify=verify))


def list_runs(folder: str) -> list[RunSummary]:
    """Every run directory in a folder, by name."""
    runs = []
    for name in _names_of_runs(folder):
        url = storage.join(folder, name)
        status = _status(url)
        checkpoints = list_checkpoints(_checkpoints_of(url, status)).checkpoints
        runs.append(RunSummary(name, status, checkpoints[0].step if checkpoints else None))
    return runs


def state_of(status: Mapping[str, Any]) -> str:
    """A run's state; "silent" for one that says it is running and hasn't written its status for `SILENT_S`."""
    state = str(status.get("state", "?"))
    age_s = time.time() - float(status.get("updated") or 0)
    return "silent" if state == "running" and age_s > SILENT_S else state


def figures_of(run_url: str) -> dict[str, float]:
    """The figures of the run's last evaluation, by name; {} before there is one."""
    try:
        metrics = RunDir(run_url).metrics()
    except (FileNotFoundError, UserError):
        return {}
    measured: list[dict[str, Any]] = [line for line in metrics if line.get("kind") == "evaluate"]
    return dict(measured[-1]["figures"]) if measured else {}


def _status(url: str) -> dict[str, Any]:
    status = RunDir(url).status()
    return {**status, "state": state_of(status)}


def _checkpoints_of(url: str, status: Mapping[str, Any]) -> str:
    return str(status.get("checkpoints") or RunDir(url).checkpoints_url)


def _names_of_runs(folder: str) -> list[str]:
    if not storage.is_remote(folder):
        return sorted(path.parent.name for path in Path(folder).glob("*/status.json"))
    start = len(folder.rstrip("/")) + 1
    names = (entry.url[start:] for entry in storage.entries(folder) if entry.url.endswith("/status.json"))
    return sorted(name.removesuffix("/status.json") for name in names if name.count("/") == 1)
