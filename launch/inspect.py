"""Looking at what is there: runs, data sets, reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.progress import figures_of
from launch.replies import Reply
from pipeline import config as configs
from pipeline import storage
from pipeline.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from pipeline.errors import DataError
from pipeline.run_dir import RunDir

SILENT_S = 600.0  # without news from a run that says it is running


def describe(place: str, *, verify: bool = False, num_samples: int = 0) -> Reply:
    """State, figures, attempts and checkpoints of a run directory, or counts and some samples of a data set (or of each
    of its splits).

    Args:
        verify: read every checkpoint and compare hashes, instead of looking at presence and sizes only.

    Raises:
        DataError: it is neither.
    """
    if storage.exists(storage.join(place, "status.json")):
        return _describe_run(place, verify=verify)
    manifests = splits_of(place)
    if not manifests:
        raise DataError(
            "neither a run directory (status.json) nor a data set (manifest.json)",
            where=place,
            fix="check the path; `vitrail runs FOLDER` lists runs, `vitrail index` makes a data set of existing tars",
        )
    from data_prep.shards.contents import first_samples

    document: dict[str, Any] = {}
    lines: list[str] = []
    for name, manifest in manifests.items():
        size_bytes = sum(shard.size_bytes for shard in manifest.shards)
        document[name] = {
            "num_samples": manifest.num_samples,
            "num_shards": len(manifest.shards),
            "size_bytes": size_bytes,
            "classes": list(manifest.classes),
            "fingerprint": manifest.fingerprint,
            "info": manifest.info,
        }
        classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
        size = f"{len(manifest.shards)} shards, {size_bytes / 2**20:.1f} MiB"
        lines.append(f"{name}: {manifest.num_samples} samples in {size}{classes}")
        if num_samples:
            found = first_samples(manifest, num_samples)
            document[name]["samples"] = found
            lines += [_sample_line(facts) for facts in found]
    return {"data_set": place, "splits": document}, lines


def _sample_line(facts: dict[str, Any]) -> str:
    """A sample in one line; captions are strangers' text, so what a terminal would obey is left out."""
    caption = "".join(c if c.isprintable() else " " for c in str(facts.get("caption") or ""))
    size = f"{facts.get('width', '?')}x{facts.get('height', '?')}"
    return f"  {facts['shard']} {facts.get('key', '?')}  {size:>9}  {caption[:90]}"


def splits_of(place: str) -> dict[str, Manifest]:
    """The manifest in a folder, or those of the folders in it, by name."""
    if storage.exists(storage.join(place, MANIFEST_NAME)):
        return {place.rstrip("/").rpartition("/")[2]: read_manifest(place)}
    suffix = f"/{MANIFEST_NAME}"
    try:
        found = sorted(entry.url for entry in storage.entries(place) if entry.url.endswith(suffix))
    except FileNotFoundError:
        return {}
    folders = [url.removesuffix(suffix) for url in found]
    return {folder.rpartition("/")[2]: read_manifest(folder) for folder in folders}


def verify_dataset(url: str, say: Callable[[str], None]) -> tuple[dict[str, Any], list[str], bool]:
    """Check a data set down to the sample: the findings as a document and as lines, and whether all is well."""
    from data_prep.shards.verify import verify

    report = verify(url, progress=lambda done, total: say(f"{done} of {total} shards checked"))
    lines = [str(problem) for problem in report.problems]
    size = f"{report.samples} samples in {report.shards} shards, {report.size_bytes / 2**20:.1f} MiB"
    lines.append(f"{url}: {size}, {len(lines) or 'no'} problem(s)")
    problems = [problem._asdict() for problem in report.problems]
    return {**report._asdict(), "problems": problems}, lines, not problems


def list_runs(folder: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Every run directory in a folder: its state, its newest valid checkpoint, and why it isn't going on."""
    from pipeline.train.checkpoints.listing import list_checkpoints

    documents = []
    lines = []
    for name in _names_of_runs(folder):
        url = storage.join(folder, name)
        status = RunDir(url).status()
        state = state_of(status)
        saved = list_checkpoints(_checkpoints_of(url, status))
        resumable = saved.checkpoints[0].step if saved.checkpoints else None
        documents.append({"name": name, **status, "state": state, "resumable_step": resumable})
        lines.append(
            f"{name:<24} {state:<8} {status.get('stage', '?'):<10} step {status.get('step', 0):<8} "
            f"{status.get('samples', 0)}/{status.get('length_samples', '?')} samples  "
            f"{'no checkpoint' if resumable is None else f'saved at {resumable}':<16} {_ago(status.get('updated'))}"
        )
        if status.get("message"):
            lines.append(f"    {status['message']}")
    return documents, lines or [f"no runs in {folder}"]


def state_of(status: dict[str, Any]) -> str:
    """A run's state; "silent" for one that says it is running and hasn't been heard of for long."""
    state = str(status.get("state", "?"))
    age_s = time.time() - float(status.get("updated") or 0)
    return "silent" if state == "running" and age_s > SILENT_S else state


def report_on(sources: Sequence[str], out: str) -> str:
    """Write a report from a spec in YAML, or on the run directories given; returns where it is."""
    from pipeline.report.html import write_report
    from pipeline.report.spec import ReportSpec

    if len(sources) == 1 and sources[0].endswith((".yaml", ".yml")):
        spec = configs.validate(ReportSpec, configs.load(sources[0]), where=sources[0])
    else:
        labels = {url.rstrip("/").rpartition("/")[2]: url for url in sources}
        spec = configs.validate(ReportSpec, {"runs": labels}, where="command line")
    return write_report(spec, out)


def _describe_run(url: str, *, verify: bool) -> Reply:
    from pipeline.train.checkpoints.listing import list_checkpoints

    status = RunDir(url).status()
    status["state"] = state_of(status)
    figures = figures_of(url)
    lines = [f"{key:<16} {value}" for key, value in status.items() if value not in (None, "")]
    lines += [f"{name:<32} {value:.4g}" for name, value in figures.items()]
    saved = list_checkpoints(_checkpoints_of(url, status), verify=verify)
    for attempt in saved.attempts:
        lines.append(f"attempt {attempt.number:<8} began at step {attempt.resumed_step}")
    for number, one in enumerate(saved.checkpoints):
        facts = f"{one.samples} samples, {one.size_bytes / 2**20:.1f} MiB, attempt {one.attempt}, {_ago(one.time)}"
        lines.append(f"checkpoint       step {one.step}: {facts}{'  <- would be resumed' if number == 0 else ''}")
    lines += [f"unusable         {reason}" for reason in saved.skipped]
    if saved.skipped and not saved.checkpoints:
        lines.append("no checkpoint can be used: restore the files, or delete the folder to start over")
    return {"run": url, "status": status, "figures": figures, "checkpoints": saved.document()}, lines


def _checkpoints_of(url: str, status: dict[str, Any]) -> str:
    return str(status.get("checkpoints") or RunDir(url).checkpoints_url)


def _names_of_runs(folder: str) -> list[str]:
    if not storage.is_remote(folder):
        return sorted(path.parent.name for path in Path(folder).glob("*/status.json"))
    start = len(folder.rstrip("/")) + 1
    found = (entry.url[start:] for entry in storage.entries(folder) if entry.url.endswith("/status.json"))
    return sorted(name.removesuffix("/status.json") for name in found if name.count("/") == 1)


def _ago(unix_time: object) -> str:
    if not isinstance(unix_time, (int, float)):
        return ""
    minutes = max(0.0, time.time() - unix_time) / 60
    return f"{minutes:.0f} min ago" if minutes < 120 else f"{minutes / 60:.0f} h ago"
