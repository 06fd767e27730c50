"""What one task does: turn the inputs of a partition into a committed shard, or read images to digest them.

A task is a function of its inputs and the settings, so a task that is run again, by whichever worker, does the same.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_prep import captions, images
from data_prep.account import REASONS, Refused
from data_prep.annotations import follow_image, parse_annotations
from data_prep.config import PrepConfig
from data_prep.fetch import fetch_all
from data_prep.planning import UNREAD, Partition
from data_prep.shards import (
    Committed,
    Row,
    Sample,
    ShardWriter,
    commit,
    json_bytes,
    marker_url,
    read_marker,
    sample_key,
    write_partition,
)
from data_prep.sources import Places
from pipeline import storage
from pipeline.errors import StorageError

_DIGEST_BYTES = 32
_NO_DIGEST = bytes(1 + _DIGEST_BYTES)
Input = Mapping[str, Any]  # a row of sources.SCHEMA


class Job(NamedTuple):
    """What all tasks of one attempt at a build share."""

    config: PrepConfig
    places: Places
    classes: tuple[str, ...]
    fingerprint: str
    attempt: int


class Texts(NamedTuple):
    """What a row says beside its image."""

    caption: str | None
    label: int | None
    annotations: list[dict[str, Any]] | None


class Chunk(NamedTuple):
    """Inputs whose images are digested together."""

    number: int
    urls: list[bytes | None]


def pack(job: Job, partition: Partition) -> Committed:
    """Make and commit a partition's shard; what is committed already is only told.

    Raises:
        StorageError: a place can't be used, or a newer attempt has taken over.
    """
    url = job.config.output
    place = marker_url(url, partition.split, partition.number)
    if storage.exists(place):
        return read_marker(storage.read(place), place)
    started = time.time()
    writer = ShardWriter()
    rows = pack_samples(job, partition.inputs.to_pylist(), writer)
    check_attempt(url, job.attempt)
    written = write_partition(
        url,
        partition.split,
        partition.number,
        writer,
        rows,
        fingerprint=job.fingerprint,
        times=(started, time.time()),
    )
    return commit(url, written)


def pack_samples(job: Job, inputs: list[Input], writer: ShardWriter) -> list[Row]:
    """Add the inputs' samples to `writer` in order; what became of each."""
    texts = [_texts_or_refusal(job, item) for item in inputs]
    wanted = [item["url"] for item, found in zip(inputs, texts, strict=True) if isinstance(found, Texts)]
    fetched = fetch_all(wanted, job.places, job.config.fetch)
    rows = []
    for item, found in zip(inputs, texts, strict=True):
        if isinstance(found, Refused):
            rows.append(_failure(item, found, None))
            continue
        source = next(fetched)
        if isinstance(source, Refused):
            rows.append(_failure(item, source, None))
            continue
        digest = hashlib.sha256(source)
        try:
            _check_digest(item, digest.digest())
            row, sample = _sample(job, item, found, source, digest.hexdigest())
        except Refused as refused:
            rows.append(_failure(item, refused, digest.hexdigest()))
        else:
            rows.append(row._replace(tar_sha256=writer.add(sample)))
    return rows


def scan_url(url: str, number: int) -> str:
    """Where the digests of chunk `number` stand."""
    return storage.join(url, "_prep", "scan", f"{number:06d}.bin")


def scan(job: Job, chunk: Chunk) -> tuple[int, int]:
    """Digest the images of a chunk into an object at `scan_url`; returns the chunk's number and its size."""
    place = scan_url(job.config.output, chunk.number)
    if not storage.exists(place):
        records = []
        for data in fetch_all(chunk.urls, job.places, job.config.fetch):
            records.append(_NO_DIGEST if isinstance(data, Refused) else b"\1" + hashlib.sha256(data).digest())
        check_attempt(job.config.output, job.attempt)
        storage.write(place, b"".join(records))
    return chunk.number, len(chunk.urls)


def read_scan(url: str, number: int) -> list[bytes | None]:
    """The digests of chunk `number`, one per input; None where the image couldn't be read."""
    data = storage.read(scan_url(url, number))
    size = 1 + _DIGEST_BYTES
    return [data[i + 1 : i + size] if data[i] else None for i in range(0, len(data), size)]


