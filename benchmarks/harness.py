"""One paired comparison: ours and a peer in turn, in one run, on the same work.

The two sides run A B A B ..., so that whatever else the machine does meets both. Each pair gives one ratio
(peer's time / our time; above 1 we are faster); the median of the pairs' ratios is the result, their spread says how
far to trust it. A `check` compares the two outputs of every pair, warm-up included: a comparison of unequal work is
refused instead of reported.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import os
import resource
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.machine import REPOSITORY, machine, revision, versions

FORMAT, FORMAT_VERSION = "vitrail.benchmark", 1
RESULTS = REPOSITORY / "benchmarks" / "results"

Check = Callable[[Any, Any], bool]
"""(our output, peer's output) -> True if both did the same work. Anything but True refuses the comparison; raise
`UnequalWork` to say how they differ."""


class UnequalWork(AssertionError):  # noqa: N818 -- says what is wrong
    """The two sides didn't do the same work, so their times can't be compared."""


class Contender(NamedTuple):
    """One side: a callable run in this process, or a command run in one of its own."""

    name: str
    run: Callable[[], Any] | Sequence[str]


class Work(NamedTuple):
    """How much one call does, for rates: Work(100, "images")."""

    amount: float = 1.0
    unit: str = "calls"


class Goal(NamedTuple):
    """What we want: a ratio of at least, or a median time of ours of at most. A goal not met is reported as such."""

    ratio_min: float | None = None
    ours_max_s: float | None = None


class Series(NamedTuple):
    """Statistics of one side's times."""

    median: float
    min: float
    max: float
    spread: float  # (max - min) / median


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`; `document()` is what is written."""

    name: str
    what: str
    ours: str
    peer: str
    ours_s: tuple[float, ...]
    peer_s: tuple[float, ...]
    clock: Literal["wall", "cpu"]
    work: Work
    goal: Goal
    warmup: int
    notes: dict[str, Any]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Peer's time over ours, pair by pair."""
        return tuple(peer / ours for ours, peer in zip(self.ours_s, self.peer_s, strict=True))

    @property
    def goal_met(self) -> bool | None:
        """Whether every stated goal is met; None where none is stated."""
        checks = []
        if self.goal.ratio_min is not None:
            checks.append(statistics.median(self.ratios) >= self.goal.ratio_min)
        if self.goal.ours_max_s is not None:
            checks.append(statistics.median(self.ours_s) <= self.goal.ours_max_s)
        return all(checks) if checks else None

    def document(self) -> dict[str, Any]:
        """Everything a reader needs to judge the figure and repeat it."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "what": self.what,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command_line(),
            "git": revision(),
            "machine": machine(),
            "versions": versions(),
            "clock": self.clock,
            "work": self.work._asdict(),
            "warmup": self.warmup,
            "pairs": len(self.ours_s),
            "ours": self._side(self.ours, self.ours_s),
            "peer": self._side(self.peer, self.peer_s),
            "ratio": {"pairs": [round(ratio, 4) for ratio in self.ratios], **_rounded(describe(self.ratios))},
            "goal": {**self.goal._asdict(), "met": self.goal_met},
            "notes": self.notes,
        }

    def _side(self, name: str, times: Sequence[float]) -> dict[str, Any]:
        rate = self.work.amount / statistics.median(times)
        return {
            "name": name,
            "times_s": [round(seconds, 6) for seconds in times],
            **{f"{key}_s" if key != "spread" else key: value for key, value in _rounded(describe(times)).items()},
            f"{self.work.unit}_per_s": float(f"{rate:.5g}"),
        }


def compare(
    name: str,
    what: str,
    ours: Contender,
    peer: Contender,
    *,
    check: Check,
    pairs: int = 5,
    warmup: int = 1,
    clock: Literal["wall", "cpu"] = "wall",
    work: Work | None = None,
    goal: Goal | None = None,
    notes: dict[str, Any] | None = None,
    timer: Callable[[], float] | None = None,
) -> Comparison:
    """Run both sides in turn and compare their times.

    Args:
        name: of the result's file.
        what: the work, in one sentence, with the settings that matter.
        check: compares the outputs of each pair; see `Check`. A command's output is its standard output (bytes).
        pairs: measured pairs; `warmup` further ones come first and are checked but not timed.
        clock: wall time, or CPU time of the process (of the children for commands).
        notes: facts of the benchmark's own, JSON-able.
        timer: replaces the clock.

    Raises:
        UnequalWork: `check` didn't return True, or a command failed.
        ValueError: fewer than one pair.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, not {pairs}")
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(warmup + pairs):
        outputs = []
        for side, contender in enumerate((ours, peer)):
            seconds, output = _timed(contender, timer or _clock(contender, clock))
            outputs.append(output)
            if turn >= warmup:
                times[side].append(seconds)
        if check(*outputs) is not True:
            raise UnequalWork(f"{name}: the outputs of {ours.name} and {peer.name} aren't of equal work")
    return Comparison(
        name=name,
        what=what,
        ours=ours.name,
        peer=peer.name,
        ours_s=tuple(times[0]),
        peer_s=tuple(times[1]),
        clock=clock,
        work=work or Work(),
        goal=goal or Goal(),
        warmup=warmup,
        notes=notes or {},
    )


def describe(values: Sequence[float]) -> Series:
    """Median, extremes and relative spread of a series."""
    median = statistics.median(values)
    return Series(median, min(values), max(values), (max(values) - min(values)) / median)


def save(comparison: Comparison, folder: Path = RESULTS) -> Path:
    """Write `<name>.json`, whole or not at all; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{comparison.name}.json"
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(comparison.document(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as plain text, a line a side."""
    rows: list[tuple[str, ...]] = [("benchmark", "side", "median", "min", "max", "rate", "ratio", "goal")]
    for comparison in comparisons:
        ratio = describe(comparison.ratios)
        sides = ((comparison.ours, comparison.ours_s), (comparison.peer, comparison.peer_s))
        for number, (side, times) in enumerate(sides):
            series = describe(times)
            rate = f"{comparison.work.amount / series.median:.4g} {comparison.work.unit}/s"
            verdict = (f"{ratio.median:.2f}x ({ratio.min:.2f}-{ratio.max:.2f})", _goal_text(comparison))
            rows.append(
                (
                    "" if number else comparison.name,
                    side,
                    *(_seconds(value) for value in series[:3]),
                    rate,
                    *(("", "") if number else verdict),
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def alone() -> None:
    """Make a process group of this process meet on a port that nobody else uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(listener.getsockname()[1]))


def command_line() -> str:
    """The command that ran this process, without paths of this machine."""
    program, *arguments = sys.argv
    path = Path(program)
    if path.name == "__main__.py":
        return shlex.join(["python", "-m", path.parent.name, *arguments])
    return shlex.join([path.name, *arguments])


def _timed(contender: Contender, clock: Callable[[], float]) -> tuple[float, Any]:
    gc.collect()
    started = clock()
    output = contender.run() if callable(contender.run) else _run_command(contender)
    return clock() - started, output


def _run_command(contender: Contender) -> bytes:
    assert not callable(contender.run)
    done = subprocess.run(list(contender.run), capture_output=True, check=False, env=os.environ)
    if done.returncode:
        raise UnequalWork(f"{contender.name} failed with {done.returncode}: {done.stderr.decode(errors='replace')}")
    return done.stdout


def _clock(contender: Contender, clock: Literal["wall", "cpu"]) -> Callable[[], float]:
    if clock == "wall":
        return time.perf_counter
    return time.process_time if callable(contender.run) else _children_cpu_s


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _goal_text(comparison: Comparison) -> str:
    wanted = []
    if comparison.goal.ratio_min is not None:
        wanted.append(f"≥{comparison.goal.ratio_min:g}x")
    if comparison.goal.ours_max_s is not None:
        wanted.append(f"≤{_seconds(comparison.goal.ours_max_s)}")
    return f"{' and '.join(wanted)}: {'met' if comparison.goal_met else 'NOT met'}" if wanted else "none"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"


def _rounded(series: Series) -> dict[str, float]:
    return {key: float(f"{value:.5g}") for key, value in series._asdict().items()}
