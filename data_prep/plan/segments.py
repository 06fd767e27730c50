"""Segments: what a data set was built from, one piece after another, each appended to what is there.

The first segment is the source as it was; rows that were appended since make another, as do failed inputs that are
tried once more (`--retry`). A segment is planned, shuffled and cut by itself and its shards are numbered after those
that exist, so nothing that was published changes.

Segments are files, created only if absent, below `_prep/segments`. Each fingerprint covers the settings and all
segments before.
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
    found = []
    for entry in storage.entries(_folder(url)):
        if not entry.url.endswith(".json"):
            continue
        try:
            document: dict[str, Any] = json.loads(storage.read(entry.url))
            version = document.pop("format_version")
            if document.pop("format") != "vitrail.segment" or version > FORMAT_VERSION:
                raise ValueError(f"format_version {version} is newer than this reader ({FORMAT_VERSION})")
            found.append(Segment(**document | {"reasons": tuple(document["reasons"])}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"no segment of a build ({error})", where=entry.url, fix="restore it, or build anew elsewhere"
            ) from error
    return found


def next_segment(
    settings_fingerprint: str,
    earlier: Sequence[Segment],
    kind: Literal["inputs", "retry"],
    span: tuple[int, int],
    inputs_sha256: str,
    *,
    reasons: Sequence[str] = (),
    positions: Int64[np.ndarray, " p"] | None = None,
) -> Segment:
    """The segment that follows `earlier`; not written yet."""
    start, stop = span
    content: dict[str, Any] = {
        "kind": kind,
        "start": start,
        "stop": stop,
        "num_inputs": len(positions) if positions is not None else stop - start,
        "inputs_sha256": inputs_sha256,
        "reasons": list(reasons),
        "positions_sha256": hashlib.sha256(_npy(positions)).hexdigest() if positions is not None else "",
    }
    before = earlier[-1].fingerprint if earlier else settings_fingerprint
    fingerprint = hashlib.sha256(before.encode() + json_bytes(content)).hexdigest()
    return Segment(number=len(earlier), fingerprint=fingerprint, **content | {"reasons": tuple(reasons)})


def create_segment(url: str, segment: Segment, positions: Int64[np.ndarray, " p"] | None = None) -> bool:
    """Write a segment down; False where another build did so first, with something else."""
    if positions is not None:
        storage.write(_positions_url(url, segment), _npy(positions))
    place = storage.join(_folder(url), f"{segment.number:06d}.json")
    document = {"format": "vitrail.segment", "format_version": FORMAT_VERSION, **segment._asdict()}
    data = json_bytes(document)
    return storage.create(place, data) or storage.read(place) == data


def read_positions(url: str, segment: Segment) -> Int64[np.ndarray, " p"] | None:
    """The positions a retry tries; None for a segment of inputs."""
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
