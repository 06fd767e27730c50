"""Which checkpoints of a run may be resumed: attempts, commits, and the fence between them.

Every start of a run is an *attempt*. It begins by creating `attempts/NNNNNN.json`, create-only, with the step that it
resumed from. A commit of attempt a at step s is void once a later attempt has resumed from a step below s: so nothing
that a dead attempt still writes can matter. Only rank 0 calls these functions.
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

WEAK_WAIT_S = 1.0  # for the records of other jobs to show in a listing, on stores that ignore If-None-Match
_COMMIT = re.compile(rf"step-(\d+)/(\d+)-[0-9a-f]+/{re.escape(COMMIT_NAME)}$")
_ATTEMPT = re.compile(r"attempts/(\d+)(?:-[0-9a-f]+)?\.json$")


class Attempt(NamedTuple):
    """One start of the run."""

    number: int
    id: str
    resumed_step: int

    @property
    def folder(self) -> str:
        """Name of its folder in the folder of each step."""
        return f"{self.number:06d}-{self.id}"


class Commit(NamedTuple):
    """One complete checkpoint."""

    url: str  # its folder
    step: int
    attempt: int
    document: Mapping[str, Any]

    @property
    def progress(self) -> Mapping[str, Any]:
        """The loop's state: step, samples, cursor, counters."""
        progress: Mapping[str, Any] = self.document["progress"]
        return progress


class FoundCommits(NamedTuple):
    """Commits that can be resumed, newest first, and why the others can't."""

    commits: list[Commit]
    skipped: list[str]


def read_attempts(url: str) -> list[Attempt]:
    """Attempts recorded in checkpoints folder `url`, by number; of several with the same number, that of lowest id."""
    attempts: dict[int, Attempt] = {}
    for entry in storage.entries(storage.join(url, "attempts")):
        match = _ATTEMPT.search(entry.url)
        if not match:
            continue
        try:
            document = json.loads(storage.read(entry.url))
            attempt = Attempt(int(match[1]), str(document["id"]), int(document["resumed_step"]))
        except (FileNotFoundError, ValueError, KeyError):
            continue
        rival = attempts.get(attempt.number)
        if rival is None or attempt.id < rival.id:
            attempts[attempt.number] = attempt
    return [attempts[number] for number in sorted(attempts)]


def find_commits(url: str, known: dict[str, Commit] | None = None) -> FoundCommits:
    """Read all commits in checkpoints folder `url`, and tell those that can be resumed from the others.

    Reads the commit files, and checks the presence and size of the files they name; contents are verified on loading.

    Args:
        url: the checkpoints folder.
        known: commits that were read before, by path: a commit never changes, so they aren't read again. New ones are
            added.
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
            reason = _missing_file(commit, sizes)
        if commit is not None and not reason:
            fence = [a for a in attempts if a.number > commit.attempt and a.resumed_step < commit.step]
            if not fence:
                commits.append(commit)
                continue
            reason = f"attempt {fence[0].number} has resumed from step {fence[0].resumed_step} since"
        skipped.append(f"step {int(match[1])} of attempt {int(match[2])}: {reason}")
    commits.sort(key=lambda c: (c.step, c.attempt), reverse=True)
    return FoundCommits(commits, skipped)


def read_commit(folder: str) -> tuple[Commit | None, str]:
    """The commit of one checkpoint's folder, or why it can't be used; later attempts don't matter here.

    Raises:
        FileNotFoundError: there is no commit file.
    """
    path = storage.join(folder, COMMIT_NAME)
    if not storage.exists(path):
        raise FileNotFoundError(path)
    commit, reason = _read_commit(path)
    if commit is not None:
        reason = _missing_file(commit, {entry.url: entry.size_bytes for entry in storage.entries(folder)})
    return (None if reason else commit), reason


def begin_attempt(url: str, resumed_step: int, *, enforced: bool) -> Attempt | None:
    """Record a new attempt; None when another job took its number first, so that there may be a newer checkpoint.

    Args:
        url: the checkpoints folder.
        resumed_step: step of the commit that will be resumed, 0 for none.
        enforced: whether the store refuses to create what exists. With other stores each job writes a file of its own,
            waits and lists: the lowest id has the number. That is less reliable, since another job may be slower than
            the wait.
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
    """Create the commit file of `folder`, the last file of a checkpoint."""
    path = storage.join(folder, COMMIT_NAME)
    whole = {"format": "vitrail.checkpoint", "format_version": FORMAT_VERSION, **document}
    text = json.dumps({**whole, "sha256": _document_hash(whole)}).encode()
    if not storage.create(path, text) and storage.read(path) != text:  # the same text: only the reply was lost
        raise CheckpointError(
            "another process committed here", where=path, fix="let only one job work on a run at a time"
        )


def delete_checkpoint(folder: str) -> None:
    """Remove a checkpoint, its commit first: without it the rest is no checkpoint."""
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
    """Delete checkpoints but the newest `keep_last` and one per `keep_every_samples`, and what earlier attempts left
    without a valid commit. The newest valid checkpoint always stays. `known` as in `find_commits`.
    """
    commits, _ = find_commits(url, known)
    keep = {commit.url for commit in commits[:keep_last]}
    if keep_every_samples:
        marks: dict[int, str] = {}
        for commit in commits:  # newest first: the oldest at or past each mark is the last to be noted
            marks[int(commit.progress["samples"]) // keep_every_samples] = commit.url
        keep |= {folder for mark, folder in marks.items() if mark > 0}
    folders = {}
    for entry in storage.entries(url):
        match = re.search(r"^(.*/step-\d+/(\d+)-[0-9a-f]+)/[^/]+$", entry.url)
        if match:
            folders[match[1]] = int(match[2])
    committed = {commit.url for commit in commits}
    for folder, number in folders.items():
        stale = folder not in committed and number < attempt.number
        if stale or (folder in committed and folder not in keep):
            delete_checkpoint(folder)


def _document_hash(document: Mapping[str, Any]) -> str:
    """sha256 of a commit without its own hash, in a canonical form of JSON."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _missing_file(commit: Commit, sizes: Mapping[str, int]) -> str:
    """The first of the commit's files that is missing or of another size, in words; "" for none. `sizes` by URL."""
    for file in commit.document["files"]:
        size = sizes.get(f"{commit.url}/{file['name']}")
        if size is None:
            return f"{file['name']} is missing"
        if size != file["size_bytes"]:
            return f"{file['name']} has {size} bytes instead of {file['size_bytes']}"
    return ""


def _read_commit(path: str) -> tuple[Commit | None, str]:
    """The commit at `path`, or why it can't be used."""
    folder = path.removesuffix(f"/{COMMIT_NAME}")
    try:
        document = json.loads(storage.read(path))
        if document["format_version"] > FORMAT_VERSION:
            return None, f"written by a newer version (format {document['format_version']})"
        if document["format_version"] != 1 and document.pop("sha256") != _document_hash(document):
            return None, f"its {COMMIT_NAME} was altered"
        commit = Commit(folder, int(document["step"]), int(document["attempt"]), document)
        _ = document["tensors"], document["progress"]
        _ = [(file["name"], file["size_bytes"]) for file in document["files"]]
    except FileNotFoundError:
        return None, "removed in the meantime"
    except (ValueError, KeyError, TypeError) as error:
        return None, f"its {COMMIT_NAME} can't be read ({error!r})"
    return commit, ""
