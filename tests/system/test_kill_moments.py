"""SIGKILL of all ranks at 30 chosen moments of one run whose checkpoints go to S3: nothing is lost, nothing changes.

A proxy before the server sees every request, so a kill falls exactly where it is meant to: between the first byte of a
checkpoint and its commit, and between the commit's PUT and its reply. Ranks are forked from a process that has
imported everything, since thirty starts from nothing would take most of the time.
"""

from __future__ import annotations

import http.client
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launch.s3_server import S3Server, find_rclone
from pipeline.run_dir import RunDir
from pipeline.train.checkpoints.commits import find_commits
from tests.support import fault_proxy, train_cases
from tests.support.fault_proxy import FaultProxy
from tests.support.ranks_for_kills import serve_rank

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_RANKS = 2


class Moment(NamedTuple):
    """A kill at the `nth` request whose method and target match: before it reaches the server, or before its reply
    reaches the rank.
    """

    method: str
    target: str
    when: str  # "before" or "after" the server did it
    nth: int = 1


PARTS = [f"rank-0000{rank}.{kind}" for rank in (0, 1) for kind in ("safetensors", "table.json", "receipt.json")]
MOMENTS = [
    # 14 between the first data byte and the commit
    *(Moment("PUT", part, when, 2) for part in PARTS for when in ("before", "after")),
    Moment("PUT", "rank-00001.safetensors", "before", 3),
    Moment("GET", "receipt.json", "after", 3),
    # 12 around the commit: 6 between its PUT and its reply
    *(Moment("PUT", "commit.json", "after", nth) for nth in (1, 2, 1, 3, 1, 2)),
    *(Moment("PUT", "commit.json", "before", nth) for nth in (1, 2, 1, 3, 2, 1)),
    # 4 elsewhere: at the start, while old checkpoints are deleted
    Moment("PUT", "attempts/", "after"),
    Moment("DELETE", "commit.json", "after"),
    Moment("DELETE", "rank-00000.safetensors", "before"),
    Moment("GET", "rank-00000.safetensors", "after"),
]


class Killer:
    """Knows the ranks under way and the moment they are to die at; the proxy asks it."""

    def __init__(self) -> None:
        self.moment: Moment | None = None
        self.ranks: list[Any] = []
        self.struck = threading.Event()
        self._seen = 0
        self._lock = threading.Lock()

    def arm(self, moment: Moment | None) -> None:
        with self._lock:
            self.moment, self._seen = moment, 0
            self.struck.clear()

    def sees(self, method: str, target: str, when: str) -> None:
        with self._lock:
            moment = self.moment
            if self.struck.is_set() or moment is None or moment.when != when or moment.method != method:
                return
            if moment.target not in target:
                return
            self._seen += 1
            if self._seen < moment.nth:
                return
            for rank in self.ranks:
                os.kill(rank.pid, signal.SIGKILL)
            self.struck.set()


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    killer = Killer()
    pass_on, reply = fault_proxy._Handler._pass_on, fault_proxy._Handler._send_reply

    def passing(self: Any, body: bytes, kind: Any) -> None:
        killer.sees(self.command, self.path, "before")
        if not killer.struck.is_set():
            pass_on(self, body, kind)

    def replying(self: Any, answer: http.client.HTTPResponse, kind: Any) -> None:
        killer.sees(self.command, self.path, "after")
        reply(self, answer, kind)

    monkeypatch.setattr(fault_proxy._Handler, "_pass_on", passing)
    monkeypatch.setattr(fault_proxy._Handler, "_send_reply", replying)
    return killer


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if find_rclone() is None:
        pytest.skip("rclone has no wheel for this machine")
    with S3Server(tmp_path / "s3") as server, FaultProxy(server.endpoint) as proxy:
        server.bucket("killed-bucket")
        for name, value in {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        yield "s3://killed-bucket"


def start(context: Any, document: dict[str, Any], num_ranks: int = NUM_RANKS) -> list[Any]:
    """Ranks of a run, as processes of `context`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        ranks.append(context.Process(target=serve_rank, args=(document, rank, num_ranks, port), daemon=True))
        ranks[-1].start()
    return ranks


def finish(ranks: list[Any]) -> list[int]:
    try:
        for rank in ranks:
            rank.join(timeout=900)
        return [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def test_at_thirty_moments_nothing_is_lost_and_the_weights_are_the_same(
    tmp_path: Path, store: str, killer: Killer
) -> None:
    assert len(MOMENTS) == 30
    train_cases.write_data(tmp_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.ranks_for_kills"])
    changes = {"length_samples": 16 * 120, "checkpoint.every_samples": 16}
    straight = train_cases.document(tmp_path, "straight", **changes)
    assert finish(start(context, straight)) == [0, 0]

    document = train_cases.document(tmp_path, "killed", **{**changes, "checkpoint.url": f"{store}/checkpoints"})
    url = f"{store}/checkpoints"
    reached = 0
    for number, moment in enumerate(MOMENTS):
        killer.arm(moment)
        killer.ranks = start(context, document)
        deadline = time.monotonic() + 120
        while not killer.struck.wait(0.1):
            assert any(rank.is_alive() for rank in killer.ranks), f"{number} {moment}: the run ended before"
            assert time.monotonic() < deadline, f"{number} {moment}: never came"
        finish(killer.ranks)
        killer.arm(None)
        found = find_commits(url)
        newest = found.commits[0].step if found.commits else 0
        assert newest >= reached, f"{number} {moment}: step {reached} was committed, and {newest} would be resumed"
        reached = newest
    assert reached < 120, "the run was over before the last kill"
    document["checkpoint"]["every_samples"] = 16 * 20  # enough has been saved
    assert finish(start(context, document)) == [0, 0]

    killed, calm = (RunDir(f"{document['runs']}/{name}") for name in ("killed", "straight"))
    assert killed.status()["weights_sha256"] == calm.status()["weights_sha256"]
    assert killed.status()["attempt"] >= len(MOMENTS)
    told = [line["step"] for line in killed.metrics() if line["kind"] == "train"]
    assert told == list(range(1, 121)), "every step is told once"
    losses = [[line["loss"] for line in run.metrics() if line["kind"] == "train"] for run in (killed, calm)]
    assert losses[0] == losses[1]
