"""What a chain remembers of its steps: one JSON file for each, under `<work>/steps/`, written after its output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from launch.workers.attempts import JobFailedError, error_document
from pipeline import storage
from pipeline.errors import UserError


class ChainStepResult(NamedTuple):
    """What became of one step."""

    name: str
    state: Literal["done", "skipped", "stopped", "failed", "not started"]
    output: str
    seconds: float = 0.0
    summary: dict[str, Any] = {}
    error: UserError | JobFailedError | None = None


class StepRecord(NamedTuple):
    """The record of a step that was begun or finished; its fields are the file's keys."""

    state: Literal["started", "done"]
    fingerprint: str
    output: str
    seconds: float = 0.0
    summary: dict[str, Any] = {}


class StepRecords:
    """The records in a chain's work folder, beside the steps' logs."""

    def __init__(self, work: Path) -> None:
        former = work / "nodes"  # as version 0.1.0 called it; a chain that was begun there goes on there
        self.folder = former if former.is_dir() else work / "steps"

    def log(self, name: str) -> Path:
        """Where a step's output is kept."""
        return self.folder / f"{name}.log"

    def read(self, name: str) -> StepRecord | None:
        """The step's record; None where it was never begun."""
        try:
            return StepRecord(**json.loads(self._path(name).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def write(self, name: str, record: StepRecord) -> None:
        """Replace the step's record, at once and durably."""
        storage.write(str(self._path(name)), json.dumps(record._asdict(), indent=1).encode())

    def delete(self, name: str) -> None:
        """Forget the step."""
        self._path(name).unlink(missing_ok=True)

    def state_of(self, name: str) -> Literal["new", "begun", "finished"]:
        """How far the step has come, by its record."""
        record = self.read(name)
        if record is None:
            return "new"
        return "finished" if record.state == "done" else "begun"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def exit_code(results: Mapping[str, ChainStepResult]) -> int:
    """Of the command that ran a chain: 0 done, 2 a user's error, 75 stopped, 1 anything else."""
    errors = [result.error for result in results.values() if result.state == "failed"]
    if errors:
        return 2 if all(isinstance(error, UserError) for error in errors) else 1
    return 75 if any(result.state in ("stopped", "not started") for result in results.values()) else 0


def results_document(results: Mapping[str, ChainStepResult]) -> dict[str, Any]:
    """The results as JSON."""
    document = {}
    for name, result in results.items():
        document[name] = {**result._asdict(), "error": None}
        if isinstance(result.error, UserError):
            document[name]["error"] = error_document(result.error)
        elif result.error is not None:
            document[name]["error"] = str(result.error)
    return document


def delete_tree(url: str) -> None:
    """Delete a file or a folder, or everything under an s3:// prefix."""
    if not storage.is_remote(url):
        if Path(url).is_file():
            Path(url).unlink()
        shutil.rmtree(url, ignore_errors=True)
        return
    try:
        for entry in list(storage.entries(url)):
            storage.delete(entry.url)
    except FileNotFoundError:
        pass
