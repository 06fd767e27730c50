"""Bytes of a checkpoint: fragments of one rank in a safetensors file, and a table that says what lies where.

    step-000000000120/000003-9f2c51ab/      data of attempt 3 at step 120
        rank-00000.safetensors              the fragments' tensors
        rank-00000.table.json               name, span, group settings; place, type and sha256 of each tensor
        rank-00000.receipt.json             size and sha256 of the two, written after them
        commit.json                         written last, create-only: progress, facts of all tensors, all receipts

A reader needs no safetensors library for ranged reads: the table holds absolute byte offsets. See docs/formats.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.train.engine.base import Fragment, Span

FORMAT_VERSION = 2  # 1: commits without a hash of their own
COMMIT_NAME = "commit.json"
READ_BYTES = 64 * 2**20  # neighbouring tensors are fetched in one request up to this size

DTYPES = {
    "float64": (torch.float64, "F64"),
    "float32": (torch.float32, "F32"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "int64": (torch.int64, "I64"),
    "int32": (torch.int32, "I32"),
    "int16": (torch.int16, "I16"),
    "int8": (torch.int8, "I8"),
    "uint8": (torch.uint8, "U8"),
    "bool": (torch.bool, "BOOL"),
}


class Damaged(Exception):  # noqa: N818 -- a finding about a checkpoint, answered by falling back to an older one
    """A checkpoint isn't what its commit says: something is missing, cut short or altered."""


class Place(NamedTuple):
    """Where one tensor of a fragment lies in its file."""

    key: str
    dtype: str
    offset: int
    size_bytes: int


class Plan(NamedTuple):
    """Layout of one rank's file: its header, and the place of every fragment's tensors."""

    header: bytes
    places: list[list[Place]]  # by fragment
    size_bytes: int


class Row(NamedTuple):
    """One fragment as the table tells it."""

    span: Span
    group: dict[str, float]
    places: list[tuple[Place, str]]  # with sha256


def plan_file(fragments: Sequence[Fragment]) -> Plan:
    """Lay fragments out as a safetensors file."""
    entries: dict[str, Any] = {}
    relative: list[list[Place]] = [[] for _ in fragments]
    order = sorted(
        ((i, key) for i, fragment in enumerate(fragments) for key in fragment.tensors),
        key=lambda x: -fragments[x[0]].tensors[x[1]].element_size(),  # wide types first: everything stays aligned
    )
    at = 0
    for i, key in order:
        fragment = fragments[i]
        tensor = fragment.tensors[key]
        dtype = str(tensor.dtype).removeprefix("torch.")
        size = tensor.numel() * tensor.element_size()
        entries[f"{fragment.name}/{fragment.start}/{key}"] = {
            "dtype": DTYPES[dtype][1],
            "shape": [tensor.numel()],
            "data_offsets": [at, at + size],
        }
        relative[i].append(Place(key, dtype, at, size))
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = [[place._replace(offset=place.offset + len(header)) for place in one] for one in relative]
    return Plan(header, places, len(header) + at)


def copy_to_host(fragments: Sequence[Fragment], plan: Plan, buffer: Tensor) -> None:
    """Fill `buffer` (uint8, at least `plan.size_bytes`) with the file; the fragments aren't needed afterwards."""
    header = torch.frombuffer(bytearray(plan.header), dtype=torch.uint8)
    buffer[: len(plan.header)].copy_(header)
    for fragment, places in zip(fragments, plan.places, strict=True):
        for place in places:
            if place.size_bytes:
                source = fragment.tensors[place.key].detach().contiguous().view(-1).view(torch.uint8)
                buffer[place.offset : place.offset + place.size_bytes].copy_(source, non_blocking=True)
    if any(tensor.is_cuda for fragment in fragments for tensor in fragment.tensors.values()):
        torch.cuda.synchronize()


def table_of(fragments: Iterable[tuple[Span, Mapping[str, float]]], plan: Plan, data: memoryview, file: str) -> bytes:
    """The table of a filled buffer."""
    rows = []
    for (span, group), places in zip(fragments, plan.places, strict=True):
        tensors = {
            place.key: {
                "dtype": place.dtype,
                "offset": place.offset,
                "size_bytes": place.size_bytes,
                "sha256": _sha256(data[place.offset : place.offset + place.size_bytes]),
            }
            for place in places
        }
        rows.append(
            {"name": span.name, "start": span.start, "stop": span.stop, "group": dict(group), "tensors": tensors}
        )
    document = {"format": "vitrail.fragments", "format_version": FORMAT_VERSION, "file": file, "fragments": rows}
    return json.dumps(document, separators=(",", ":")).encode()


