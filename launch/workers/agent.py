"""An agent starts one machine's ranks of a training job, each a process of its own, and watches them.

Ranks are plain `python -m launch.worker` processes, so signals, logs, core dumps and stack dumps work as anywhere
else. An agent is an ordinary object; `launch.workers.group` puts one on every machine as a Ray actor.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml

from pipeline.machine import free_port

_MAX_PENDING_LINES = 10_000  # a driver that doesn't poll must not fill the agent's memory


class JobSpec(NamedTuple):
    """What every agent needs to know of a training job."""

    document: dict[str, Any]  # the training configuration
    where: str  # the file it came from, for messages
    world_size: int
    master_address: str
    master_port: int
    threads: int  # per rank
    folder: str  # the driver's working directory, which relative paths refer to


class RankExit(NamedTuple):
    """How one rank ended."""

    rank: int
    code: int  # negative: the signal that ended it
    outcome: dict[str, Any]  # what it wrote about itself, {} when it couldn't


class AgentReport(NamedTuple):
    """What happened on one machine since the last poll."""

    lines: list[tuple[int, str]]  # (rank, line of output)
    exits: list[RankExit]  # of all its ranks that have ended
    num_running: int


class _RankProcess(NamedTuple):
    rank: int
    process: subprocess.Popen[str]
    reader: threading.Thread
    outcome_path: Path


class Agent:
    """Runs ranks [first_rank, first_rank + num_ranks) of a job on this machine."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="vitrail-agent-"))
        self._ranks: list[_RankProcess] = []
        self._lines: collections.deque[tuple[int, str]] = collections.deque(maxlen=_MAX_PENDING_LINES)

    def rendezvous(self) -> tuple[str, int]:
        """Address and free port at which rank 0 on this machine can be reached by ranks on others."""
        return _machine_address(), free_port("")

    def node_id(self) -> str:
        """Ray's id of this machine; "" without Ray."""
        ray = sys.modules.get("ray")
        return "" if ray is None or not ray.is_initialized() else str(ray.get_runtime_context().get_node_id())

    def start(self, job: JobSpec, first_rank: int, num_ranks: int) -> None:
        """Start the processes; returns at once."""
        config = self._folder / "config.yaml"
        config.write_text(yaml.safe_dump(job.document, sort_keys=False, allow_unicode=True), encoding="utf-8")
        for local_rank in range(num_ranks):
            rank = first_rank + local_rank
            outcome = self._folder / f"outcome-{rank}.json"
            outcome.unlink(missing_ok=True)
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(job.world_size),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": job.master_address,
                "MASTER_PORT": str(job.master_port),
                "OMP_NUM_THREADS": str(job.threads),
                "PYTHONUNBUFFERED": "1",
                "VITRAIL_PARENT": str(os.getpid()),
                "VITRAIL_OUTCOME": str(outcome),
            }
            if job.world_size == num_ranks:
                # All ranks are on this machine: keep gloo from looking for, and listening on, outer interfaces.
                environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.worker", str(config), "--where", job.where],
                env=environment,
                cwd=job.folder if os.path.isdir(job.folder) else None,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a group of its own: Ctrl-C goes to the driver, kill() reaches loaders too
            )
            assert process.stdout is not None
            reader = threading.Thread(target=self._read, args=(rank, process.stdout), daemon=True)
            reader.start()
            self._ranks.append(_RankProcess(rank, process, reader, outcome))

    def poll(self) -> AgentReport:
        """Output since the last call, and which ranks have ended."""
        exits: list[RankExit] = []
        for rank in self._ranks:
            code = rank.process.poll()
            if code is not None:
                rank.reader.join(timeout=2)  # its last words; a grandchild may hold the pipe open
                exits.append(RankExit(rank.rank, code, _read_outcome(rank.outcome_path)))
        lines: list[tuple[int, str]] = []
        with contextlib.suppress(IndexError):
            while True:
                lines.append(self._lines.popleft())
        return AgentReport(lines, exits, len(self._ranks) - len(exits))

    def terminate(self) -> None:
        """Ask every rank to save and stop."""
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(signal.SIGTERM)

    def dump_stacks(self) -> None:
        """Have every rank print the stacks of its threads; one that was stopped is woken up for it."""
        for rank in self._ranks:
            if rank.process.poll() is None:
                if _is_stopped(rank.process.pid):
                    self._lines.append((rank.rank, f"rank {rank.rank} (process {rank.process.pid}) had been stopped"))
                rank.process.send_signal(signal.SIGUSR1)
                rank.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End every rank and whatever it started, now."""
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()
        self._ranks = []

    def _read(self, rank: int, stream: IO[str]) -> None:
        for line in stream:
            self._lines.append((rank, line.rstrip("\n")))


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by SIGSTOP or a debugger."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
    except psutil.Error:
        return False


def _read_outcome(path: Path) -> dict[str, Any]:
    try:
        outcome: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(outcome)


def _machine_address() -> str:
    """The machine's address as Ray knows it; the loopback without Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return "127.0.0.1"
    return str(ray.util.get_node_ip_address())
