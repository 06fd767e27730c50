"""Looking at all images before anything is written: their digests and hashes, and who can't be used anyway.

Each chunk of inputs leaves one object, created only if absent: what the first look found counts in every later
attempt, so splits and duplicates are decided the same way. Bytes from the web are kept beside it until they are packed,
since a second download would cost as much again and might give something else.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from data_prep.account import Refused
from data_prep.duplicates.dedup import VERDICTS, Decisions, Signatures, digest_words
from data_prep.duplicates.signatures import perceptual_hash
from data_prep.fetch.inputs import Fetched, Wanted, fetch_all
from data_prep.fetch.web import is_web
from data_prep.samples import images
from data_prep.samples.packing import SegmentJob, check_attempt, read_texts
from data_prep.sources.base import SCHEMA
from pipeline import storage

CHUNK_ROWS = 2048
LOOKED_AT = pa.schema(
    [
        ("sha256", pa.binary()),  # null where the image couldn't be read
        ("hash", pa.uint64()),  # perceptual; 0 where it isn't needed
        ("reason", pa.string()),  # null: usable
        ("message", pa.string()),
        ("held", pa.string()),  # where the bytes are kept, and which
        ("start", pa.int64()),
        ("stop", pa.int64()),
    ]
)
_BLOB_BYTES = 64 * 2**20


class Chunk(NamedTuple):
    """Inputs that are looked at together."""

    number: int
    inputs: pa.RecordBatch  # of sources.SCHEMA


def scan(job: SegmentJob, chunk: Chunk) -> tuple[int, int]:
    """Look at a chunk's images and write down what was found; returns the chunk's number and size."""
    place = scan_url(job.config.output, job.segment, chunk.number)
    if not storage.exists(place):
        found = _look(job, chunk)
        check_attempt(job.config.output, job.attempt)
        storage.create(place, found)
    return chunk.number, chunk.inputs.num_rows


def scan_url(url: str, segment: int, number: int) -> str:
    """Where what was found about a chunk stands."""
    return storage.join(url, "_prep", "scan", f"{segment:06d}", f"{number:06d}.arrow")


def read_scan(url: str, segment: int, number: int) -> pa.RecordBatch:
    """What was found about a chunk: a batch of `LOOKED_AT`."""
    return pa.ipc.open_file(io.BytesIO(storage.read(scan_url(url, segment, number)))).get_batch(0)


def signatures_of(found: pa.RecordBatch) -> Signatures:
    """What `dedup` judges a chunk by."""
    return Signatures(
        digest_words(found.column("sha256")),
        found.column("hash").to_numpy(),
        found.column("reason").is_null().to_numpy(zero_copy_only=False),
    )


def joined(parts: Sequence[Signatures]) -> Signatures:
    """Signatures end to end."""
    if not parts:
        return Signatures(np.zeros((0, 2), np.uint64), np.zeros(0, np.uint64), np.zeros(0, bool))
    return Signatures(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def with_decisions(
    inputs: pa.RecordBatch,
    found: pa.RecordBatch,
    decisions: Decisions,
    start: int,
    positions: np.ndarray[Any, np.dtype[np.int64]],
    splits: Sequence[str],
    *,
    names_splits: bool,
) -> pa.RecordBatch:
    """Inputs with what was found about them and decided.

    Args:
        start: place of the batch's first input among all that were judged.
        positions: of all that were judged.
        names_splits: the source says which split an input belongs to.
    """
    verdicts: list[bytes | None] = []
    for i, (reason, message) in enumerate(
        zip(found.column("reason").to_pylist(), found.column("message").to_pylist(), strict=True), start
    ):
        if reason is None and decisions.verdicts[i]:
            reason = VERDICTS[decisions.verdicts[i]]
            message = _same_as(reason, int(decisions.others[i]), positions)
        verdicts.append(json.dumps([reason, message]).encode() if reason is not None else None)
    columns = {name: found.column(name) for name in ("sha256",)}
    columns["verdict"] = pa.array(verdicts, pa.binary())
    if not names_splits:
        chosen = decisions.splits[start : start + inputs.num_rows]
        columns["split"] = pa.array([splits[number].encode() for number in chosen], pa.binary())
    kept = found.column("held").is_valid()
    if kept.true_count:
        for name in ("held", "start", "stop"):
            ours = found.column(name).cast(SCHEMA.field(name).type)
            columns[name] = pa.compute.if_else(kept, ours, inputs.column(name))
    for name, column in columns.items():
        inputs = inputs.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), column)
    return inputs


def _same_as(reason: str, other: int, positions: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    if reason == "in_evaluation_set":
        return f"equal to, or like, image {other} of the evaluation sets"
    if reason == "bridges_splits":
        return "like images of different splits"
    return f"{'equal to' if reason == 'duplicate' else 'like'} input {positions[other]}"


def _look(job: SegmentJob, chunk: Chunk) -> bytes:
    rows = chunk.inputs.to_pylist()
    found: list[dict[str, Any]] = [{} for _ in rows]
    wanted = []
    for i, row in enumerate(rows):
        try:
            if row["sidecar"] is None:
                read_texts(job, row)
            wanted.append(i)
        except Refused as refused:
            found[i] = {"reason": refused.reason, "message": refused.message}
    blobs = _Blobs(f"{scan_url(job.config.output, job.segment, chunk.number)}-{secrets.token_hex(4)}")
    asked = [Wanted.of(rows[i]) for i in wanted]
    for number, result in fetch_all(asked, job.places, job.config.fetch, tasks_at_once=job.tasks_at_once):
        i = wanted[number]
        try:
            if isinstance(result, Refused):
                raise result
            found[i]["sha256"] = hashlib.sha256(result.data).digest()
            _check(job, rows[i], result, found[i])
            if rows[i]["held"] is None and is_web(rows[i]["url"]):
                found[i] |= blobs.add(result.data)
        except Refused as refused:
            found[i] |= {"reason": refused.reason, "message": refused.message}
    blobs.flush()
    arrays = [
        pa.array([_clean(row.get(field.name, 0 if field.name == "hash" else None)) for row in found], field.type)
        for field in LOOKED_AT
    ]
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, LOOKED_AT) as file:
        file.write_batch(pa.RecordBatch.from_arrays(arrays, schema=LOOKED_AT))
    return buffer.getvalue()


def _check(job: SegmentJob, row: dict[str, Any], result: Fetched, found: dict[str, Any]) -> None:
    """Apply every rule that needs no model, since only a usable image may stand for its duplicates."""
    if row["sidecar"] is not None:
        read_texts(job, row, result.sidecar)
    if job.config.dedup.looks_at_pixels:
        found["hash"] = perceptual_hash(images.thumbnail(result.data, job.config.image))
    else:
        images.check(result.data, job.config.image)


def _clean(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


class _Blobs:
    """Bytes that are kept, in objects of bounded size."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._pieces: list[bytes] = []
        self._size = 0
        self._number = 0

    def add(self, data: bytes) -> dict[str, Any]:
        """Keep `data`; where it will be."""
        if self._size + len(data) > _BLOB_BYTES:
            self.flush()
        start, self._size = self._size, self._size + len(data)
        self._pieces.append(data)
        return {"held": self._url(), "start": start, "stop": self._size}

    def flush(self) -> None:
        if self._pieces:
            storage.write(self._url(), b"".join(self._pieces))
            self._number += 1
        self._pieces, self._size = [], 0

    def _url(self) -> str:
        return f"{self._prefix}-{self._number}.bytes"


def chunks(batches: Iterator[pa.RecordBatch]) -> Iterator[Chunk]:
    """A segment's inputs in pieces that one task looks at, cut the same way however they come."""
    held: list[pa.RecordBatch] = []
    rows = number = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            piece = batch.slice(start, CHUNK_ROWS - rows)
            held.append(piece)
            rows += piece.num_rows
            start += piece.num_rows
            if rows == CHUNK_ROWS:
                yield Chunk(number, _one(held))
                held, rows, number = [], 0, number + 1
    if held:
        yield Chunk(number, _one(held))


def _one(held: list[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.Table.from_batches(held, schema=SCHEMA).combine_chunks().to_batches()[0]
