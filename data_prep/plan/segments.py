"""Segments: the pieces of input that a data set was built from, one after another.

The first segment is the source as it was; rows that were appended later make another, as do failed inputs that are
tried again (`--retry`). Each segment is planned, shuffled and cut by itself, and its shards are numbered after the
existing ones, so nothing that was published changes.

Segments are files, created only if absent, below `_prep/segments`. Each fingerprint covers the settings and all
earlier segments.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from data_prep.shards.commit import json_bytes
from pipeline import storage
from pipeline.errors import DataError

FORMAT_VERSION = 1


class Segment(NamedTuple):
    """A piece of the inputs."""

    number: int
    kind: Literal["inputs", "retry"]
    start: int  # positions [start, stop) of the source; of a retry: 0 and the source's end
    stop: int
    num_inputs: int
    inputs_sha256: str  # of the source's rows [0, stop)
    reasons: tuple[str, ...]  # of a retry
    positions_sha256: str  # of a retry's positions
    fingerprint: str

    def chosen(self, batch: pa.RecordBatch, positions: Int64[np.ndarray, " p"] | None) -> pa.RecordBatch:
        """The rows of a source's batch that belong to this segment."""
        if positions is not None:
            return batch.filter(pc.is_in(batch.column("position"), pa.array(positions)))
        first = batch.column("position")[0].as_py() if batch.num_rows else 0
        start, stop = max(0, self.start - first), max(0, self.stop - first)
        return batch.slice(start, max(0, min(stop, batch.num_rows) - start))


def read_segments(url: str) -> list[Segment]:
    """The segments begun so far, in order.

    Raises:
        DataError: one is damaged or newer than this reader.
    """
    segments = []
    for entry in storage.entries(_folder(url)):
        if not entry.url.endswith(".json"):
            continue
        try:
            document: dict[str, Any] = json.loads(storage.read(entry.url))
            version = document.pop("format_version")
            if document.pop("format") != "vitrail.segment" or version > FORMAT_VERSION:
                raise ValueError(f"format_version {version} is newer than this reader ({FORMAT_VERSION})")
            segments.append(Segment(**document | {"reasons": tuple(document["reasons"])}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"not a segment of a build ({error})", where=entry.url, fix="restore it, or build again elsewhere"
            ) from error
    return segments


class Retry(NamedTuple):
    """Inputs that are tried again."""

    reasons: Sequence[str]  # for which they were refused
    positions: Int64[np.ndarray, " p"]


def next_segment(
    settings_fingerprint: str,
    earlier: Sequence[Segment],
    span: tuple[int, int],
    inputs_sha256: str,
    retry: Retry | None = None,
) -> Segment:
    """The segment that follows `earlier`; not written yet.

    Args:
        span: positions [start, stop) of its rows in the source; of a retry: 0 and the source's end.
        inputs_sha256: of the source's rows [0, stop).
        retry: None for rows that are new.
    """
    start, stop = span
    content: dict[str, Any] = {
        "kind": "inputs" if retry is None else "retry",
        "start": start,
        "stop": stop,
        "num_inputs": stop - start if retry is None else len(retry.positions),
        "inputs_sha256": inputs_sha256,
        "reasons": [] if retry is None else list(retry.reasons),
        "positions_sha256": "" if retry is None else hashlib.sha256(_npy(retry.positions)).hexdigest(),
    }
    before = earlier[-1].fingerprint if earlier else settings_fingerprint
    fingerprint = hashlib.sha256(before.encode() + json_bytes(content)).hexdigest()
    return Segment(number=len(earlier), fingerprint=fingerprint, **content | {"reasons": tuple(content["reasons"])})


def create_segment(url: str, segment: Segment, positions: Int64[np.ndarray, " p"] | None = None) -> bool:
    """Write a segment's file; False where another build was first, with something else."""
    if positions is not None:
        storage.write(_positions_url(url, segment), _npy(positions))
    place = storage.join(_folder(url), f"{segment.number:06d}.json")
    document = {"format": "vitrail.segment", "format_version": FORMAT_VERSION, **segment._asdict()}
    data = json_bytes(document)
    return storage.create(place, data) or storage.read(place) == data


def read_positions(url: str, segment: Segment) -> Int64[np.ndarray, " p"] | None:
    """The positions that a retry tries again; None for a segment of new inputs."""
    if segment.kind == "inputs":
        return None
    place = _positions_url(url, segment)
    data = storage.read(place)
    if hashlib.sha256(data).hexdigest() != segment.positions_sha256:
        raise DataError("the list of inputs to retry is damaged", where=place, fix="restore it")
    positions: Int64[np.ndarray, " p"] = np.load(io.BytesIO(data), allow_pickle=False)
    return positions


def _folder(url: str) -> str:
    return storage.join(url, "_prep", "segments")


def _positions_url(url: str, segment: Segment) -> str:
    return storage.join(_folder(url), f"{segment.number:06d}-{segment.positions_sha256[:16]}.npy")


def _npy(positions: Int64[np.ndarray, " p"]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(positions, dtype="<i8"), allow_pickle=False)
    return buffer.getvalue()
