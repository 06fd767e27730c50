"""Scanning all images before anything is written: their digests and hashes, and which of them can't be used.

Each chunk of inputs leaves one object, created only if absent: the first scan's results count in every later attempt,
so splits and duplicates are always decided alike. Bytes from the web are stored beside it until they are packed, since
a second download would cost as much again and might return something else.
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
import pyarrow.compute
import pyarrow.ipc
from jaxtyping import Int64

from data_prep.account import Refused
from data_prep.duplicates.dedup import VERDICTS, JudgedInputs, Signatures, digest_words
from data_prep.duplicates.signatures import perceptual_hash
from data_prep.fetch.inputs import Fetched, FetchRequest, fetch_all
from data_prep.fetch.web import is_web
from data_prep.output import check_attempt
from data_prep.samples import images
from data_prep.samples.packing import SegmentJob, read_texts
from data_prep.sources.base import SCHEMA
from pipeline import storage

CHUNK_ROWS = 2048
SCAN_SCHEMA = pa.schema(
    [
        ("sha256", pa.binary()),  # null where the image couldn't be read
        ("hash", pa.uint64()),  # perceptual; 0 where it isn't needed
        ("reason", pa.string()),  # null: usable
        ("message", pa.string()),
        ("held", pa.string()),  # where a copy of the bytes is stored, and the range
        ("start", pa.int64()),
        ("stop", pa.int64()),
    ]
)
_BLOB_BYTES = 64 * 2**20


class Chunk(NamedTuple):
    """Inputs that one task scans."""

    number: int
    inputs: pa.RecordBatch  # of sources.SCHEMA


def scan(job: SegmentJob, chunk: Chunk) -> tuple[int, int]:
    """Scan a chunk's images and store the result; returns the chunk's number and its number of inputs."""
    place = scan_url(job.config.output, job.segment, chunk.number)
    if not storage.exists(place):
        result = _scan_chunk(job, chunk)
        check_attempt(job.config.output, job.attempt)
        storage.create(place, result)
    return chunk.number, chunk.inputs.num_rows


def scan_url(url: str, segment: int, number: int) -> str:
    """Where the result of a chunk's scan is stored."""
    return storage.join(url, "_prep", "scan", f"{segment:06d}", f"{number:06d}.arrow")


def read_scan(url: str, segment: int, number: int) -> pa.RecordBatch:
    """The result of a chunk's scan: a batch of `SCAN_SCHEMA`."""
    return pa.ipc.open_file(io.BytesIO(storage.read(scan_url(url, segment, number)))).get_batch(0)


def signatures_of(scanned: pa.RecordBatch) -> Signatures:
    """What `dedup` judges a chunk by.

    Args:
        scanned: a batch of `SCAN_SCHEMA`.
    """
    return Signatures(
        digest_words(scanned.column("sha256")),
        scanned.column("hash").to_numpy(),
        scanned.column("reason").is_null().to_numpy(zero_copy_only=False),
    )


def joined(parts: Sequence[Signatures]) -> Signatures:
    """Signatures end to end."""
    if not parts:
        return Signatures(np.zeros((0, 2), np.uint64), np.zeros(0, np.uint64), np.zeros(0, bool))
    return Signatures(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def with_verdicts(
    inputs: pa.RecordBatch, scanned: pa.RecordBatch, judged: JudgedInputs, start: int, splits: Sequence[str] | None
) -> pa.RecordBatch:
    """Inputs with what was found about them and decided.

    Args:
        scanned: what was found, a batch of `SCAN_SCHEMA`.
        start: number of the batch's first input among all that were judged.
        splits: names of the splits; None: the source says which split an input belongs to.
    """
    decisions = judged.decisions
    verdicts: list[bytes | None] = []
    for i, (reason, message) in enumerate(
        zip(scanned.column("reason").to_pylist(), scanned.column("message").to_pylist(), strict=True), start
    ):
        if reason is None and decisions.verdicts[i]:
            reason = VERDICTS[decisions.verdicts[i]]
            message = _same_as(reason, int(decisions.others[i]), judged.positions)
        verdicts.append(json.dumps([reason, message]).encode() if reason is not None else None)
    columns = {"sha256": scanned.column("sha256"), "verdict": pa.array(verdicts, pa.binary())}
    if splits is not None:
        chosen = decisions.splits[start : start + inputs.num_rows]
        columns["split"] = pa.array([splits[number].encode() for number in chosen], pa.binary())
    has_copy = scanned.column("held").is_valid()
    if has_copy.true_count:
        for name in ("held", "start", "stop"):
            of_copy = scanned.column(name).cast(SCHEMA.field(name).type)
            columns[name] = pa.compute.if_else(has_copy, of_copy, inputs.column(name))
    for name, column in columns.items():
        inputs = inputs.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), column)
    return inputs


