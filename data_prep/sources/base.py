"""Sources of raw pairs: they list inputs as a stream of Arrow batches of one schema.

A source lists its inputs in a fixed order without holding them in memory: a table of a billion rows passes through in
batches. Texts stay bytes until a task checks them row by row, since tables may hold broken UTF-8.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from data_prep.account import Refused
from pipeline import storage
from pipeline.errors import DataError

SCHEMA = pa.schema(
    [
        ("position", pa.int64()),  # of the input in its source, from 0
        ("url", pa.binary()),
        ("caption", pa.binary()),
        ("captions", pa.binary()),  # JSON: all captions, where there may be several
        ("label", pa.binary()),
        ("split", pa.binary()),
        ("annotations", pa.binary()),
        ("extra", pa.binary()),  # JSON: columns that are passed on
        ("sidecar", pa.binary()),  # an object that holds the caption, read with the image
        ("held", pa.binary()),  # an object that holds the image's bytes, where the URL isn't one: a tar
        ("start", pa.int64()),  # and the range of bytes in it
        ("stop", pa.int64()),
        # What is known once all images were scanned:
        ("sha256", pa.binary()),  # digest that the image's bytes must have
        ("verdict", pa.binary()),  # JSON: [reason, message] of an input that was already refused
    ]
)
BATCH_ROWS = 16_384
Input = Mapping[str, Any]  # a row of SCHEMA


class Source(Protocol):
    """What a build reads its inputs from."""

    def check(self) -> None:
        """Raise a `UserError` for what is wrong, as far as that shows before all inputs are read."""
        ...

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All inputs in order, as batches of `SCHEMA`."""
        ...

    def size_bytes(self) -> int:
        """Size of the listing in bytes, for planning."""
        ...

    def places(self) -> AllowedPlaces:
        """The places that its rows may name."""
        ...

    def classes(self) -> tuple[str, ...]:
        """Names of the labels; () where there are none."""
        ...


class AllowedPlaces(NamedTuple):
    """Turns a row's URL into a path or URL that may be read."""

    base: str  # folder that relative URLs start from
    allowed: tuple[str, ...]  # folders (absolute, links resolved) and s3:// prefixes, each ending in "/"
    witness: str | None = None  # an object that can be read as long as the credentials are valid

    def resolve(self, raw: bytes | None) -> str:
        """The path or URL to read; web addresses stay as they are, since `data_prep.fetch.web` checks them.

        Raises:
            Refused: url_empty, unsupported_scheme or place_not_allowed.
        """
        url = (raw or b"").decode("utf-8", "surrogateescape").strip()
        if not url:
            raise Refused("url_empty", "the row names no image")
        scheme, colon, rest = url.partition("://")
        if not colon:
            url = url if url.startswith("/") else posixpath.join(self.base, url)
        elif scheme == "file":
            url = rest
        elif scheme.lower() in ("http", "https"):
            return url
        elif scheme != "s3":
            raise Refused("unsupported_scheme", f"can't read {scheme}:// URLs: give paths, s3:// or https://")
        if "\0" in url:
            raise Refused("url_invalid", "its name holds a NUL character")
        place = _remote_place(url) if storage.is_remote(url) else os.path.realpath(url)
        if not any(place.startswith(prefix) for prefix in self.allowed):
            raise Refused("place_not_allowed", f"{place} lies outside the source's place: add it to source.allow")
        return place


def places_below(folder: str, allow: Sequence[str], witness: str | None) -> AllowedPlaces:
    """The places a source in `folder` may name: below it on a disk or in its bucket, and below those of `allow`."""
    if storage.is_remote(folder):
        home = "s3://" + folder.removeprefix("s3://").partition("/")[0]
    else:
        home = folder = os.path.realpath(folder)
        witness = None
    further = tuple(place if storage.is_remote(place) else os.path.realpath(place) for place in allow)
    return AllowedPlaces(folder, tuple(place.rstrip("/") + "/" for place in (home, *further)), witness)


def nulls(field: pa.Field, rows: int) -> pa.Array:
    """A column without values."""
    return pa.nulls(rows, field.type)


def batches_of(rows: Iterator[Input]) -> Iterator[pa.RecordBatch]:
    """Rows, dicts with some of `SCHEMA`'s columns, as numbered batches."""
    start = 0
    pending: list[Input] = []

    def batch() -> pa.RecordBatch:
        arrays = [pa.array(np.arange(start, start + len(pending)))]
        arrays += [pa.array([row.get(field.name) for row in pending], field.type) for field in list(SCHEMA)[1:]]
        return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)

    for row in rows:
        pending.append(row)
        if len(pending) == BATCH_ROWS:
            yield batch()
            start += len(pending)
            pending = []
    if pending:
        yield batch()


def refuse_if_empty(source: Source, url: str, what: str) -> None:
    """Raise a DataError where a source has no inputs."""
    if next(source.batches(), None) is None:
        raise DataError(f"{what} holds no inputs", where=url, fix="correct source.url")


class RangedFile(io.RawIOBase):
    """A readable, seekable file over ranged reads of one object."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._size = storage.size_bytes(url)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._size)
        if stop <= self._at:
            return 0
        data = storage.read_range(self._url, self._at, stop)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        return self.read(max(0, self._size - self._at)) or b""


def _remote_place(url: str) -> str:
    """An s3:// URL with `.` and `..` resolved, so that no key leaves an allowed prefix."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if any(part in (".", "..") for part in key.split("/")):
        key = posixpath.normpath("/" + key).lstrip("/")
    return f"s3://{bucket}/{key}"


def read_classes(url: str) -> tuple[str, ...]:
    """The names in a JSON list at `url`."""
    try:
        names = json.loads(storage.read(url))
    except FileNotFoundError as error:
        raise DataError("no such file of class names", where=url, fix="correct the path of the class names") from error
    except ValueError as error:
        raise DataError(
            f"the class names aren't JSON ({error})", where=url, fix="write a JSON list of names"
        ) from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(
            "the class names aren't a list of texts", where=url, fix='write a JSON list like ["cat", "dog"]'
        )
    return tuple(names)


def json_captions(value: Any) -> dict[str, bytes]:
    """A caption field's value, a text or a list of them, as columns of `SCHEMA`."""
    if isinstance(value, str):
        return {"caption": value.encode("utf-8", "surrogatepass")}
    if isinstance(value, list):
        return {"captions": json.dumps([text for text in value if isinstance(text, str)]).encode()}
    return {}
