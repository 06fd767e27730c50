"""Shards: deterministic WebDataset tars, their sidecars, and the commit of a partition.

A partition is a fixed list of inputs; those that succeed become one shard. Its objects (the tar, its index, the sidecar
Parquet with one row per input, `_stats.json`) are first staged under names that only this execution uses; then the
commit marker that names them is created, only if absent. Once all partitions of a segment are committed, they are
published: moved to their final names (`finish`). So a name in a split's folder never shows other bytes than the final
ones, whatever is killed at whatever moment, and even where a source answers differently the second time.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Int64

from data_prep.account import Status, by_reason
from pipeline import storage
from pipeline.data.manifest import Shard, index_bytes
from pipeline.errors import DataError

BLOCK_BYTES = 512
MARKER_FORMAT_VERSION = 2
SIDECAR_SCHEMA = pa.schema(
    [
        # img2dataset's columns
        ("url", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),  # of the source's bytes
        # ours
        ("reason", pa.string()),  # "" for successes
        ("position", pa.int64()),  # of the input in its source
        ("tar_sha256", pa.string()),  # of the sample's byte range in the tar
        ("extra", pa.string()),  # JSON: columns passed on, scores of filters
    ]
)
# Columns whose values repeat. For the others a dictionary makes the sidecar half as large again, and twice as slow.
_REPEATED = ["status", "error_message", "exif", "reason"]


class Sample(NamedTuple):
    """One sample, ready to be packed: members by extension, in the order in which they are stored."""

    key: str
    members: Mapping[str, bytes]


class SidecarRow(NamedTuple):
    """What became of one input: a row of the sidecar; its fields are in the order of `SIDECAR_SCHEMA`."""

    url: str
    caption: str | None
    key: str
    status: Status
    error_message: str | None
    width: int | None
    height: int | None
    original_width: int | None
    original_height: int | None
    exif: str | None
    sha256: str | None
    reason: str
    position: int
    tar_sha256: str | None = None
    extra: str | None = None


class Committed(NamedTuple):
    """What a commit marker says about a partition."""

    segment: int
    split: str
    number: int
    inputs: int
    refused: dict[str, int]  # reason -> number of filtered or failed inputs
    examples: dict[str, str]  # reason -> an input that was refused for it
    shard: Shard | None  # without its final name; None: no input became a sample
    staged: str  # prefix of its staged objects, relative to the data set
    sidecar_sha256: str
    fingerprint: str  # of the segment
    retried: int = -1  # the last segment that tried inputs of this one again

    @property
    def written(self) -> int:
        """Samples in the shard."""
        return self.shard.num_samples if self.shard else 0

    @property
    def place(self) -> tuple[int, str, int]:
        """Which partition this is."""
        return self.segment, self.split, self.number


class ShardWriter:
    """Packs samples into one uncompressed USTAR archive in memory.

    The bytes depend on the samples alone: times, owners and modes are constant, and names are so short that they need
    no extended headers (which would cost 3 KB per sample).
    """

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._offsets = [0]

    def add(self, sample: Sample) -> str:
        """Append a sample; returns the sha256 of its bytes in the archive."""
        start = self._buffer.tell()
        for extension, data in sample.members.items():
            self._buffer.write(tar_header(f"{sample.key}.{extension}", len(data)))
            self._buffer.write(data)
            self._buffer.write(bytes(-len(data) % BLOCK_BYTES))
        self._offsets.append(self._buffer.tell())
        with self._buffer.getbuffer() as view:
            return hashlib.sha256(view[start:]).hexdigest()

    @property
    def num_samples(self) -> int:
        return len(self._offsets) - 1

    def finish(self) -> tuple[bytes, Int64[np.ndarray, " n_plus_1"]]:
        """The archive and its samples' offsets; two blocks of zeros end it (POSIX ustar)."""
        self._buffer.write(bytes(2 * BLOCK_BYTES))
        return self._buffer.getvalue(), np.array(self._offsets, dtype=np.int64)


