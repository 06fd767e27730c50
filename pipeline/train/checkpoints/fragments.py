"""A checkpoint in bytes: the fragments of one rank in a safetensors file, and a table of what lies where.

    step-000000000120/000003-9f2c51ab/      data of attempt 3 at step 120
        rank-00000.safetensors              the fragments' tensors
        rank-00000.table.json               name, span, group settings; offset, type and sha256 of each tensor
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


class Damaged(Exception):  # noqa: N818 -- no error of the program: the caller falls back to an older checkpoint
    """A checkpoint isn't what its commit says: something is missing, cut short or altered."""


class StoredTensor(NamedTuple):
    """One tensor of a fragment in its file."""

    key: str
    dtype: str
    offset: int  # bytes from the start of the file
    size_bytes: int


class FileLayout(NamedTuple):
    """Layout of one rank's file: its header, and where every fragment's tensors lie."""

    header: bytes
    tensors: list[list[StoredTensor]]  # by fragment
    size_bytes: int


class StoredFragment(NamedTuple):
    """One fragment as a row of the table describes it."""

    span: Span
    group: dict[str, float]
    tensors: list[tuple[StoredTensor, str]]  # with sha256


def lay_out(fragments: Sequence[Fragment]) -> FileLayout:
    """Lay fragments out as a safetensors file."""
    entries: dict[str, Any] = {}
    after_header: list[list[StoredTensor]] = [[] for _ in fragments]
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
        after_header[i].append(StoredTensor(key, dtype, at, size))
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    tensors = [
        [stored._replace(offset=stored.offset + len(header)) for stored in of_fragment] for of_fragment in after_header
    ]
    return FileLayout(header, tensors, len(header) + at)


def copy_to_host(fragments: Sequence[Fragment], layout: FileLayout, buffer: Tensor) -> None:
    """Fill `buffer` (uint8, at least `layout.size_bytes`) with the file; the fragments aren't needed afterwards."""
    header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
    buffer[: len(layout.header)].copy_(header)
    for fragment, tensors in zip(fragments, layout.tensors, strict=True):
        for stored in tensors:
            if stored.size_bytes:
                source = fragment.tensors[stored.key].detach().contiguous().view(-1).view(torch.uint8)
                buffer[stored.offset : stored.offset + stored.size_bytes].copy_(source, non_blocking=True)
    if any(tensor.is_cuda for fragment in fragments for tensor in fragment.tensors.values()):
        torch.cuda.synchronize()


def table_of(
    fragments: Iterable[tuple[Span, Mapping[str, float]]], layout: FileLayout, data: memoryview, file: str
) -> bytes:
    """The table of a filled buffer.

    Args:
        fragments: span and group settings of each.
        layout: of the file.
        data: the file's contents.
        file: its name.
    """
    rows = []
    for (span, group), tensors in zip(fragments, layout.tensors, strict=True):
        described = {
            stored.key: {
                "dtype": stored.dtype,
                "offset": stored.offset,
                "size_bytes": stored.size_bytes,
                "sha256": _sha256(data[stored.offset : stored.offset + stored.size_bytes]),
            }
            for stored in tensors
        }
        rows.append(
            {"name": span.name, "start": span.start, "stop": span.stop, "group": dict(group), "tensors": described}
        )
    document = {"format": "vitrail.fragments", "format_version": FORMAT_VERSION, "file": file, "fragments": rows}
    return json.dumps(document, separators=(",", ":")).encode()


def receipt_of(files: Mapping[str, bytes | memoryview]) -> bytes:
    """Sizes and hashes of one rank's files."""
    rows = [{"name": name, "size_bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()]
    return json.dumps({"files": rows}).encode()


def parse_table(text: bytes, sha256: str) -> tuple[str, list[StoredFragment]]:
    """The data file's name and the fragments of a table whose hash is known from the commit.

    Raises:
        Damaged: the text isn't what was committed.
    """
    if _sha256(text) != sha256:
        raise Damaged("a table was altered")
    document = json.loads(text)
    fragments = []
    for row in document["fragments"]:
        tensors = [
            (StoredTensor(key, t["dtype"], t["offset"], t["size_bytes"]), t["sha256"])
            for key, t in row["tensors"].items()
        ]
        fragments.append(StoredFragment(Span(row["name"], row["start"], row["stop"]), row["group"], tensors))
    return document["file"], fragments


def fetch(
    fragments: Sequence[StoredFragment], read_range: Callable[[int, int], bytes], keys: frozenset[str] | None = None
) -> list[Fragment]:
    """Read fragments of one file in few requests, and verify every tensor.

    Args:
        fragments: the wanted ones.
        read_range: reads bytes [start, stop) of the file.
        keys: tensors wanted of each fragment; None for all.

    Raises:
        Damaged: bytes are missing or altered.
    """
    wanted = sorted(
        (
            (stored, digest, i)
            for i, fragment in enumerate(fragments)
            for stored, digest in fragment.tensors
            if not keys or stored.key in keys
        ),
        key=lambda x: x[0].offset,
    )
    tensors: list[dict[str, Tensor]] = [{} for _ in fragments]
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
        for stored, digest, i in wanted[at:last]:
            part = data[stored.offset - start : stored.offset - start + stored.size_bytes]
            if len(part) != stored.size_bytes or _sha256(part) != digest:
                raise Damaged(f"{fragments[i].span.name} ({stored.key}) was cut short or altered")
            dtype = DTYPES[stored.dtype][0]
            empty = not stored.size_bytes
            tensors[i][stored.key] = (
                torch.empty(0, dtype=dtype) if empty else torch.frombuffer(bytearray(part), dtype=dtype)
            )
        at = last
    return [
        Fragment(*fragment.span, of_fragment, fragment.group)
        for fragment, of_fragment in zip(fragments, tensors, strict=True)
    ]


class LoadedFragments:
    """Fragments in host memory, from which any span that they cover can be read."""

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        self._by_name: dict[str, list[Fragment]] = {}
        for fragment in fragments:
            self._by_name.setdefault(fragment.name, []).append(fragment)

    def read(self, name: str, start: int, stop: int) -> Fragment:
        """The span, joined from the fragments that overlap it.

        Raises:
            Damaged: no fragment holds some part of it.
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


def uncovered(wanted: Iterable[Span], fragments: Iterable[StoredFragment]) -> list[Span]:
    """The wanted spans that the fragments don't hold completely."""
    held: dict[str, list[tuple[int, int]]] = {}
    for fragment in fragments:
        held.setdefault(fragment.span.name, []).append((fragment.span.start, fragment.span.stop))
    missing = []
    for span in wanted:
        at = span.start
        for start, stop in sorted(held.get(span.name, [])):
            if start <= at:
                at = max(at, stop)
        if at < span.stop or span.name not in held:
            missing.append(span)
    return missing


def overlaps(fragment: StoredFragment, wanted: Mapping[str, Sequence[Span]]) -> bool:
    """Whether a fragment holds a part of a wanted span (by name); empty spans are parts of every fragment of theirs."""
    return any(
        (span.start < fragment.span.stop and span.stop > fragment.span.start) or span.start == span.stop
        for span in wanted.get(fragment.span.name, ())
    )


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
