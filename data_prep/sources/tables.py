"""Tables of pairs: Parquet, CSV, TSV and JSON lines, one row per image, columns by name."""

from __future__ import annotations

import contextlib
import difflib
import gzip
import io
import itertools
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from data_prep.sources.base import (
    BATCH_ROWS,
    SCHEMA,
    AllowedPlaces,
    RangedFile,
    Source,
    nulls,
    places_below,
    read_classes,
)
from data_prep.sources.options import SourceOptions
from pipeline import storage
from pipeline.errors import DataError, StorageError

_READ_AHEAD_BYTES = 4 * 2**20
_LIST_MARK = b"\xff"  # never occurs in UTF-8: distinguishes a JSON list from a text that looks like one
_ENDINGS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


class TableOptions(SourceOptions):
    """Pairs listed in a table: one row per image, the columns chosen by name.

    An image's URL may be relative to the table's folder, an absolute path, `s3://`, or `https://` and `http://`.
    """

    type: Literal["table"] = "table"
    url: str  # a file, or a folder of files of one format, taken in the order of their names
    format: Literal["auto", "parquet", "csv", "tsv", "jsonl"] = "auto"  # auto: by the name's ending; .gz may follow
    url_column: str = "url"
    # One column, whose cells may be lists, or several; None: images without captions, no `txt` members.
    caption_column: str | tuple[str, ...] | None = "caption"
    label_column: str | None = None  # an integer, or a name out of `classes`
    split_column: str | None = None  # the row's split by name; None: `splits`
    annotations_column: str | None = None  # JSON: a list of COCO annotations in pixels of the upright image
    keep_columns: tuple[str, ...] = ()  # go into each sample's `json` and sidecar row as they are
    classes: tuple[str, ...] | str = ()  # names of the labels 0, 1, ..., or where a JSON list of them lies

    def open(self) -> Source:
        return TableSource(self)

    @property
    def names_splits(self) -> bool:
        return self.split_column is not None

    @property
    def has_captions(self) -> bool:
        return bool(self.caption_column)

    @property
    def has_labels(self) -> bool:
        return self.label_column is not None


class TableSource:
    """One table, or a folder of tables of one format. See `TableOptions`."""

    def __init__(self, options: TableOptions) -> None:
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
            names = _column_names(file.url, _format_of(file.url, self.options))
            for setting, column in wanted:
                if column not in names:
                    raise _no_column(file.url, setting, column, names)
        if next(self.batches(), None) is None:
            raise DataError(
                "the table holds no rows", where=self.options.url, fix="set source.url to a table with rows"
            )

    def batches(self) -> Iterator[pa.RecordBatch]:
        columns = list(dict.fromkeys(column for _, column in self._columns()))
        start = 0
        for file in self.files():
            for batch in _read_table(file.url, _format_of(file.url, self.options), columns, self._captions()):
                if batch.num_rows == 0:
                    continue
                yield self._canonical(batch, start, file.url)
                start += batch.num_rows

    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files())

    def places(self) -> AllowedPlaces:
        files = self.files()
        single = len(files) == 1 and files[0].url == self.options.url
        folder = posixpath.dirname(self.options.url) if single else self.options.url.rstrip("/")
        return places_below(folder, self.options.allow, files[0].url)

    def classes(self) -> tuple[str, ...]:
        names = self.options.classes
        return names if isinstance(names, tuple) else read_classes(names)

    def _columns(self) -> list[tuple[str, str]]:
        """(setting, column) of the columns that are read."""
        names = ("url_column", "label_column", "split_column", "annotations_column")
        single = [(name, getattr(self.options, name)) for name in names if getattr(self.options, name) is not None]
        captions = [("caption_column", column) for column in self._captions()]
        return single + captions + [("keep_columns", column) for column in self.options.keep_columns]

    def _captions(self) -> tuple[str, ...]:
        column = self.options.caption_column
        return (column,) if isinstance(column, str) else column or ()

    def _canonical(self, batch: pa.RecordBatch, start: int, where: str) -> pa.RecordBatch:
        rows = batch.num_rows
        columns: dict[str, pa.Array] = {"position": pa.array(np.arange(start, start + rows))}
        for field in ("url", "label", "split", "annotations"):
            column = getattr(self.options, f"{field}_column")
            if column is not None:
                nested = field == "annotations"
                columns[field] = _as_binary(batch.column(column), nested=nested, where=f"{where}: column {column!r}")
        columns |= self._caption_columns(batch, where)
        if self.options.keep_columns:
            passed_on = batch.select(list(self.options.keep_columns)).to_pylist()
            columns["extra"] = pa.array([_extra(row) for row in passed_on], pa.binary())
        arrays = [columns[field.name] if field.name in columns else nulls(field, rows) for field in SCHEMA]
        return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)

    def _caption_columns(self, batch: pa.RecordBatch, where: str) -> dict[str, pa.Array]:
        names = self._captions()
        columns = [batch.column(name) for name in names]
        lists = [pa.types.is_list(column.type) or pa.types.is_large_list(column.type) for column in columns]
        if len(columns) == 1 and not lists[0]:
            if _format_of(where, self.options) == "jsonl":
                return _captions_of_lines(columns[0])
            return {"caption": _as_binary(columns[0], nested=False, where=f"{where}: column {names[0]!r}")}
        texts: list[list[str]] = [[] for _ in range(batch.num_rows)]
        for column, is_list in zip(columns, lists, strict=True):
            for row, value in zip(texts, column.to_pylist(), strict=True):
                if isinstance(value, bytes) and value.startswith(_LIST_MARK):
                    row.extend(_texts(json.loads(value.removeprefix(_LIST_MARK))))
                else:
                    row.extend(_texts(value if is_list else [value]))
        return {"captions": pa.array([json.dumps(row).encode() for row in texts], pa.binary())} if columns else {}


