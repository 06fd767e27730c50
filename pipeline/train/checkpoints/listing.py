"""A run's checkpoints, for people: which can be resumed, and why the others can't."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.train.checkpoints.commits import Attempt, Commit, find_commits, read_attempts
from pipeline.train.checkpoints.restore import damage_of


class ListedCheckpoint(NamedTuple):
    """A checkpoint that can be resumed."""

    url: str
    step: int
    samples: int
    attempt: int
    time: float  # Unix seconds
    world_size: int
    size_bytes: int

    @classmethod
    def of(cls, commit: Commit) -> ListedCheckpoint:
        """The facts of a commit; 0 where a commit of an early version says nothing."""
        document = commit.document
        return cls(
            commit.url,
            commit.step,
            int(commit.progress["samples"]),
            commit.attempt,
            float(document.get("time", 0)),
            int(document.get("world_size", 0)),
            sum(int(file["size_bytes"]) for file in document["files"]),
        )


class CheckpointListing(NamedTuple):
    """A checkpoints folder: what can be resumed, newest first, why the rest can't, and the starts of the run."""

    checkpoints: list[ListedCheckpoint]
    skipped: list[str]
    attempts: list[Attempt]
    verified: bool  # whether contents were read, or only presence and sizes looked at

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "valid": [checkpoint._asdict() for checkpoint in self.checkpoints],
            "skipped": self.skipped,
            "attempts": [attempt._asdict() for attempt in self.attempts],
            "verified": self.verified,
        }


def list_checkpoints(url: str, *, verify: bool = False) -> CheckpointListing:
    """List a checkpoints folder.

    Args:
        verify: read everything and compare hashes.
    """
    commits, skipped = find_commits(url)
    checkpoints = []
    for commit in commits:
        damage = damage_of(commit) if verify else ""
        if damage:
            skipped.append(f"step {commit.step} of attempt {commit.attempt}: {damage}")
        else:
            checkpoints.append(ListedCheckpoint.of(commit))
    return CheckpointListing(checkpoints, skipped, read_attempts(url), verify)
