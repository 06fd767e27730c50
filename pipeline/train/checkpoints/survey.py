"""What there is of a run's checkpoints, for people: which can be resumed, and why others can't."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.train.checkpoints import commits as committed
from pipeline.train.checkpoints.commits import Attempt, Commit
from pipeline.train.checkpoints.restore import damage_of


class Checkpoint(NamedTuple):
    """One that counts."""

    url: str
    step: int
    samples: int
    attempt: int
    time: float  # Unix seconds
    world_size: int
    size_bytes: int


class Survey(NamedTuple):
    """A checkpoints folder: what can be resumed, newest first, why the rest can't, and the starts of the run."""

    checkpoints: list[Checkpoint]
    skipped: list[str]
    attempts: list[Attempt]
    verified: bool  # whether contents were read, or only presence and sizes looked at

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "valid": [one._asdict() for one in self.checkpoints],
            "skipped": self.skipped,
            "attempts": [one._asdict() for one in self.attempts],
            "verified": self.verified,
        }


def survey(url: str, *, verify: bool = False) -> Survey:
    """Look at a checkpoints folder.

    Args:
        verify: read everything and compare hashes.
    """
    found = committed.find_commits(url)
    skipped = list(found.skipped)
    checkpoints = []
    for commit in found.commits:
        damage = damage_of(commit) if verify else ""
        if damage:
            skipped.append(f"step {commit.step} of attempt {commit.attempt}: {damage}")
        else:
            checkpoints.append(_told(commit))
    return Survey(checkpoints, skipped, committed.read_attempts(url), verify)


def _told(commit: Commit) -> Checkpoint:
    document = commit.document
    return Checkpoint(
        commit.url,
        commit.step,
        int(commit.progress["samples"]),
        commit.attempt,
        float(document.get("time", 0)),
        int(document.get("world_size", 0)),
        sum(int(file["size_bytes"]) for file in document["files"]),
    )