def receipt_of(files: Mapping[str, bytes | memoryview]) -> bytes:
    """Sizes and hashes of one rank's files."""
    rows = [{"name": name, "size_bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()]
    return json.dumps({"files": rows}).encode()


def parse_table(text: bytes, sha256: str) -> tuple[str, list[Row]]:
    """The data file's name and the rows of a table whose hash is known from the commit.

    Raises:
        Damaged: the text isn't what was committed.
    """
    if _sha256(text) != sha256:
        raise Damaged("a table was altered")
    document = json.loads(text)
    rows = []
    for row in document["fragments"]:
        places = [
            (Place(key, t["dtype"], t["offset"], t["size_bytes"]), t["sha256"]) for key, t in row["tensors"].items()
        ]
        rows.append(Row(Span(row["name"], row["start"], row["stop"]), row["group"], places))
    return document["file"], rows


def fetch_rows(
    rows: Sequence[Row], read_range: Callable[[int, int], bytes], keys: frozenset[str] | None = None
) -> list[Fragment]:
    """Read rows of one file in few requests, and verify every tensor.

    Args:
        rows: what is wanted.
        read_range: reads bytes [start, stop) of the file.
        keys: tensors wanted of each fragment; None for all.

    Raises:
        Damaged: bytes are missing or altered.
    """
    wanted = sorted(
        (
            (place, digest, i)
            for i, row in enumerate(rows)
            for place, digest in row.places
            if not keys or place.key in keys
        ),
        key=lambda x: x[0].offset,
    )
    tensors: list[dict[str, Tensor]] = [{} for _ in rows]
    at = 0
    while at < len(wanted):
        start = stop = wanted[at][0].offset
        last = at
        while last < len(wanted) and wanted[last][0].offset <= stop + 65536:
            end = wanted[last][0].offset + wanted[last][0].size_bytes
            if last > at and end - start > READ_BYTES:
                break
            stop, last = max(stop, end), last + 1
        data = memoryview(read_range(start, stop))
        for place, digest, i in wanted[at:last]:
            part = data[place.offset - start : place.offset - start + place.size_bytes]
            if len(part) != place.size_bytes or _sha256(part) != digest:
                raise Damaged(f"{rows[i].span.name} ({place.key}) was cut short or altered")
            dtype = DTYPES[place.dtype][0]
            empty = not place.size_bytes
            tensors[i][place.key] = (
                torch.empty(0, dtype=dtype) if empty else torch.frombuffer(bytearray(part), dtype=dtype)
            )
        at = last
    return [Fragment(*row.span, own, row.group) for row, own in zip(rows, tensors, strict=True)]


class Gathered:
    """Fragments in host memory, from which any span they cover can be read."""

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        self._by_name: dict[str, list[Fragment]] = {}
        for fragment in fragments:
            self._by_name.setdefault(fragment.name, []).append(fragment)

    def read(self, name: str, start: int, stop: int) -> Fragment:
        """The span, put together from the pieces that overlap it.

        Raises:
            Damaged: a part of it is nowhere.
        """
        pieces = sorted(
            (f for f in self._by_name.get(name, []) if f.start < stop and f.stop > start), key=lambda f: f.start
        )
        if len(pieces) == 1 and pieces[0].start == start and pieces[0].stop == stop:
            return pieces[0]
        if not pieces and start == stop:
            pieces = self._by_name.get(name, [])[:1]
        if not pieces:
            raise Damaged(f"{name} isn't in the checkpoint")
        joined = {
            key: torch.cat([f.tensors[key][max(start - f.start, 0) : stop - f.start] for f in pieces])
            for key in pieces[0].tensors
        }
        if any(len(tensor) != stop - start for tensor in joined.values()):
            raise Damaged(f"parts of {name} aren't in the checkpoint")
        return Fragment(name, start, stop, joined, pieces[0].group)


def uncovered(wanted: Iterable[Span], rows: Iterable[Row]) -> list[Span]:
    """The wanted spans that rows don't hold completely."""
    held: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        held.setdefault(row.span.name, []).append((row.span.start, row.span.stop))
    missing = []
    for span in wanted:
        at = span.start
        for start, stop in sorted(held.get(span.name, [])):
            if start <= at:
                at = max(at, stop)
        if at < span.stop or span.name not in held:
            missing.append(span)
    return missing


def overlaps(row: Row, wanted: Mapping[str, Sequence[Span]]) -> bool:
    """Whether a row holds a part of a wanted span (grouped by name)."""
    return any(
        (s.start < row.span.stop and s.stop > row.span.start) or s.start == s.stop
        for s in wanted.get(row.span.name, ())
    )


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
