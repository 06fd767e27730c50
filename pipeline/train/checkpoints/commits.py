"""Which checkpoints of a run may be resumed: attempts, commits, and the fence between them.

Every start of a run is an *attempt*. It begins by creating `attempts/NNNNNN.json`, create-only, which says the step it
resumed from. A commit of attempt a at step s doesn't count if a later attempt resumed from a step below s: so
whatever a dead attempt still writes can't matter. Rank 0 does all of this.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.errors import CheckpointError
from pipeline.train.checkpoints.fragments import COMMIT_NAME, FORMAT_VERSION

WEAK_WAIT_S = 1.0  # for rivals' records to show in a listing, on stores that ignore If-None-Match
_COMMIT = re.compile(rf"step-(\d+)/(\d+)-[0-9a-f]+/{re.escape(COMMIT_NAME)}$")
_ATTEMPT = re.compile(r"attempts/(\d+)(?:-[0-9a-f]+)?\.json$")


class Attempt(NamedTuple):
    """One start of the run."""

    number: int
    id: str
    resumed_step: int

    @property
    def folder(self) -> str:
        """Name of its folder below each step's."""
        return f"{self.number:06d}-{self.id}"


class Commit(NamedTuple):
    """One complete checkpoint."""

    url: str  # its folder
    step: int
    attempt: int
    document: Mapping[str, Any]

    @property
    def progress(self) -> Mapping[str, Any]:
        """What the loop saved: step, samples, cursor, counters."""
        progress: Mapping[str, Any] = self.document["progress"]
        return progress


class Found(NamedTuple):
    """Commits that count, newest first, and why others don't."""

    commits: list[Commit]
    skipped: list[str]


def read_attempts(url: str) -> list[Attempt]:
    """Attempts recorded below checkpoints folder `url`, by number; of rivals for one number the lowest id counts."""
    found: dict[int, Attempt] = {}
    for entry in storage.entries(storage.join(url, "attempts")):
        match = _ATTEMPT.search(entry.url)
        if not match:
            continue
        try:
            document = json.loads(storage.read(entry.url))
            attempt = Attempt(int(match[1]), str(document["id"]), int(document["resumed_step"]))
        except (FileNotFoundError, ValueError, KeyError):
            continue
        rival = found.get(attempt.number)
        if rival is None or attempt.id < rival.id:
            found[attempt.number] = attempt
    return [found[number] for number in sorted(found)]


def find_commits(url: str, known: dict[str, Commit] | None = None) -> Found:
    """Read all commits below checkpoints folder `url` and sort out those that can't be resumed.

    Looks at commit files and at the presence and size of the files they name; contents are verified when loaded.

    Args:
        url: the checkpoints folder.
        known: commits read before, by path, which aren't read again, as a commit never changes; new ones are added.
    """
    known = {} if known is None else known
    attempts = read_attempts(url)
    commits: list[Commit] = []
    skipped: list[str] = []
    sizes = {entry.url: entry.size_bytes for entry in storage.entries(url)}
    for path in sizes:
        match = _COMMIT.search(path)
        if not match:
            continue
        commit, reason = (known[path], "") if path in known else _read_commit(path)
        if commit is not None:
            known[path] = commit
            reason = _lacking(commit, sizes)
        if commit is not None and not reason:
            fence = [a for a in attempts if a.number > commit.attempt and a.resumed_step < commit.step]
            if not fence:
                commits.append(commit)
                continue
            reason = f"attempt {fence[0].number} has resumed from step {fence[0].resumed_step} since"
        skipped.append(f"step {int(match[1])} of attempt {int(match[2])}: {reason}")
    commits.sort(key=lambda c: (c.step, c.attempt), reverse=True)
    return Found(commits, skipped)


def read_commit(folder: str) -> tuple[Commit | None, str]:
    """The commit of one checkpoint's folder, or why it is none; the fence isn't looked at.

    Raises:
        FileNotFoundError: there is no commit file.
    """
    path = storage.join(folder, COMMIT_NAME)
    if not storage.exists(path):
        raise FileNotFoundError(path)
    commit, reason = _read_commit(path)
    if commit is not None:
        reason = _lacking(commit, {entry.url: entry.size_bytes for entry in storage.entries(folder)})
    return (None if reason else commit), reason