def tar_header(name: str, size_bytes: int) -> bytes:
    """One USTAR header block (POSIX.1-1988): a regular file, mode 0644, owner 0, time 0."""
    encoded = name.encode("ascii")
    if len(encoded) > 100 or size_bytes >= 8**11:
        raise ValueError(f"{name!r} with {size_bytes} bytes doesn't fit a USTAR header")
    fields = [
        (encoded, 100),
        (b"0000644\0", 8),
        (b"0000000\0", 8),
        (b"0000000\0", 8),
        (b"%011o\0" % size_bytes, 12),
        (b"%011o\0" % 0, 12),
        (b" " * 8, 8),  # the checksum is computed with its own field blank
        (b"0", 1),
        (b"", 100),
        (b"ustar\0" + b"00", 8),
        (b"", 64),  # names of owner and group
        (b"0000000\0", 8),
        (b"0000000\0", 8),
        (b"", 167),
    ]
    header = bytearray(b"".join(value.ljust(width, b"\0") for value, width in fields))
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def sample_key(position: int) -> str:
    """The key of the input at `position`: unique in the data set, without a dot, the same in every build."""
    return f"{position:012d}"


def shard_stem(number: int) -> str:
    """The name of its objects without their endings."""
    return f"{number:05d}"


def sidecar_table(rows: Sequence[SidecarRow]) -> pa.Table:
    """Rows as the table that a sidecar holds."""
    columns = list(zip(*rows, strict=True)) or [()] * len(SIDECAR_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SIDECAR_SCHEMA, strict=True)]
    return pa.table(arrays, schema=SIDECAR_SCHEMA)


def sidecar_bytes(table: pa.Table) -> bytes:
    """The sidecar Parquet of a partition."""
    buffer = io.BytesIO()
    pa.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def stats_bytes(rows: Sequence[SidecarRow], start_time: float, end_time: float) -> bytes:
    """`_stats.json` as img2dataset writes it; the only object that holds times."""
    statuses = Counter(row.status for row in rows)
    messages = Counter(row.reason or "success" for row in rows)
    document = {
        "count": len(rows),
        "successes": statuses["success"],
        "failed_to_download": statuses["failed_to_download"],
        "failed_to_resize": statuses["failed_to_resize"],
        "duration": end_time - start_time,
        "start_time": start_time,
        "end_time": end_time,
        "status_dict": dict(sorted(messages.items())),
    }
    return json_bytes(document)


STAGED = ("archive", "index", "rows", "stats")  # endings of a partition's staged objects


def final_names(stem: str) -> tuple[str, ...]:
    """What the objects of `STAGED` are called once they are published."""
    return f"{stem}.tar", f"{stem}.index.npy", f"{stem}.parquet", f"{stem}_stats.json"


class PackedSamples(NamedTuple):
    """A shard's objects."""

    archive: bytes
    offsets: Int64[np.ndarray, " n_plus_1"]  # of its samples
    stats: bytes  # `_stats.json`


class PackedPartition(NamedTuple):
    """A partition's objects, ready to be staged."""

    place: tuple[int, str, int]  # segment, split, number
    fingerprint: str  # of the segment
    samples: PackedSamples | None  # None: no input became a sample
    sidecar: pa.Table
    refused: dict[str, int]  # reason -> number of filtered or failed inputs
    examples: dict[str, str]  # reason -> an input that was refused for it


def pack_partition(
    place: tuple[int, str, int],
    fingerprint: str,
    writer: ShardWriter,
    rows: Sequence[SidecarRow],
    times: tuple[float, float],
) -> PackedPartition:
    """A partition of samples that were added to `writer`.

    Args:
        rows: what became of each input.
        times: when the work began and ended.
    """
    samples = PackedSamples(*writer.finish(), stats_bytes(rows, *times)) if writer.num_samples else None
    refused = by_reason(Counter(row.reason for row in rows if row.reason))
    return PackedPartition(place, fingerprint, samples, sidecar_table(rows), refused, _examples(rows))


