"""One training job from the driver's side: attempts follow each other until it is done, stopped, or hopeless.

An attempt is one life of a worker group. When a rank or an agent is lost the rest is ended and a new attempt starts,
which resumes from the newest valid checkpoint. Errors of the user end the job at once.
"""

from __future__ import annotations

import collections
import signal
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from launch.stopping import StopRequest
from launch.workers.agent import RankExit
from launch.workers.group import AgentLostError, Allocate, WorkerGroup
from pipeline import errors
from pipeline.config import Document
from pipeline.run_dir import RunDir

POLL_S = 0.2
PAUSE_S = 1.0  # before a new attempt
FAILURE_GRACE_S = 10.0  # for the peers of a dead rank, who usually fail at their next collective
RESOURCE_WAIT_S = 600.0  # for lost machines to be replaced
RESOURCE_POLL_S = 2.0
BLAMES = 2  # failures that came from a machine before it is left out
DUMP_S = 2.0  # for ranks to print their stacks before they are ended
STOP_GRACE_S = 300.0  # for saving a checkpoint after a stop request
_LAST_WORDS = 20

OnLine = Callable[[int, str], None]  # (rank, line of its output)


class TrainResult(NamedTuple):
    """How a job ended."""

    status: Literal["done", "stopped"]
    run: str
    step: int
    samples: int
    attempts: int
    weights_sha256: str | None


class JobFailedError(Exception):
    """Attempts kept dying without getting any further."""


class AttemptEnd(NamedTuple):
    """How one attempt ended."""

    kind: Literal["done", "stopped", "moved", "failed"]
    outcome: dict[str, Any]
    reason: str = ""
    machine: str = ""  # that the failure came from


def run_training(
    document: Document,
    *,
    where: str,
    run_url: str,
    allocate: Allocate,
    stop: StopRequest,
    on_line: OnLine,
    max_fruitless: int = 3,
) -> TrainResult:
    """Run a training configuration until it is done or asked to stop.

    Args:
        document: the configuration, as the ranks get it.
        where: the file it came from, for messages.
        run_url: its run directory, watched for progress.
        allocate: brings the ranks' processes together, anew for each attempt.
        on_line: gets the ranks' output and the driver's own remarks (rank -1).
        max_fruitless: attempts in a row that may end without getting any further; progress renews the budget.

    Raises:
        UserError: as the ranks raised it, or no resources to run on.
        JobFailedError: `max_fruitless` attempts in a row died without progress.
    """
    fruitless, furthest, number = 0, _step_reached(run_url), 0
    blamed: collections.Counter[str] = collections.Counter()
    while True:
        number += 1
        excluded = [machine for machine, times in blamed.items() if times >= BLAMES]
        group = _allocate_patiently(allocate, excluded, stop, on_line, patient=number > 1)
        if group is None:
            return TrainResult("stopped", run_url, max(furthest, 0), 0, number - 1, None)
        end = _run_attempt(group, document, where, stop, on_line)
        if end.kind == "moved":
            on_line(-1, f"saved at step {int(end.outcome.get('step', 0))}, since {end.reason}; starting again")
            continue
        if end.kind != "failed":
            return TrainResult(
                end.kind,
                run_url,
                step=int(end.outcome.get("step", 0)),
                samples=int(end.outcome.get("samples", 0)),
                attempts=number,
                weights_sha256=end.outcome.get("weights_sha256"),
            )
        reached = _step_reached(run_url)
        fruitless = 0 if reached > furthest else fruitless + 1
        furthest = max(reached, furthest)
        if end.machine:
            blamed[end.machine] += 1
            if blamed[end.machine] == BLAMES:
                on_line(-1, f"machine {end.machine[:12]} failed {BLAMES} times and isn't used any more")
        if fruitless >= max_fruitless:
            raise JobFailedError(f"{fruitless} attempts in a row got no further than step {furthest}; {end.reason}")
        on_line(-1, f"attempt {number} ended at step {max(reached, 0)}: {end.reason}; starting again")
        if stop.wait(PAUSE_S):
            return TrainResult("stopped", run_url, max(reached, 0), 0, number, None)


def _allocate_patiently(
    allocate: Allocate, excluded: list[str], stop: StopRequest, on_line: OnLine, *, patient: bool
) -> WorkerGroup | None:
    """A worker group; None when a stop was requested while waiting for one.

    A request that can't be met is refused at once, but a run that was under way waits for machines to come back.
    """
    deadline = time.monotonic() + RESOURCE_WAIT_S
    reported = ""
    while True:
        try:
            return allocate(excluded)
        except errors.ResourceError as error:
            if not patient or time.monotonic() > deadline:
                raise
            excluded = []  # a doubtful machine is better than none
            if str(error) != reported:
                reported = str(error)
                on_line(-1, f"waiting up to {RESOURCE_WAIT_S / 60:.0f} min for resources: {error.what}")
        if stop.wait(RESOURCE_POLL_S):
            return None