def begin_attempt(url: str, resumed_step: int, *, enforced: bool) -> Attempt | None:
    """Record a new attempt; None when another one took the number, and what to resume must be looked up again.

    Args:
        url: the checkpoints folder.
        resumed_step: step of the commit that will be resumed, 0 for none.
        enforced: whether the store refuses create-only writes onto existing objects. Elsewhere each rival writes a
            file of its own, waits and lists: the lowest id has the number. That is weaker, since a rival may be
            slower than the wait.
    """
    attempts = read_attempts(url)
    attempt = Attempt(attempts[-1].number + 1 if attempts else 1, secrets.token_hex(4), resumed_step)
    record = {"attempt": attempt.number, "id": attempt.id, "resumed_step": resumed_step, "time": time.time()}
    text = json.dumps(record).encode()
    if enforced:
        path = storage.join(url, "attempts", f"{attempt.number:06d}.json")
        created = storage.create(path, text)
        return attempt if created or storage.read(path) == text else None
    path = storage.join(url, "attempts", f"{attempt.folder}.json")
    storage.write(path, text)
    time.sleep(WEAK_WAIT_S)
    winner = next((a for a in read_attempts(url) if a.number == attempt.number), None)
    if winner is not None and winner.id == attempt.id:
        return attempt
    storage.delete(path)
    return None


def write_commit(folder: str, document: Mapping[str, Any]) -> None:
    """Create the commit file of `folder`, the last one of a checkpoint. A lost reply looks like a conflict."""
    path = storage.join(folder, COMMIT_NAME)
    whole = {"format": "vitrail.checkpoint", "format_version": FORMAT_VERSION, **document}
    text = json.dumps({**whole, "sha256": _own_hash(whole)}).encode()
    if not storage.create(path, text) and storage.read(path) != text:
        raise CheckpointError(
            "another process committed here", where=path, fix="let only one job work on a run at a time"
        )


def delete_checkpoint(folder: str) -> None:
    """Remove a checkpoint; its commit goes first, so that a half-removed one is none."""
    storage.delete(storage.join(folder, COMMIT_NAME))
    for entry in list(storage.entries(folder)):
        storage.delete(entry.url)
    if not storage.is_remote(folder):
        for path in (Path(folder), Path(folder).parent):
            with contextlib.suppress(OSError):  # not empty: another attempt's data of the same step
                path.rmdir()


def retire(
    url: str,
    attempt: Attempt,
    keep_last: int,
    keep_every_samples: int | None,
    known: dict[str, Commit] | None = None,
) -> None:
    """Delete checkpoints that needn't be kept: all but the newest `keep_last`, one per `keep_every_samples`, and
    what earlier attempts left without a valid commit. The newest valid one always stays. `known` as `find_commits`'.
    """
    found = find_commits(url, known)
    keep = {commit.url for commit in found.commits[:keep_last]}
    if keep_every_samples:
        marks: dict[int, str] = {}
        for commit in found.commits:  # the oldest at or past each mark is kept, and the loop goes newest first
            marks[int(commit.progress["samples"]) // keep_every_samples] = commit.url
        keep |= {folder for mark, folder in marks.items() if mark > 0}
    folders = {}
    for entry in storage.entries(url):
        match = re.search(r"^(.*/step-\d+/(\d+)-[0-9a-f]+)/[^/]+$", entry.url)
        if match:
            folders[match[1]] = int(match[2])
    committed = {commit.url for commit in found.commits}
    for folder, number in folders.items():
        stale = folder not in committed and number < attempt.number
        if stale or (folder in committed and folder not in keep):
            delete_checkpoint(folder)


def _own_hash(document: Mapping[str, Any]) -> str:
    """Of a commit without its hash, in a form that JSON's freedoms don't change."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _lacking(commit: Commit, sizes: Mapping[str, int]) -> str:
    """Which of the commit's files isn't there in its size; "" when all are. `sizes` by URL."""
    for file in commit.document["files"]:
        size = sizes.get(f"{commit.url}/{file['name']}")
        if size is None:
            return f"{file['name']} is missing"
        if size != file["size_bytes"]:
            return f"{file['name']} has {size} bytes instead of {file['size_bytes']}"
    return ""


def _read_commit(path: str) -> tuple[Commit | None, str]:
    """The commit at `path`, or why it is none."""
    folder = path.removesuffix(f"/{COMMIT_NAME}")
    try:
        document = json.loads(storage.read(path))
        if document["format_version"] > FORMAT_VERSION:
            return None, f"written by a newer version (format {document['format_version']})"
        if document["format_version"] != 1 and document.pop("sha256") != _own_hash(document):
            return None, f"its {COMMIT_NAME} was altered"
        commit = Commit(folder, int(document["step"]), int(document["attempt"]), document)
        _ = document["tensors"], document["progress"]
        _ = [(file["name"], file["size_bytes"]) for file in document["files"]]
    except FileNotFoundError:
        return None, "removed meanwhile"
    except (ValueError, KeyError, TypeError) as error:
        return None, f"its {COMMIT_NAME} can't be read ({error!r})"
    return commit, ""
