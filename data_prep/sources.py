"""Sources of raw pairs: where inputs are listed, streamed as Arrow batches of one schema.

A source tells its inputs in a fixed order, without holding them: a table of a billion rows passes through in batches.
Texts stay bytes until a task judges them row by row, since tables hold broken UTF-8.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import io
import itertools
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from data_prep.account import Refused
from data_prep.config import TableConfig
from pipeline import storage
from pipeline.errors import DataError, StorageError

SCHEMA = pa.schema(
    [
        ("position", pa.int64()),  # of the input in its source, from 0
        ("url", pa.binary()),
        ("caption", pa.binary()),
        ("label", pa.binary()),
        ("split", pa.binary()),
        ("annotations", pa.binary()),
        ("sha256", pa.binary()),  # what the image's bytes must hash to, where that is known beforehand
    ]
)
BATCH_ROWS = 16_384
_READ_AHEAD_BYTES = 4 * 2**20
_ENDINGS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


class Source(Protocol):
    """What a build reads its inputs from."""

    def check(self) -> None:
        """Raise a `UserError` for whatever can be known to be wrong before all inputs are read."""
        ...

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All inputs in order, as batches of `SCHEMA`."""
        ...

    def size_bytes(self) -> int:
        """Size of the listing, for planning."""
        ...

    def places(self) -> Places:
        """Which places its rows may name."""
        ...

    def classes(self) -> tuple[str, ...]:
        """Names of the labels; () where there are none."""
        ...


class Places(NamedTuple):
    """Turns a row's URL into a path or s3:// URL that may be read."""

    base: str  # folder that relative URLs start from
    allowed: tuple[str, ...]  # folders (absolute, links resolved) and s3:// prefixes, each ending in "/"
    witness: str | None = None  # an object that can be read as long as the credentials hold

    def resolve(self, raw: bytes | None) -> str:
        """The place to read.

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
        elif scheme != "s3":
            raise Refused("unsupported_scheme", f"can't read {scheme}:// URLs: give paths or s3://")
        place = _remote_place(url) if storage.is_remote(url) else os.path.realpath(url)
        if not any(place.startswith(prefix) for prefix in self.allowed):
            raise Refused("place_not_allowed", f"{place} lies outside the table's place: add it to source.allow")
        return place


class TableSource:
    """One table, or a folder of tables of one format. See `TableConfig`."""

    def __init__(self, options: TableConfig) -> None:
        self.options = options
        self._files: tuple[storage.Entry, ...] | None = None

    def files(self) -> tuple[storage.Entry, ...]:
        """The table's files, in the order in which they are read."""
        if self._files is None:
            self._files = _table_files(self.options)
        return self._files

    def check(self) -> None:
        self.classes()
        wanted = self._columns()
        for file in self.files():
            found = _column_names(file.url, _format_of(file.url, self.options))
            for setting, column in wanted.items():
                if column not in found:
                    raise _no_column(file.url, setting, column, found)
        if next(self.batches(), None) is None:
            raise DataError(
                "the table holds no rows", where=self.options.url, fix="point source.url at a table with rows"
            )

    def batches(self) -> Iterator[pa.RecordBatch]:
        wanted = self._columns()
        columns = list(dict.fromkeys(wanted.values()))
        start = 0
        for file in self.files():
            for batch in _read_table(file.url, _format_of(file.url, self.options), columns):
                if batch.num_rows == 0:
                    continue
                yield self._canonical(batch, start, file.url)
                start += batch.num_rows

    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files())

    def places(self) -> Places:
        files = self.files()
        single = len(files) == 1 and files[0].url == self.options.url
        folder = posixpath.dirname(self.options.url) if single else self.options.url.rstrip("/")
        if storage.is_remote(folder):
            own = "s3://" + folder.removeprefix("s3://").partition("/")[0]
        else:
            own = folder = os.path.realpath(folder)
        further = tuple(p if storage.is_remote(p) else os.path.realpath(p) for p in self.options.allow)
        witness = files[0].url if storage.is_remote(folder) else None
        return Places(folder, tuple(place.rstrip("/") + "/" for place in (own, *further)), witness)

    def classes(self) -> tuple[str, ...]:
        names = self.options.classes
        return names if isinstance(names, tuple) else _read_classes(names)

    def _columns(self) -> dict[str, str]:
        """Setting -> column, for the columns that are used."""
        names = ("url_column", "caption_column", "label_column", "split_column", "annotations_column")
        return {name: getattr(self.options, name) for name in names if getattr(self.options, name) is not None}

    def _canonical(self, batch: pa.RecordBatch, start: int, where: str) -> pa.RecordBatch:
        wanted = self._columns()
        rows = batch.num_rows
        arrays = [pa.array(range(start, start + rows), pa.int64())]
        for field in SCHEMA.names[1:]:
            column = wanted.get(f"{field}_column")
            if column is None:
                arrays.append(pa.nulls(rows, pa.binary()))
            else:
                nested = field == "annotations"
                arrays.append(_as_binary(batch.column(column), nested=nested, where=f"{where}: column {column!r}"))
        return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


SOURCES: dict[str, type[TableSource]] = {"table": TableSource}