def _run_attempt(group: WorkerGroup, document: Document, where: str, stop: StopRequest, on_line: OnLine) -> AttemptEnd:
    watch = AttemptMonitor(group, stop, on_line)
    try:
        group.start(document, where)
        return watch.until_end()
    except AgentLostError as error:
        return AttemptEnd("failed", {}, f"lost an agent ({error})")
    finally:
        group.release()


class AttemptMonitor:
    """Follows one attempt to its end, passing on stop requests and ending what a dead rank leaves behind."""

    def __init__(self, group: WorkerGroup, stop: StopRequest, on_line: OnLine) -> None:
        self._group = group
        self._stop = stop
        self._on_line = on_line
        self._deadline: float | None = None
        self._stopping = False
        self._ending = False
        self._moving = ""
        self._dumped_until = 0.0  # the ranks are given time to print their stacks
        self._first_failures: list[RankExit] = []
        self._last_words: dict[int, collections.deque[str]] = collections.defaultdict(
            lambda: collections.deque(maxlen=_LAST_WORDS)
        )

    def until_end(self) -> AttemptEnd:
        while True:
            reports = self._group.poll()
            for report in reports:
                for rank, line in report.lines:
                    self._last_words[rank].append(line)
                    self._on_line(rank, line)
            exits = [e for report in reports for e in report.exits]
            if not any(report.num_running for report in reports):
                return self._judge(exits)
            failures = [e for e in exits if e.code not in (0, 75)]
            if failures and not self._first_failures:
                self._first_failures = failures
                if any("hang" in e.outcome for e in failures):
                    self._group.dump_stacks()
                    self._dumped_until = time.monotonic() + DUMP_S
            if self._first_failures and not self._ending and time.monotonic() >= self._dumped_until:
                self._ending = True
                self._end_soon(FAILURE_GRACE_S)
            if not (self._stopping or self._moving or self._first_failures):
                self._moving = self._group.reason_to_move()
                if self._moving:
                    self._on_line(-1, f"{self._moving}: saving, to start again")
                    self._end_soon(STOP_GRACE_S)
            if self._stop.requested() and not self._stopping:
                self._stopping = True
                self._end_soon(STOP_GRACE_S)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._kill_rest()
                return self._judge(exits)
            time.sleep(POLL_S)

    def _end_soon(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        self._deadline = min(deadline, self._deadline or deadline)
        self._group.terminate()

    def _kill_rest(self) -> None:
        self._group.kill()
        if not self._first_failures:
            self._on_line(-1, f"ranks didn't stop within {STOP_GRACE_S:.0f} s and were killed")

    def _judge(self, exits: list[RankExit]) -> AttemptEnd:
        failures = self._first_failures or [e for e in exits if e.code not in (0, 75)]
        by_rank = {e.rank: e.outcome for e in exits}
        outcome = by_rank.get(0, {})
        if not failures:
            if self._deadline is not None and not exits:
                return AttemptEnd("failed", {}, "ranks were killed while stopping")
            if any(e.code == 75 for e in exits):
                return AttemptEnd("stopped" if self._stopping or not self._moving else "moved", outcome, self._moving)
            return AttemptEnd("done", outcome)
        user_error = next((e.outcome["error"] for e in failures if e.code == 2 and "error" in e.outcome), None)
        if user_error is not None and all(e.code > 0 for e in failures):
            raise rebuild_error(user_error)
        worst = min(failures, key=lambda e: (e.code > 0, e.rank))  # one that was killed explains its peers' errors
        machine = self._group.machine_of(worst.rank)
        hang = next((e for e in failures if "hang" in e.outcome), None)
        if hang is not None:
            return AttemptEnd("failed", outcome, f"rank {hang.rank} found the run hanging: {hang.outcome['hang']}")
        for line in self._last_words[worst.rank] if worst.code > 0 else ():
            self._on_line(-1, f"  rank {worst.rank}: {line}")
        on = f" on machine {machine[:12]}" if machine else ""
        return AttemptEnd("failed", outcome, f"rank {worst.rank}{on} {describe_exit(worst.code)}", machine)


def describe_exit(code: int) -> str:
    """In words: "ended with code 1", "was ended by SIGKILL"."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def error_document(error: errors.UserError) -> dict[str, str]:
    """A user error as JSON, to travel between processes."""
    return {"type": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}


def rebuild_error(document: dict[str, str]) -> errors.UserError:
    """The inverse of `error_document`."""
    kind = getattr(errors, document["type"], errors.UserError)
    if not (isinstance(kind, type) and issubclass(kind, errors.UserError)):
        kind = errors.UserError
    return kind(document["what"], where=document["where"], fix=document["fix"])


def _step_reached(run_url: str) -> int:
    """Last step the run directory tells of; -1 when it tells of none."""
    try:
        return int(RunDir(run_url).status().get("step", -1))
    except (FileNotFoundError, ValueError, errors.UserError):
        return -1