def check_attempt(url: str, attempt: int) -> None:
    """Stop the work of an attempt that a newer one has replaced, before it writes beside it.

    Raises:
        StorageError: there is a newer one.
    """
    newest = max((attempt_number(entry.url) for entry in storage.entries(attempts_url(url))), default=0)
    if newest > attempt:
        raise StorageError(
            f"attempt {newest} at this build has taken over from attempt {attempt}",
            where=url,
            fix="let that one finish, or run the same command once it has ended",
        )


def attempts_url(url: str) -> str:
    """The folder of files that number the attempts at a build."""
    return storage.join(url, "_prep", "attempts")


def attempt_number(url: str) -> int:
    """The number in an attempt file's name."""
    return int(url.rpartition("/")[2].removesuffix(".json"))


def convert_one(job: Job, item: Input) -> Refused | None:
    """Try one input without writing anything; why it can't become a sample, if it can't."""
    row = pack_samples(job, [item], ShardWriter())[0]
    return Refused(row.reason, row.error_message or "") if row.reason else None


def parse_label(raw: bytes | None, classes: tuple[str, ...]) -> int:
    """The class index that a label column's value stands for.

    Raises:
        Refused: label_invalid.
    """
    text = (raw or b"").decode("utf-8", "replace").strip()
    if text in classes:
        return classes.index(text)
    try:
        number = float(text)
    except ValueError:
        known = f"neither a number nor one of the {len(classes)} classes" if classes else "no number"
        raise Refused("label_invalid", f"label {text[:100]!r} is {known}") from None
    if not number.is_integer() or number < 0 or (classes and number >= len(classes)):
        raise Refused("label_invalid", f"label {text[:100]!r} isn't in [0, {len(classes) or 'any'})")
    return int(number)


def _texts_or_refusal(job: Job, item: Input) -> Texts | Refused:
    source = job.config.source
    try:
        return Texts(
            captions.clean(item["caption"], job.config.caption) if source.caption_column is not None else None,
            parse_label(item["label"], job.classes) if source.label_column is not None else None,
            parse_annotations(item["annotations"]),
        )
    except Refused as refused:
        return refused


def _check_digest(item: Input, digest: bytes) -> None:
    expected = item["sha256"]
    if expected == UNREAD:
        raise Refused("changed_while_reading", "couldn't be read when the splits were made, but can be now")
    if expected is not None and expected != digest:
        raise Refused("changed_while_reading", "the image changed since the splits were made")


def _sample(job: Job, item: Input, texts: Texts, source: bytes, sha256: str) -> tuple[Row, Sample]:
    image = images.convert(source, job.config.image)
    key = sample_key(item["position"])
    row = Row(
        url=_shown(item["url"]),
        caption=texts.caption,
        key=key,
        status="success",
        error_message=None,
        width=image.geometry.width,
        height=image.geometry.height,
        original_width=image.geometry.source[0],
        original_height=image.geometry.source[1],
        exif=image.exif,
        sha256=sha256,
        reason="",
        position=item["position"],
    )
    facts = row._asdict()
    for ours in ("reason", "position", "tar_sha256"):
        del facts[ours]
    if texts.annotations is not None:
        facts["annotations"] = follow_image(texts.annotations, image.geometry)
    members = {image.extension: image.data}
    if texts.caption is not None:
        members["txt"] = texts.caption.encode()
    members["json"] = json_bytes(facts)
    if texts.label is not None:
        members["cls"] = b"%d" % texts.label
    return row, Sample(key, members)


def _failure(item: Input, refused: Refused, sha256: str | None) -> Row:
    return Row(
        url=_shown(item["url"]),
        caption=_shown(item["caption"]) if item["caption"] is not None else None,
        key=sample_key(item["position"]),
        status=REASONS[refused.reason],
        error_message=refused.message.encode("utf-8", "replace").decode(),
        width=None,
        height=None,
        original_width=None,
        original_height=None,
        exif=None,
        sha256=sha256,
        reason=refused.reason,
        position=item["position"],
    )


def _shown(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace")