def open_source(options: TableConfig) -> Source:
    """The source that `options` describe."""
    return SOURCES[options.type](options)


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
    """An s3:// URL with `.` and `..` resolved, so that no key steps out of an allowed prefix by its looks."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if any(part in (".", "..") for part in key.split("/")):
        key = posixpath.normpath("/" + key).lstrip("/")
    return f"s3://{bucket}/{key}"


def _table_files(options: TableConfig) -> tuple[storage.Entry, ...]:
    url = options.url
    if not url.endswith("/"):
        with contextlib.suppress(FileNotFoundError):
            return (storage.Entry(url, storage.size_bytes(url)),)
    listed = itertools.islice(storage.entries(url), 100_000)
    found = tuple(entry for entry in listed if _format_by_name(entry.url) or options.format != "auto")
    formats = {_format_of(entry.url, options) for entry in found}
    if len(formats) > 1:
        raise DataError(
            f"the folder holds tables of several formats ({', '.join(sorted(formats))})",
            where=url,
            fix="point source.url at one file, or at a folder of one format",
        )
    if not found:
        raise DataError("no such table", where=url, fix=_similar_file(url))
    return found


def _similar_file(url: str) -> str:
    folder, _, name = url.rstrip("/").rpartition("/")
    try:
        near = [
            entry.url.removeprefix(folder + "/") for entry in itertools.islice(storage.entries(folder or "."), 1000)
        ]
    except StorageError:
        near = []
    close = difflib.get_close_matches(name, near, n=1)
    return f"did you mean {folder}/{close[0]}?" if close else "check source.url"


def _format_by_name(url: str) -> str | None:
    return _ENDINGS.get(posixpath.splitext(url.removesuffix(".gz"))[1].lower())


def _format_of(url: str, options: TableConfig) -> str:
    kind = _format_by_name(url) if options.format == "auto" else options.format
    if kind is None:
        raise DataError(
            "the name's ending tells no table format", where=url, fix="set source.format to parquet, csv, tsv or jsonl"
        )
    return kind


def _open(url: str) -> IO[bytes]:
    file: IO[bytes] = io.BufferedReader(RangedFile(url), _READ_AHEAD_BYTES)
    return gzip.GzipFile(fileobj=file) if url.endswith(".gz") else file  # type: ignore[return-value]


@contextlib.contextmanager
def _damage_explained(url: str, kind: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError("no such table", where=url, fix=_similar_file(url)) from error
    except (pa.ArrowException, gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"can't be read as {kind} ({reason})", where=url, fix="mend the file or set source.format"
        ) from error


def _column_names(url: str, kind: str) -> list[str]:
    """The table's columns; of JSON lines, those of the first 100."""
    with _damage_explained(url, kind), _open(url) as file:
        if kind == "parquet":
            return list(pa.parquet.ParquetFile(file).schema_arrow.names)
        if kind == "jsonl":
            lines = itertools.islice(_json_lines(file, url), 100)
            return list(dict.fromkeys(name for line in lines for name in line))
        header = next((line for line in file if line.strip()), b"")
        if not header:
            raise DataError("the table is empty: it hasn't even a header", where=url, fix="point source.url at a table")
        rows = pa.csv.read_csv(io.BytesIO(header), parse_options=_csv_format(kind))
        return list(rows.column_names)


def _read_table(url: str, kind: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with _damage_explained(url, kind), _open(url) as file:
        if kind == "parquet":
            yield from pa.parquet.ParquetFile(file).iter_batches(BATCH_ROWS, columns=list(columns))
        elif kind == "jsonl":
            yield from _read_json_lines(file, url, columns)
        else:
            yield from pa.csv.open_csv(
                file,
                read_options=pa.csv.ReadOptions(block_size=_READ_AHEAD_BYTES, use_threads=False),
                parse_options=_csv_format(kind),
                convert_options=pa.csv.ConvertOptions(
                    column_types={name: pa.binary() for name in columns}, include_columns=list(columns)
                ),
            )


def _csv_format(kind: str) -> pa.csv.ParseOptions:
    return pa.csv.ParseOptions(delimiter="\t" if kind == "tsv" else ",", newlines_in_values=True)


def _json_lines(file: IO[bytes], url: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} is no JSON ({error})", where=url, fix="mend the line") from error
        if not isinstance(row, dict):
            raise DataError(f"line {number} is no JSON object", where=url, fix="write one {...} per line")
        yield row


def _read_json_lines(file: IO[bytes], url: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    rows = _json_lines(file, url)
    while chunk := list(itertools.islice(rows, BATCH_ROWS)):
        arrays = [pa.array([_json_cell(row.get(name)) for row in chunk], pa.binary()) for name in columns]
        yield pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _json_cell(value: Any) -> bytes | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


def _as_binary(column: pa.Array, *, nested: bool, where: str) -> pa.Array:
    """Texts as their bytes, numbers as their digits, nested values as JSON."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return column.cast(pa.binary())
    if pa.types.is_binary(kind):
        return column
    if pa.types.is_null(kind):
        return pa.nulls(len(column), pa.binary())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return column.cast(pa.string()).cast(pa.binary())
    if nested and pa.types.is_nested(kind):
        return pa.array([_json_cell(value) for value in column.to_pylist()], pa.binary())
    raise DataError(f"holds values of type {kind}, expected text", where=where, fix="choose another column")


def _no_column(url: str, setting: str, column: str, found: Sequence[str]) -> DataError:
    close = difflib.get_close_matches(column, found, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    listed = ", ".join(found[:30])
    return DataError(f"no column {column!r}", where=url, fix=f"{hint}set source.{setting} to one of: {listed}")


def _read_classes(url: str) -> tuple[str, ...]:
    try:
        names = json.loads(storage.read(url))
    except FileNotFoundError as error:
        raise DataError("no such file of class names", where=url, fix="mend source.classes") from error
    except ValueError as error:
        raise DataError(
            f"the class names are no JSON ({error})", where=url, fix="write a JSON list of names"
        ) from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError("the class names are no list of texts", where=url, fix='write a JSON list like ["cat", "dog"]')
    return tuple(names)
