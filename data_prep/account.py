"""Why an input doesn't become a sample, and the account of a whole build: inputs = written + failed, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Status = Literal["success", "failed_to_download", "failed_to_resize"]

# Reason -> the status img2dataset's readers know. The reason is the finer word and what `PrepReport` counts.
REASONS: dict[str, Status] = {
    "url_empty": "failed_to_download",
    "unsupported_scheme": "failed_to_download",
    "place_not_allowed": "failed_to_download",
    "not_found": "failed_to_download",
    "read_refused": "failed_to_download",
    "too_many_bytes": "failed_to_download",
    "changed_while_reading": "failed_to_download",
    "empty_file": "failed_to_resize",
    "not_an_image": "failed_to_resize",
    "image_damaged": "failed_to_resize",
    "image_too_large": "failed_to_resize",
    "image_too_small": "failed_to_resize",
    "image_too_elongated": "failed_to_resize",
    "annotations_invalid": "failed_to_resize",
    "caption_empty": "failed_to_resize",
    "caption_too_short": "failed_to_resize",
    "caption_too_long": "failed_to_resize",
    "caption_not_text": "failed_to_resize",
    "label_invalid": "failed_to_resize",
}


class Refused(Exception):  # noqa: N818 -- a verdict on one input, not a defect
    """One input can't become a sample; the build goes on and counts it under `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


class SplitCount(NamedTuple):
    """What a split holds."""

    samples: int
    shards: int
    size_bytes: int


class PrepReport(NamedTuple):
    """The account of a finished build; `failed` and `splits` are in a fixed order."""

    name: str
    url: str
    inputs: int
    written: int
    failed: dict[str, int]
    splits: dict[str, SplitCount]
    fingerprint: str
    examples: dict[str, str]  # reason -> one input it struck, with the message
    resumed_partitions: int = 0  # committed by earlier attempts
    duration_s: float = 0.0

    def document(self) -> dict[str, Any]:
        """As plain data, without what differs between two runs of the same build."""
        return {
            "inputs": self.inputs,
            "written": self.written,
            "failed": self.failed,
            "splits": {name: count._asdict() for name, count in self.splits.items()},
            "fingerprint": self.fingerprint,
            "examples": self.examples,
        }


class Progress(NamedTuple):
    """Where a build stands; handed to the caller's callback after every partition."""

    phase: Literal["plan", "scan", "write"]
    done: int  # rows
    total: int | None  # rows, where known
    written: int
    failed: int
    elapsed_s: float

    def __str__(self) -> str:
        doing = {"plan": "planned", "scan": "digested", "write": "done"}[self.phase]
        of = f" of {self.total}" if self.total is not None else ""
        account = f": {self.written} written, {self.failed} failed" if self.phase == "write" else ""
        return f"{self.done}{of} inputs {doing}{account} ({self.done / max(self.elapsed_s, 1e-9):.0f}/s)"


def by_reason(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts in the order of `REASONS`, zeros left out."""
    return {reason: counts[reason] for reason in REASONS if counts.get(reason)}


def describe(failed: Counter[str], examples: Mapping[str, str]) -> str:
    """The commonest reasons with their numbers and an example, as a phrase."""
    parts = [f"{count} {reason} (e.g. {examples[reason]})" for reason, count in failed.most_common(3)]
    return "; ".join(parts)
