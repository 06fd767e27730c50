"""The run directory: everything that a training run writes, at a local path or an `s3://` URL.

    config.yaml resolved.yaml command.txt environment.json status.json
    metrics.jsonl                 local: one JSON object a line, appended
    metrics/NNNNNN-NNNNNN.jsonl   s3: numbered chunks per attempt, since objects can't be appended to
    evaluations/step-%09d.json    {"figures": {...}, "details": {...}}
    pictures/step-%09d/           pictures.json and the panels it names
    checkpoints/ tensorboard/ logs/

Secrets never enter it. Readers see whole files only.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline import storage
from pipeline.config import Document
from pipeline.errors import StorageError
from pipeline.machine import available_cores

PACKAGES = ("vitrail", "torch", "torchvision", "deepspeed", "ray", "open_clip_torch", "timm", "safetensors")
TYPED_COMMAND = "VITRAIL_COMMAND"  # environment variable in which `vitrail` keeps the command line as typed
CHUNK_LINES = 200
CHUNK_SECONDS = 30.0


class RunDir:
    """One run's directory. Only rank 0 writes."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.attempt: int | None = None  # this process's, once it has begun
        self._pending: list[str] = []
        self._chunk: tuple[int, int] | None = None  # attempt and number of the next chunk, once known
        self._flushed_at = time.monotonic()

    def at(self, *parts: str) -> str:
        """Path or URL of something in the directory."""
        return storage.join(self.url, *parts)

    @property
    def checkpoints_url(self) -> str:
        """The checkpoints folder, unless the configuration names another."""
        return self.at("checkpoints")

    def prepare(self, config: Document, resolved: Mapping[str, Any] | None = None, command: Sequence[str] = ()) -> None:
        """Make the directory ready for an attempt at the run `config` describes."""
        storage.write(self.at("config.yaml"), yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
        if resolved is not None:
            storage.write(self.at("resolved.yaml"), yaml.safe_dump(dict(resolved), sort_keys=False).encode())
        if command:
            storage.write(self.at("command.txt"), (shlex.join(command) + "\n").encode())
        storage.write(self.at("environment.json"), _json(environment()))

    def config(self) -> Document | None:
        """The configuration of the run here; None when there is none."""
        text = _read(self.at("config.yaml"))
        if text is None:
            return None
        document = yaml.safe_load(text)
        return document if isinstance(document, dict) else None

    def resolved(self) -> dict[str, Any]:
        """Derived values of the last attempt, for people."""
        text = _read(self.at("resolved.yaml"))
        return dict(yaml.safe_load(text) or {}) if text is not None else {}

    def environment(self) -> dict[str, Any]:
        """Versions and machine of the last attempt."""
        return _object(_read(self.at("environment.json")))

    def status(self) -> dict[str, Any]:
        """The state as last written; {} for a directory that holds no run."""
        return _object(_read(self.at("status.json")))

    def write_status(self, **changes: Any) -> None:
        """Merge `changes` into status.json, and set `updated`; without effect once a later attempt has written it."""
        before = self.status()
        if self.attempt is None or int(before.get("attempt") or 0) <= self.attempt:
            storage.write(self.at("status.json"), _json({**before, **changes, "updated": time.time()}))

    def append_metrics(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add metric lines of this attempt (each with `kind`, `attempt`, `step`).

        Locally they are in the file when this returns. With s3:// they are collected until they make a chunk;
        `flush_metrics` uploads the rest.
        """
        texts = [json.dumps(line, separators=(",", ":"), allow_nan=True) for line in lines]
        if not texts:
            return
        if storage.is_remote(self.url):
            self._pending += texts
            waited = time.monotonic() - self._flushed_at
            if len(self._pending) >= CHUNK_LINES or waited >= CHUNK_SECONDS:
                self.flush_metrics()
            return
        path = Path(self.at("metrics.jsonl"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                torn = file.tell() > 0 and not _ends_line(path)
                file.write(b"\n" * torn + "".join(f"{text}\n" for text in texts).encode())
        except OSError as error:
            raise StorageError(
                f"can't be written ({error})", where=str(path), fix="free space or correct the permissions"
            ) from error

    def flush_metrics(self) -> None:
        """Upload the lines that don't make a chunk yet."""
        self._flushed_at = time.monotonic()
        if not self._pending:
            return
        attempt = int(json.loads(self._pending[0])["attempt"])
        number = self._chunk[1] if self._chunk is not None and self._chunk[0] == attempt else 0
        text = "".join(f"{line}\n" for line in self._pending).encode()
        storage.write(self.at("metrics", f"{attempt:06d}-{number:06d}.jsonl"), text)
        self._chunk = (attempt, number + 1)
        self._pending = []

    def metrics(self) -> list[dict[str, Any]]:
        """Metric lines of the run, in order of steps.

        An attempt that died may have logged steps beyond the checkpoint that the next attempt resumed from; these lines
        are dropped, since the next attempt repeated the steps. A line cut off by a crash is dropped too.
        """
        lines: list[dict[str, Any]] = []
        resumed = self.resumed_steps()
        for line in self._all_lines():
            later = [step for attempt, step in resumed.items() if attempt > line.get("attempt", 0)]
            if not later or line.get("step", 0) <= min(later):
                lines.append(line)
        order = {"train": 0, "evaluate": 1}
        return sorted(lines, key=lambda x: (x.get("step", 0), order.get(x.get("kind", ""), 2), x.get("attempt", 0)))

    def resumed_steps(self) -> dict[int, int]:
        """The step each attempt resumed from, by attempt number (0: from the start)."""
        return {
            int(line["attempt"]): int(line["resumed_step"])
            for line in self._all_lines()
            if line.get("kind") == "attempt"
        }

    def write_evaluation(self, step: int, figures: Mapping[str, float], details: Mapping[str, Any]) -> None:
        """Save the results of an evaluation."""
        storage.write(
            self.at("evaluations", f"step-{step:09d}.json"), _json({"figures": dict(figures), "details": dict(details)})
        )

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Every saved evaluation by step: {"figures", "details"}."""
        evaluations = {}
        for entry in storage.entries(self.at("evaluations")):
            match = re.search(r"step-(\d+)\.json$", entry.url)
            if match:
                evaluations[int(match[1])] = _object(storage.read(entry.url))
        return evaluations

    def write_pictures(self, step: int, pictures: Sequence[tuple[str, Sequence[tuple[str, bytes]]]]) -> None:
        """Save pictures as (title, panels), a panel being (caption, PNG bytes); the list of them is written last."""
        folder = self.at("pictures", f"step-{step:09d}")
        table = []
        for number, (title, panels) in enumerate(pictures):
            rows = []
            for k, (caption, png) in enumerate(panels):
                name = f"{number:02d}-{_slug(title)}/{k}-{_slug(caption)}.png"
                storage.write(storage.join(folder, name), png)
                rows.append({"caption": caption, "file": name})
            table.append({"title": title, "panels": rows})
        storage.write(storage.join(folder, "pictures.json"), _json(table))

    def pictures(self) -> dict[int, list[dict[str, Any]]]:
        """Saved pictures by step; each panel's `file` is a full path or URL."""
        pictures = {}
        for entry in storage.entries(self.at("pictures")):
            match = re.search(r"step-(\d+)/pictures\.json$", entry.url)
            if not match:
                continue
            folder = entry.url.removesuffix("/pictures.json")
            table = json.loads(storage.read(entry.url))
            for picture in table:
                for panel in picture["panels"]:
                    panel["file"] = storage.join(folder, panel["file"])
            pictures[int(match[1])] = table
        return pictures

    def _all_lines(self) -> list[dict[str, Any]]:
        texts = []
        if storage.is_remote(self.url):
            texts = [storage.read(e.url) for e in storage.entries(self.at("metrics")) if e.url.endswith(".jsonl")]
        else:
            text = _read(self.at("metrics.jsonl"))
            texts = [] if text is None else [text]
        lines = []
        for text in texts:
            for row in text.splitlines():
                with contextlib.suppress(ValueError):  # cut off by a crash
                    line = json.loads(row)
                    if isinstance(line, dict):
                        lines.append(line)
        return lines + [json.loads(pending) for pending in self._pending]


def environment() -> dict[str, Any]:
    """Versions and machine; no user names, environment variables or secrets."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "packages": versions,
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": available_cores(),
        "git": _git_revision(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _git_revision() -> str | None:
    """Revision of the source tree that is running, with `+` when it has changes; None outside a repository."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def command_line() -> list[str]:
    """The command line as typed, which `vitrail` passes on to the ranks; else that of this process."""
    typed = os.environ.get(TYPED_COMMAND)
    return shlex.split(typed) if typed else [Path(sys.argv[0]).name, *sys.argv[1:]]


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "x"


def _read(url: str) -> bytes | None:
    try:
        return storage.read(url)
    except FileNotFoundError:
        return None


def _object(text: bytes | None) -> dict[str, Any]:
    if text is None:
        return {}
    with contextlib.suppress(ValueError):
        document = json.loads(text)
        if isinstance(document, dict):
            return document
    return {}


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n").encode()
