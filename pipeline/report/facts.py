"""How each run was made, and from which data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.report.runs import DataSet, Run, RunGroup

MAX_RANKS = 64  # whose waiting is listed


class Outcome(NamedTuple):
    """What became of some inputs of a data set, with an example."""

    reason: str
    num_inputs: int
    example: str


def common_environment(groups: Sequence[RunGroup]) -> Mapping[str, Any] | None:
    """The environment, if it is the same for every run."""
    environments = [run.environment for group in groups for run in group.runs]
    return environments[0] if all(environment == environments[0] for environment in environments) else None


def environment_lines(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each fact; versions and other mappings take one line."""
    for key, value in environment.items():
        if isinstance(value, Mapping):
            yield key, ", ".join(f"{item} {part}" for item, part in value.items() if part not in (None, ""))
        elif isinstance(value, list):
            yield key, ", ".join(str(item) for item in value)
        elif value not in (None, ""):
            yield key, str(value)


def plain_details(run: Run) -> dict[str, str | float]:
    """Details of the last evaluation that are a word or a number."""
    return {name: value for name, value in run.details.items() if isinstance(value, str | int | float)}


def training_sets(run: Run) -> str:
    """A run's training data: one folder, or several."""
    data = run.config.get("data")
    folders = data.get("train") if isinstance(data, Mapping) else None
    if not isinstance(folders, Sequence) or isinstance(folders, str):
        return str(folders or "")
    return ", ".join(str(source["url"]) if isinstance(source, Mapping) else str(source) for source in folders)


def num_absent(run: Run) -> int:
    """Samples that couldn't be read, and so were absent from their batches."""
    return sum(line.get("num_absent", 0) for line in run.train)


def duration_s(run: Run) -> float:
    """From the first metrics line to the last, minus the gaps between attempts."""
    attempts: dict[Any, list[float]] = {}
    for line in (*run.train, *run.evaluations):
        if "time" in line:
            attempts.setdefault(line.get("attempt"), []).append(float(line["time"]))
    return sum(max(times) - min(times) for times in attempts.values())


def waits(run: Run) -> str:
    """Each rank's share of the training time that it waited for data; a list for each number of ranks."""
    lists = []
    for world in dict.fromkeys(len(line.get("data_wait_s") or ()) for line in run.train):
        waits_s, spent_s = [0.0] * world, 0.0
        step_before = 0
        for line in run.train:
            num_steps, step_before = line["step"] - step_before, line["step"]
            if world and len(line.get("data_wait_s") or ()) == world and line.get("step_s") and num_steps > 0:
                waits_s = [sum(pair) for pair in zip(waits_s, line["data_wait_s"], strict=True)]
                spent_s += line["step_s"] * num_steps
        if spent_s:
            shares = ", ".join(f"{wait_s / spent_s:.1%}" for wait_s in waits_s[:MAX_RANKS])
            lists.append(shares + (f" and {world - MAX_RANKS} more" if world > MAX_RANKS else ""))
    return "; ".join(lists)


def outcomes(data_set: DataSet) -> list[Outcome]:
    """What became of a data set's inputs; empty if all were written or nothing is known."""
    account = data_set.account
    refused = {**account.get("filtered", {}), **account.get("failed", {})}
    if not refused:
        return []
    examples = account.get("examples", {})
    return [
        Outcome("written", account.get("written", 0), ""),
        *(Outcome(reason, num, examples.get(reason, "")) for reason, num in refused.items()),
    ]