def stage(url: str, partition: PackedPartition) -> Committed:
    """Write a partition's objects below data set folder `url`, under names that nothing else uses; not its marker."""
    segment, split, number = partition.place
    staged = f"_prep/staged/{segment:06d}-{split}-{shard_stem(number)}-{secrets.token_hex(4)}"
    prefix = storage.join(url, staged)
    shard = None
    if partition.samples is not None:
        archive, offsets, stats = partition.samples
        index = index_bytes(offsets)
        shard = Shard(
            name="",
            num_samples=len(offsets) - 1,
            size_bytes=len(archive),
            sha256=hashlib.sha256(archive).hexdigest(),
            index_name="",
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        storage.write(f"{prefix}.archive", archive)
        storage.write(f"{prefix}.index", index)
        storage.write(f"{prefix}.stats", stats)
    data = sidecar_bytes(partition.sidecar)
    storage.write(f"{prefix}.rows", data)
    return Committed(
        segment=segment,
        split=split,
        number=number,
        inputs=partition.sidecar.num_rows,
        refused=partition.refused,
        examples=partition.examples,
        shard=shard,
        staged=staged,
        sidecar_sha256=hashlib.sha256(data).hexdigest(),
        fingerprint=partition.fingerprint,
    )


def marker_url(url: str, place: tuple[int, str, int]) -> str:
    """Where the commit marker of a partition (segment, split, number) stands."""
    segment, split, number = place
    return storage.join(url, "_prep", "partitions", f"{segment:06d}", split, f"{shard_stem(number)}.json")


def commit(url: str, committed: Committed) -> Committed:
    """Create the partition's marker; returns what is committed now, which may be another attempt's."""
    place = marker_url(url, committed.place)
    if storage.create(place, marker_bytes(committed)):
        return committed
    return read_marker(storage.read(place), place)


def marker_bytes(committed: Committed) -> bytes:
    """A commit marker."""
    document = committed._asdict() | {
        "format": "vitrail.partition",
        "format_version": MARKER_FORMAT_VERSION,
        "shard": committed.shard._asdict() if committed.shard else None,
    }
    return json_bytes(document)


def read_marker(data: bytes, where: str) -> Committed:
    """A commit marker's content.

    Raises:
        DataError: it is damaged, or newer than this reader.
    """
    try:
        document: dict[str, Any] = json.loads(data)
        version = document.pop("format_version")
        if document.pop("format") != "vitrail.partition" or version > MARKER_FORMAT_VERSION:
            raise ValueError(f"format_version {version} is newer than this reader ({MARKER_FORMAT_VERSION})")
        shard = document.pop("shard")
        return Committed(shard=Shard(**shard) if shard else None, **document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"not a commit marker ({error})", where=where, fix="delete it and run the same command"
        ) from error


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """JSON in a fixed form, so that equal content has equal bytes."""
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def read_document(
    place: str,
    format_version: int,
    what: str,
    fix: str,
    *,
    damaged: str | None = None,
    renew: str = "train on that data set as it is, or build it again in another output",
) -> dict[str, Any]:
    """The JSON object at `place`, if this version can continue with it.

    Args:
        what: the kind of document, for messages.
        fix: what to do where it is damaged.
        damaged: how a message names a damaged one; default: "not `what`".
        renew: what to do where another version wrote it.

    Raises:
        FileNotFoundError: there is none.
        DataError: it is damaged, or of another version.
    """
    try:
        document: dict[str, Any] = json.loads(storage.read(place))
        version = document["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{damaged or f'not {what}'} ({error})", where=place, fix=fix) from error
    if version != format_version:
        raise DataError(
            f"{what} of format_version {version}, but this version reads only {format_version}",
            where=place,
            fix=renew,
        )
    return document


def _examples(rows: Sequence[SidecarRow]) -> dict[str, str]:
    """For each reason the first input that was refused for it."""
    examples: dict[str, str] = {}
    for row in rows:
        if row.reason:
            examples.setdefault(row.reason, f"{row.url!r}: {row.error_message}"[:300])
    return examples
