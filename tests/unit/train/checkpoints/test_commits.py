"""Attempts, commits and the fence, with files on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import CheckpointError
from pipeline.train.checkpoints import commits
from pipeline.train.checkpoints.commits import Attempt


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints")


def begin(url: str, resumed_step: int) -> Attempt:
    attempt = commits.begin_attempt(url, resumed_step, enforced=True)
    assert attempt is not None
    return attempt


def commit(url: str, attempt: Attempt, step: int) -> Path:
    folder = Path(url) / f"step-{step:012d}" / attempt.folder
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"data")
    files = [{"name": "data", "size_bytes": 4, "sha256": hashlib.sha256(b"data").hexdigest()}]
    document = {
        "step": step,
        "attempt": attempt.number,
        "tensors": {},
        "progress": {"step": step, "samples": step * 10},
        "files": files,
    }
    commits.write_commit(str(folder), document)
    return folder


def steps(url: str) -> list[int]:
    return [valid.step for valid in commits.find_commits(url).commits]


def test_nothing_is_found_where_nothing_is(url: str) -> None:
    assert commits.find_commits(url) == ([], [])
    assert commits.read_attempts(url) == []


def test_attempts_are_numbered_and_newest_commits_come_first(url: str) -> None:
    first = begin(url, 0)
    for step in (2, 10, 4):
        commit(url, first, step)
    assert steps(url) == [10, 4, 2]
    assert begin(url, 10).number == 2
    assert [a.resumed_step for a in commits.read_attempts(url)] == [0, 10]


def test_late_writes_of_a_dead_attempt_do_not_count(url: str) -> None:
    old = begin(url, 0)
    commit(url, old, 4)
    new = begin(url, 4)
    commit(url, old, 6)  # written after its successor resumed from step 4
    assert steps(url) == [4]
    assert "attempt 2 has resumed from step 4 since" in commits.find_commits(url).skipped[0]
    commit(url, new, 5)
    assert steps(url) == [5, 4]


def test_of_rivals_for_a_number_one_wins(url: str) -> None:
    first = begin(url, 0)
    assert first.number == 1
    (Path(url) / "attempts" / "000002.json").write_text(json.dumps({"id": "aa", "resumed_step": 0}))
    assert begin(url, 0).number == 3


def test_rivals_on_a_weak_store_are_told_apart_by_the_lowest_id(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "WEAK_WAIT_S", 0.0)
    folder = Path(url) / "attempts"
    won = commits.begin_attempt(url, 0, enforced=False)
    assert won is not None
    assert won.number == 1

    def rival(_: float) -> None:
        (folder / "000002-00000000.json").write_text(json.dumps({"id": "00000000", "resumed_step": 3}))

    monkeypatch.setattr(commits.time, "sleep", rival)
    assert commits.begin_attempt(url, 0, enforced=False) is None
    assert [(a.number, a.id) for a in commits.read_attempts(url)][-1] == (2, "00000000")
    assert len(list(folder.iterdir())) == 2, "the loser takes its record back"


def test_a_commit_is_made_once(url: str) -> None:
    attempt = begin(url, 0)
    folder = commit(url, attempt, 1)
    text = json.loads((folder / "commit.json").read_text())
    again = {key: value for key, value in text.items() if key not in ("format", "format_version", "sha256")}
    commits.write_commit(str(folder), again)  # a reply that was lost: the same bytes are ours
    with pytest.raises(CheckpointError, match="another process"):
        commits.write_commit(str(folder), {**again, "step": 2})


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda f: (f / "data").unlink(), "data is missing"),
        (lambda f: (f / "data").write_bytes(b"dat"), "data has 3 bytes instead of 4"),
        (lambda f: (f / "commit.json").write_text("{"), "can't be read"),
        (lambda f: (f / "commit.json").write_text('{"format_version": 99}'), "newer version"),
    ],
)
def test_what_is_not_whole_is_skipped_with_the_reason(url: str, harm: object, reason: str) -> None:
    attempt = begin(url, 0)
    commit(url, attempt, 1)
    harm(commit(url, attempt, 2))  # type: ignore[operator]
    listing = commits.find_commits(url)
    assert [c.step for c in listing.commits] == [1]
    assert listing.skipped == [text for text in listing.skipped if reason in text and "step 2 of attempt 1" in text]
    assert len(listing.skipped) == 1


def test_old_and_stale_ones_are_retired_but_the_last_valid_one_stays(url: str) -> None:
    old = begin(url, 0)
    for step in (1, 2, 3):
        commit(url, old, step)
    (Path(url) / "step-000000000009" / old.folder).mkdir(parents=True)
    (Path(url) / "step-000000000009" / old.folder / "rank-00000.safetensors").write_bytes(b"half")
    new = begin(url, 3)
    commits.retire(url, new, keep_last=1, keep_every_samples=None)
    assert steps(url) == [3]
    assert sorted(p.name for p in Path(url).iterdir()) == ["attempts", "step-000000000003"]


def test_some_are_kept_for_good(url: str) -> None:
    attempt = begin(url, 0)
    for step in range(1, 11):  # 10 samples a step
        commit(url, attempt, step)
    commits.retire(url, attempt, keep_last=2, keep_every_samples=30)
    assert steps(url) == [10, 9, 6, 3]


def test_a_long_run_reads_each_commit_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = begin(url, 0)
    read: list[str] = []
    plainly = storage.read
    monkeypatch.setattr(storage, "read", lambda path: read.append(path) or plainly(path))
    known: dict[str, commits.Commit] = {}
    for step in range(1, 7):
        commit(url, attempt, step)
        commits.retire(url, attempt, keep_last=2, keep_every_samples=30, known=known)
    of_commits = [path for path in read if path.endswith("commit.json")]
    assert len(of_commits) == len(set(of_commits)) == 6
    assert steps(url) == [6, 5, 3]
