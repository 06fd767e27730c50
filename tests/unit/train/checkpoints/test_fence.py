"""Two attempts at one run at once, on a store that enforces conditional writes (moto) and one that ignores them."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipeline import storage
from pipeline.storage.s3 import S3Objects
from pipeline.train.checkpoints import commits
from pipeline.train.checkpoints.commits import Attempt, Commit

STEPS = 3  # that an attempt commits, one by one


def write(url: str, attempt: Attempt, step: int, lineage: list[list[int]]) -> None:
    """A checkpoint that says which checkpoints it descends from."""
    folder = storage.join(url, f"step-{step:012d}", attempt.folder)
    data = json.dumps(lineage).encode()
    storage.write(storage.join(folder, "data"), data)
    files = [{"name": "data", "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]
    progress = {"step": step, "samples": step}
    document = {"step": step, "attempt": attempt.number, "tensors": {}, "progress": progress, "files": files}
    commits.write_commit(folder, document)


def lineage_of(commit: Commit) -> list[list[int]]:
    return list(json.loads(storage.read(storage.join(commit.url, "data"))))


def attempt_a_run(url: str, *, enforced: bool, meet: threading.Barrier) -> Attempt:
    """What a start of a run does with its checkpoints: resume the newest, record the attempt, commit some more."""
    meet.wait(timeout=60)
    while True:
        valid = commits.find_commits(url).commits
        resumed = valid[0] if valid else None
        step = resumed.step if resumed is not None else 0
        lineage = lineage_of(resumed) if resumed is not None else []
        attempt = commits.begin_attempt(url, step, enforced=enforced)
        if attempt is not None:
            break
    for later in range(step + 1, step + 1 + STEPS):
        lineage = [*lineage, [attempt.number, later]]
        write(url, attempt, later, lineage)
    return attempt


def race(url: str, enforced: bool) -> None:
    """Two attempts at once, and what must hold however they met."""
    meet = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        began = [pool.submit(attempt_a_run, url, enforced=enforced, meet=meet) for _ in range(2)]
        attempts = [future.result(timeout=120) for future in began]
    assert len({a.number for a in attempts}) == 2, "each number has one attempt"
    check_history(url)
    last = max(attempts, key=lambda a: a.number)
    newest = commits.find_commits(url).commits[0]
    assert newest.attempt == last.number, "what counts is the later attempt's"


def check_history(url: str) -> None:
    """The checkpoints that count are one line of descent: none of an overtaken attempt is among them."""
    valid = list(reversed(commits.find_commits(url).commits))
    for older, newer in itertools.pairwise(valid):
        assert older.step < newer.step
        assert [older.attempt, older.step] in lineage_of(newer), f"{newer.url} doesn't descend from {older.url}"


def races(base: str, number: int, enforced: bool, at_once: int) -> None:
    with ThreadPoolExecutor(at_once) as pool:
        for future in [pool.submit(race, f"{base}/{n}", enforced) for n in range(number)]:
            future.result(timeout=600)


def test_races_on_a_store_that_enforces(moto_bucket: str) -> None:
    assert storage.probe_conditional_writes(moto_bucket)
    races(moto_bucket, 3, enforced=True, at_once=3)


@pytest.mark.slow
def test_50_races_on_a_store_that_enforces(moto_bucket: str) -> None:
    races(moto_bucket, 50, enforced=True, at_once=4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_50_races_on_a_store_that_ignores(bucket: str) -> None:
    assert not storage.probe_conditional_writes(bucket)
    races(bucket, 50, enforced=False, at_once=4)


@pytest.fixture(params=["moto_bucket", "bucket"])
def any_store(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def test_an_attempt_that_sleeps_through_its_successor_changes_nothing(any_store: str) -> None:
    """As with SIGSTOP between any two of its writes, which then come late."""
    enforced = storage.probe_conditional_writes(any_store)
    for pause in range(4):
        url = f"{any_store}/{pause}"
        old = commits.begin_attempt(url, 0, enforced=enforced)
        assert old is not None
        for step in range(1, 1 + pause):
            write(url, old, step, [[1, s] for s in range(1, step + 1)])
        attempt_a_run(url, enforced=enforced, meet=threading.Barrier(1))
        for step in range(1 + pause, 10):  # the old one wakes up, and overtakes its successor in steps
            write(url, old, step, [[1, s] for s in range(1, step + 1)])
        check_history(url)
        assert commits.find_commits(url).commits[0].attempt == 2


def test_a_lost_reply_to_the_record_of_an_attempt_is_no_conflict(
    moto_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = S3Objects._put
    lost = []

    def put(self: Any, url: str, data: Any, mode: str) -> None:
        real(self, url, data, mode)
        if "attempts/" in url and not lost:
            lost.append(url)
            raise ConnectionResetError("the reply was lost")

    monkeypatch.setattr(S3Objects, "_put", put)
    attempt = commits.begin_attempt(moto_bucket, 0, enforced=True)
    assert lost
    assert attempt is not None
    assert [a.id for a in commits.read_attempts(moto_bucket)] == [attempt.id]
