"""The verbs that show what is there: runs and data sets as documents and as lines, reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.replies import Reply
from pipeline import config as configs
from pipeline import inspection
from pipeline.errors import DataError
from pipeline.inspection import RunSummary


def describe(place: str, *, verify: bool = False, num_samples: int = 0) -> Reply:
    """State, figures, attempts and checkpoints of a run directory, or counts and some samples of a data set (or of each
    of its splits).

    Args:
        verify: read every checkpoint and compare hashes, instead of looking at presence and sizes only.

    Raises:
        DataError: it is neither.
    """
    if inspection.is_run_directory(place):
        return _describe_run(place, verify=verify)
    from data_prep.shards.describe import describe_splits

    splits = describe_splits(place, num_samples)
    if not splits:
        raise DataError(
            "neither a run directory (status.json) nor a data set (manifest.json)",
            where=place,
            fix="check the path; `vitrail runs FOLDER` lists runs, `vitrail index` makes a data set of existing tars",
        )
    lines: list[str] = []
    for name, split in splits.items():
        classes = f", {len(split['classes'])} classes" if split["classes"] else ""
        size = f"{split['num_shards']} shards, {split['size_bytes'] / 2**20:.1f} MiB"
        lines.append(f"{name}: {split['num_samples']} samples in {size}{classes}")
        lines += [_sample_line(facts) for facts in split.get("samples", ())]
    return {"data_set": place, "splits": splits}, lines


def verify_dataset(url: str, say: Callable[[str], None]) -> tuple[dict[str, Any], list[str], bool]:
    """Check a data set down to the sample: what was found as a document and as lines, and whether all is well."""
    from data_prep.shards.verify import verify

    report = verify(url, progress=lambda done, total: say(f"{done} of {total} shards checked"))
    lines = [str(problem) for problem in report.problems]
    size = f"{report.samples} samples in {report.shards} shards, {report.size_bytes / 2**20:.1f} MiB"
    lines.append(f"{url}: {size}, {len(lines) or 'no'} problem(s)")
    problems = [problem._asdict() for problem in report.problems]
    return {**report._asdict(), "problems": problems}, lines, not problems


def list_runs(folder: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Every run directory in a folder: its state, its newest valid checkpoint, and why it has ended or stopped."""
    runs = inspection.list_runs(folder)
    lines = [line for run in runs for line in _run_lines(run)]
    return [run.document() for run in runs], lines or [f"no runs in {folder}"]


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
    run = inspection.describe_run(url, verify=verify)
    lines = [f"{key:<16} {value}" for key, value in run.status.items() if value not in (None, "")]
    lines += [f"{name:<32} {value:.4g}" for name, value in run.figures.items()]
    listing = run.checkpoints
    for attempt in listing.attempts:
        lines.append(f"attempt {attempt.number:<8} began at step {attempt.resumed_step}")
    for number, checkpoint in enumerate(listing.checkpoints):
        size = f"{checkpoint.samples} samples, {checkpoint.size_bytes / 2**20:.1f} MiB"
        facts = f"{size}, attempt {checkpoint.attempt}, {_ago(checkpoint.time)}"
        mark = "  <- would be resumed" if number == 0 else ""
        lines.append(f"checkpoint       step {checkpoint.step}: {facts}{mark}")
    lines += [f"unusable         {reason}" for reason in listing.skipped]
    if listing.skipped and not listing.checkpoints:
        lines.append("no checkpoint can be used: restore the files, or delete the folder to start over")
    return run.document(), lines


def _run_lines(run: RunSummary) -> list[str]:
    status = run.status
    saved = "no checkpoint" if run.resumable_step is None else f"saved at {run.resumable_step}"
    line = (
        f"{run.name:<24} {status['state']:<8} {status.get('stage', '?'):<10} step {status.get('step', 0):<8} "
        f"{status.get('samples', 0)}/{status.get('length_samples', '?')} samples  "
        f"{saved:<16} {_ago(status.get('updated'))}"
    )
    return [line, f"    {status['message']}"] if status.get("message") else [line]


def _sample_line(facts: Mapping[str, Any]) -> str:
    """A sample in one line. Captions are strangers' text: control characters, which a terminal obeys, are left out."""
    caption = "".join(c if c.isprintable() else " " for c in str(facts.get("caption") or ""))
    size = f"{facts.get('width', '?')}x{facts.get('height', '?')}"
    return f"  {facts['shard']} {facts.get('key', '?')}  {size:>9}  {caption[:90]}"


def _ago(unix_time: object) -> str:
    if not isinstance(unix_time, (int, float)):
        return ""
    minutes = max(0.0, time.time() - unix_time) / 60
    return f"{minutes:.0f} min ago" if minutes < 120 else f"{minutes / 60:.0f} h ago"