def _table_files(options: TableOptions) -> tuple[storage.Entry, ...]:
    url = options.url
    if not url.endswith("/"):
        with contextlib.suppress(FileNotFoundError):
            return (storage.Entry(url, storage.size_bytes(url)),)
    listed = itertools.islice(storage.entries(url), 100_000)
    tables = tuple(entry for entry in listed if _format_by_name(entry.url) or options.format != "auto")
    formats = {_format_of(entry.url, options) for entry in tables}
    if len(formats) > 1:
        raise DataError(
            f"the folder holds tables of several formats ({', '.join(sorted(formats))})",
            where=url,
            fix="set source.url to one file, or to a folder of one format",
        )
    if not tables:
        raise DataError("no such table", where=url, fix=_similar_file(url))
    return tables


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


def _format_of(url: str, options: TableOptions) -> str:
    kind = _format_by_name(url) if options.format == "auto" else options.format
    if kind is None:
        raise DataError(
            "unknown table format: the name has no known ending",
            where=url,
            fix="set source.format to parquet, csv, tsv or jsonl",
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
            f"can't be read as {kind} ({reason})", where=url, fix="correct the file or set source.format"
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
            raise DataError("the table is empty: it has no header", where=url, fix="set source.url to a table")
        rows = pa.csv.read_csv(io.BytesIO(header), parse_options=_csv_format(kind))
        return list(rows.column_names)


def _read_table(url: str, kind: str, columns: Sequence[str], captions: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with _damage_explained(url, kind), _open(url) as file:
        if kind == "parquet":
            yield from pa.parquet.ParquetFile(file).iter_batches(BATCH_ROWS, columns=list(columns))
        elif kind == "jsonl":
            yield from _read_json_lines(file, url, columns, captions)
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
            raise DataError(f"line {number} isn't JSON ({error})", where=url, fix="correct the line") from error
        if not isinstance(row, dict):
            raise DataError(f"line {number} isn't a JSON object", where=url, fix="write one {...} per line")
        yield row


def _read_json_lines(
    file: IO[bytes], url: str, columns: Sequence[str], captions: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    rows = _json_lines(file, url)
    while chunk := list(itertools.islice(rows, BATCH_ROWS)):
        arrays = [
            pa.array([_json_cell(row.get(name), mark_lists=name in captions) for row in chunk], pa.binary())
            for name in columns
        ]
        yield pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _json_cell(value: Any, *, mark_lists: bool = False) -> bytes | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    mark = _LIST_MARK if mark_lists and isinstance(value, list) else b""
    return mark + text.encode("utf-8", "surrogatepass")


def _texts(values: Sequence[Any] | None) -> list[str]:
    """The captions in a cell, without values that aren't texts; bytes that aren't UTF-8 are refused later."""
    texts = []
    for value in values or ():
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        if isinstance(value, str):
            texts.append(value)
    return texts


def _captions_of_lines(column: pa.Array) -> dict[str, pa.Array]:
    """Captions of JSON lines, some of which may be lists, which `_json_cell` writes as JSON."""
    cells = column.to_pylist()
    lists = [cell is not None and cell.startswith(_LIST_MARK) for cell in cells]
    if not any(lists):
        return {"caption": column}
    single = [None if is_list else cell for cell, is_list in zip(cells, lists, strict=True)]
    several = [cell.removeprefix(_LIST_MARK) if is_list else None for cell, is_list in zip(cells, lists, strict=True)]
    return {"caption": pa.array(single, pa.binary()), "captions": pa.array(several, pa.binary())}


def _extra(row: dict[str, Any]) -> bytes:
    def plain(value: Any) -> Any:
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    return json.dumps(row, default=plain).encode("utf-8", "surrogatepass")


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


def _no_column(url: str, setting: str, column: str, names: Sequence[str]) -> DataError:
    close = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    listed = ", ".join(names[:30])
    return DataError(f"no column {column!r}", where=url, fix=f"{hint}set source.{setting} to one of: {listed}")