def _same_as(reason: str, other: int, positions: Int64[np.ndarray, " n"]) -> str:
    """What an input is the same as, for its row in the sidecar."""
    if reason == "in_evaluation_set":
        return f"equal to, or like, image {other} of the evaluation sets"
    if reason == "bridges_splits":
        return "like images of different splits"
    return f"{'equal to' if reason == 'duplicate' else 'like'} input {positions[other]}"


def _scan_chunk(job: SegmentJob, chunk: Chunk) -> bytes:
    """What is found about a chunk's images, as a file of one batch of `SCAN_SCHEMA`."""
    rows = chunk.inputs.to_pylist()
    facts: list[dict[str, Any]] = [{} for _ in rows]
    to_fetch = []
    for i, row in enumerate(rows):
        try:
            if row["sidecar"] is None:
                read_texts(job, row)
            to_fetch.append(i)
        except Refused as refused:
            facts[i] = {"reason": refused.reason, "message": refused.message}
    blobs = _Blobs(f"{scan_url(job.config.output, job.segment, chunk.number)}-{secrets.token_hex(4)}")
    wanted = [FetchRequest.of(rows[i]) for i in to_fetch]
    for number, result in fetch_all(wanted, job.places, job.config.fetch, tasks_at_once=job.tasks_at_once):
        i = to_fetch[number]
        try:
            if isinstance(result, Refused):
                raise result
            facts[i]["sha256"] = hashlib.sha256(result.data).digest()
            facts[i] |= _check(job, rows[i], result)
            if rows[i]["held"] is None and is_web(rows[i]["url"]):
                facts[i] |= blobs.add(result.data)
        except Refused as refused:
            facts[i] |= {"reason": refused.reason, "message": refused.message}
    blobs.flush()
    arrays = [
        pa.array([_clean(row.get(field.name, 0 if field.name == "hash" else None)) for row in facts], field.type)
        for field in SCAN_SCHEMA
    ]
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, SCAN_SCHEMA) as file:
        file.write_batch(pa.RecordBatch.from_arrays(arrays, schema=SCAN_SCHEMA))
    return buffer.getvalue()


def _check(job: SegmentJob, row: dict[str, Any], result: Fetched) -> dict[str, int]:
    """Apply every rule that needs no model, since only a usable image may represent its duplicates.

    Returns:
        The image's perceptual hash, where it is needed.

    Raises:
        Refused: the image can't be used.
    """
    if row["sidecar"] is not None:
        read_texts(job, row, result.sidecar)
    if job.config.dedup.needs_hashes:
        return {"hash": perceptual_hash(images.thumbnail(result.data, job.config.image))}
    images.check(result.data, job.config.image)
    return {}


def _clean(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


class _Blobs:
    """Copies of downloaded bytes, in objects of bounded size."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._pieces: list[bytes] = []
        self._size = 0
        self._number = 0

    def add(self, data: bytes) -> dict[str, Any]:
        """Store `data`; returns where it will be."""
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
    """A segment's inputs in chunks, cut the same way whatever batches they come in."""
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
                yield Chunk(number, _joined_batch(held))
                held, rows, number = [], 0, number + 1
    if held:
        yield Chunk(number, _joined_batch(held))


def _joined_batch(held: list[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.Table.from_batches(held, schema=SCHEMA).combine_chunks().to_batches()[0]
