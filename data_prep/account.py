"""Why inputs don't become samples, and the account of a whole build: inputs = written + filtered + failed.

An input *fails* where it can't be used (it can't be fetched, is damaged, is not text); it is *filtered* where it
could be used, but the settings don't want it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Status = Literal["success", "failed_to_download", "failed_to_resize"]
Phase = Literal["plan", "scan", "write", "publish"]


class Meaning(NamedTuple):
    """What a reason means for its input."""

    status: Status  # in img2dataset's words
    filtered: bool  # usable, but not wanted


_LOST = Meaning("failed_to_download", False)
_BAD = Meaning("failed_to_resize", False)
_UNWANTED = Meaning("failed_to_resize", True)

REASONS: dict[str, Meaning] = {
    "url_empty": _LOST,
    "url_invalid": _LOST,
    "unsupported_scheme": _LOST,
    "place_not_allowed": _LOST,
    "address_not_allowed": _LOST,
    "not_found": _LOST,
    "read_refused": _LOST,
    "name_unknown": _LOST,
    "connection_failed": _LOST,
    "timeout": _LOST,
    "server_busy": _LOST,
    "server_error": _LOST,
    "too_many_redirects": _LOST,
    "too_many_bytes": _LOST,
    "changed_while_reading": _LOST,
    "opted_out": Meaning("failed_to_download", True),
    "empty_file": _BAD,
    "not_an_image": _BAD,
    "image_damaged": _BAD,
    "image_too_large": _BAD,
    "annotations_invalid": _BAD,
    "caption_empty": _BAD,
    "caption_not_text": _BAD,
    "label_invalid": _BAD,
    "image_too_small": _UNWANTED,
    "image_too_elongated": _UNWANTED,
    "caption_too_short": _UNWANTED,
    "caption_too_long": _UNWANTED,
    "duplicate": _UNWANTED,
    "near_duplicate": _UNWANTED,
    "bridges_splits": _UNWANTED,
    "in_evaluation_set": _UNWANTED,
    "score_too_low": _UNWANTED,
    "function_refused": _UNWANTED,
}


class Refused(Exception):  # noqa: N818 -- a verdict on one input, not a defect
    """One input can't become a sample; the build continues and counts it under `reason`."""

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
    """The account of a finished build; counts and `splits` are in a fixed order."""

    name: str
    url: str
    inputs: int
    written: int
    filtered: dict[str, int]
    failed: dict[str, int]
    splits: dict[str, SplitCount]
    fingerprint: str
    examples: dict[str, str]  # reason -> an input that was refused for it, with the message
    resumed_partitions: int = 0  # committed by earlier attempts
    duration_s: float = 0.0

    def document(self) -> dict[str, Any]:
        """As plain data, without what differs between two runs of the same build."""
        return {
            "inputs": self.inputs,
            "written": self.written,
            "filtered": self.filtered,
            "failed": self.failed,
            "splits": {name: count._asdict() for name, count in self.splits.items()},
            "fingerprint": self.fingerprint,
            "examples": self.examples,
        }


class Progress(NamedTuple):
    """Where a build stands; passed to the caller's callback after every partition."""

    phase: Phase
    done: int  # rows; of the phase publish: partitions
    total: int | None  # the same of all, where known
    written: int
    filtered: int
    failed: int
    elapsed_s: float  # of the phase
    size_bytes: int = 0  # of the shards written in this phase
    resumed: int = 0  # those of `done` that earlier attempts did

    def __str__(self) -> str:
        verb = {"plan": "planned", "scan": "scanned", "write": "done", "publish": "published"}[self.phase]
        of = f" of {self.total}" if self.total is not None else ""
        rate = (self.done - self.resumed) / max(self.elapsed_s, 1e-9)
        text = f"{self.done}{of} {'partitions' if self.phase == 'publish' else 'inputs'} {verb}"
        if self.phase == "write":
            text += f": {self.written} written, {self.filtered} filtered, {self.failed} failed"
        speed = f"{rate:.0f}/s"
        if self.size_bytes:
            speed += f", {self.size_bytes / 2**20 / max(self.elapsed_s, 1e-9):.1f} MiB/s"
        if self.total is not None and 0 < self.resumed + 1 <= self.done < self.total:
            speed += f", {_duration((self.total - self.done) / max(rate, 1e-9))} left"
        return f"{text} ({speed})"


def by_reason(counts: Mapping[str, int], *, filtered: bool | None = None) -> dict[str, int]:
    """The counts in the order of `REASONS`, zeros left out; only those of filtered, or of failed inputs, if asked."""
    return {
        reason: counts[reason]
        for reason, meaning in REASONS.items()
        if counts.get(reason) and filtered in (None, meaning.filtered)
    }


def total(counts: Mapping[str, int], *, filtered: bool) -> int:
    """How many inputs were filtered, or failed."""
    return sum(by_reason(counts, filtered=filtered).values())


def describe(counts: Mapping[str, int], examples: Mapping[str, str]) -> str:
    """The most common reasons with their numbers and an example, as text."""
    parts = [f"{count} {reason} (e.g. {examples[reason]})" for reason, count in Counter(counts).most_common(3)]
    return "; ".join(parts)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
