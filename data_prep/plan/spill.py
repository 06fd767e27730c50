"""Rows of a plan by bucket: in memory until they outgrow it, then in one file that is deleted with the plan.

Whenever memory is full, what it holds is sorted by bucket and appended as one *run*, a record batch for each bucket;
so the file has one piece per run and bucket, however small the added batches were. Columns without values (most of
them) take no space, and the others are compressed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from jaxtyping import Int64, UInt16

from pipeline.errors import StorageError

MAX_BUCKETS = 2**16  # a bucket's number has 16 bits, by which NumPy sorts in linear time
# Pieces are small: threads would cost more than they save.
_WRITE = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
_READ = pa.ipc.IpcReadOptions(use_threads=False)


class _SpillRun(NamedTuple):
    """One run of the file."""

    schema: pa.Schema
    offsets: Int64[np.ndarray, " buckets_plus_1"]  # of each bucket's piece in the file


class Spill:
    """A multimap from bucket to rows. Call `close` in the end.

    Args:
        schema: of the rows.
        num_buckets: at most `MAX_BUCKETS`.
        memory_bytes: of rows in memory before they go to disk.
    """

    def __init__(self, schema: pa.Schema, num_buckets: int, memory_bytes: int) -> None:
        self._schema = schema
        self._num_buckets = num_buckets
        self._memory_bytes = memory_bytes
        self._held: list[pa.Table] = []
        self._held_buckets: list[UInt16[np.ndarray, " n"]] = []
        self._held_bytes = 0
        self._runs: list[_SpillRun] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._file: pa.OSFile | None = None  # open for appending; `_reader` reads the same file
        self._reader: pa.OSFile | None = None

    def put(self, batch: pa.RecordBatch, buckets: UInt16[np.ndarray, " n"]) -> None:
        """Add rows, each with the number of its bucket."""
        narrow = _narrow(pa.Table.from_batches([batch]))
        self._held.append(narrow)
        self._held_buckets.append(buckets)
        self._held_bytes += narrow.nbytes + buckets.nbytes
        if self._held_bytes > self._memory_bytes:
            self._spill()

    def tables(self) -> Iterator[pa.Table]:
        """Each bucket's rows, in order of the buckets, each column in one piece; empty buckets are left out.

        A column in which none of a bucket's rows has a value may have the type null: `widen` restores its type.
        """
        last, bounds = self._sorted()
        for number in range(self._num_buckets):
            parts = [part for run in self._runs if (part := self._read(run, number)) is not None]
            parts.append(last.slice(bounds[number], bounds[number + 1] - bounds[number]))
            bucket = join(parts)
            if bucket.num_rows:
                yield bucket

    def close(self) -> None:
        """Delete the file."""
        self._held, self._held_buckets, self._runs = [], [], []
        for file in (self._file, self._reader):
            if file is not None:
                file.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _sorted(self) -> tuple[pa.Table, Int64[np.ndarray, " buckets_plus_1"]]:
        """The rows in memory, in order of their buckets, and where each bucket begins."""
        if not self._held:
            return _narrow(self._schema.empty_table()), np.zeros(self._num_buckets + 1, np.int64)
        held, buckets = join(self._held), np.concatenate(self._held_buckets)
        self._held, self._held_buckets, self._held_bytes = [], [], 0  # before the next copy is made
        bounds = np.concatenate([[0], np.cumsum(np.bincount(buckets, minlength=self._num_buckets))])
        if self._num_buckets > 1:
            held = held.take(pa.array(np.argsort(buckets, kind="stable")))
        return held, bounds

    def _spill(self) -> None:
        """Append the rows in memory to the file.

        Raises:
            StorageError: the disk is full.
        """
        held, bounds = self._sorted()
        try:
            self._append(held, bounds)
        except OSError as error:
            raise StorageError(
                f"the plan can't be written to disk ({' '.join(str(error).split())})",
                where=tempfile.gettempdir(),
                fix="set TMPDIR to a folder with room for half the size of the source's listing",
            ) from error

    def _append(self, held: pa.Table, bounds: Int64[np.ndarray, " buckets_plus_1"]) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="vitrail-plan-")
            path = os.path.join(self._folder.name, "runs.arrow")
            self._file, self._reader = pa.OSFile(path, "wb"), pa.OSFile(path, "rb")
        assert self._file is not None
        offsets = np.zeros(self._num_buckets + 1, np.int64)
        with pa.ipc.new_stream(self._file, held.schema, options=_WRITE) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist([], schema=held.schema))  # the schema goes before the first
            offsets[0] = self._file.tell()
            for number in range(self._num_buckets):
                for batch in held.slice(bounds[number], bounds[number + 1] - bounds[number]).to_batches():
                    writer.write_batch(batch)
                offsets[number + 1] = self._file.tell()
        self._runs.append(_SpillRun(held.schema, offsets))

    def _read(self, run: _SpillRun, number: int) -> pa.Table | None:
        """A bucket's rows in a run; None where it has none."""
        assert self._reader is not None
        start, stop = run.offsets[number : number + 2].tolist()
        if start == stop:
            return None
        data = self._reader.read_at(stop - start, start)
        stream = pa.BufferReader(run.schema.serialize().to_pybytes() + data)
        return pa.ipc.open_stream(stream, options=_READ).read_all()


def join(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables of one schema, of which some may have columns of type null instead, as one, each column in one piece."""
    schema = tables[0].schema
    for table in tables[1:]:
        for number, field in enumerate(table.schema):
            if not pa.types.is_null(field.type) and pa.types.is_null(schema.field(number).type):
                schema = schema.set(number, field)
    return pa.concat_tables([widen(table, schema) for table in tables]).combine_chunks()


def widen(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with each column of the type that `schema` says, where it has the type null so far."""
    if table.schema.equals(schema):
        return table
    columns = [
        column if column.type == field.type else pa.nulls(table.num_rows, field.type)
        for column, field in zip(table.columns, schema, strict=True)
    ]
    return pa.table(columns, schema=schema)


def _narrow(table: pa.Table) -> pa.Table:
    """The table with columns of type null where none of the rows has a value."""
    rows = table.num_rows
    empty = [column.null_count == rows for column in table.columns]
    columns = [pa.nulls(rows) if nothing else column for column, nothing in zip(table.columns, empty, strict=True)]
    return pa.table(columns, names=table.column_names)
