"""What one task does: turn the inputs of a partition into a committed shard.

A task's result depends on its inputs and the settings only, so a task that is run again, anywhere, gives the same,
unless a source answers differently; then the first commit counts.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from data_prep.account import REASONS, Refused
from data_prep.config import PrepConfig
from data_prep.fetch.inputs import Fetched, FetchRequest, fetch_all
from data_prep.filters.candidate import Candidate, Scorers
from data_prep.filters.judge import judge
from data_prep.output import check_attempt
from data_prep.plan.planning import Partition
from data_prep.samples import captions, images
from data_prep.samples.annotations import follow_image, parse_annotations
from data_prep.shards.commit import (
    Committed,
    Sample,
    ShardWriter,
    SidecarRow,
    commit,
    json_bytes,
    marker_url,
    pack_partition,
    read_marker,
    sample_key,
    stage,
)
from data_prep.sources.base import AllowedPlaces, Input
from pipeline import storage


class SegmentJob(NamedTuple):
    """What all tasks of one attempt at a segment have in common."""

    config: PrepConfig
    places: AllowedPlaces
    classes: tuple[str, ...]
    segment: int
    fingerprint: str  # of the segment
    attempt: int
    tasks_at_once: int = 1
    scorers: Scorers | None = None  # processes that hold the models of `config.filters`


class Texts(NamedTuple):
    """What a row holds besides its image."""

    captions: tuple[str, ...]
    label: int | None
    annotations: list[dict[str, Any]] | None
    extra: dict[str, Any]


class _ConvertedSample(NamedTuple):
    """A sample on its way into a shard."""

    row: SidecarRow
    extension: str
    image: bytes
    texts: Texts
    annotations: list[dict[str, Any]] | None


def pack(job: SegmentJob, partition: Partition) -> Committed:
    """Make and commit a partition's shard, unless it is committed already.

    Raises:
        StorageError: a place can't be used, or a newer attempt has taken over.
    """
    url = job.config.output
    place = (job.segment, partition.split, partition.number)
    marker = marker_url(url, place)
    if storage.exists(marker):
        return read_marker(storage.read(marker), marker)
    started = time.time()
    writer = ShardWriter()
    rows = pack_samples(job, partition.inputs.to_pylist(), writer)
    check_attempt(url, job.attempt)
    packed = pack_partition(place, job.fingerprint, writer, rows, (started, time.time()))
    return commit(url, stage(url, packed))


def pack_samples(job: SegmentJob, inputs: Sequence[Input], writer: ShardWriter) -> list[SidecarRow]:
    """Add the inputs' samples to `writer` in order; returns what became of each."""
    results: list[_ConvertedSample | SidecarRow | None] = [None] * len(inputs)
    texts: dict[int, Texts] = {}
    to_fetch = []
    for i, item in enumerate(inputs):
        try:
            refuse_judged(item)
            if item["sidecar"] is None:
                texts[i] = read_texts(job, item)
            to_fetch.append(i)
        except Refused as refused:
            results[i] = _failure(item, refused, None)
    wanted = [FetchRequest.of(inputs[i]) for i in to_fetch]
    for number, fetched in fetch_all(wanted, job.places, job.config.fetch, tasks_at_once=job.tasks_at_once):
        i = to_fetch[number]
        if isinstance(fetched, Refused):
            results[i] = _failure(inputs[i], fetched, None)
        else:
            results[i] = _make(job, inputs[i], texts.get(i), fetched)
    _apply_filters(job, inputs, results)
    rows: list[SidecarRow] = []
    for i, result in enumerate(results):
        if isinstance(result, _ConvertedSample):
            rows.append(result.row._replace(tar_sha256=writer.add(_sample(result))))
            results[i] = None  # frees the image: the writer holds a copy
        else:
            assert result is not None
            rows.append(result)
    return rows


def try_inputs(job: SegmentJob, inputs: Sequence[Input]) -> list[Refused | None]:
    """Try inputs without writing anything; why each can't become a sample, if it can't."""
    rows = pack_samples(job, inputs, ShardWriter())
    return [Refused(row.reason, row.error_message or "") if row.reason else None for row in rows]


def parse_label(raw: bytes | None, classes: tuple[str, ...]) -> int:
    """The class index of a label column's value.

    Raises:
        Refused: label_invalid.
    """
    text = (raw or b"").decode("utf-8", "replace").strip()
    if text in classes:
        return classes.index(text)
    try:
        number = float(text)
    except ValueError:
        problem = f"neither a number nor one of the {len(classes)} classes" if classes else "not a number"
        raise Refused("label_invalid", f"label {text[:100]!r} is {problem}") from None
    if not number.is_integer() or number < 0 or (classes and number >= len(classes)):
        raise Refused("label_invalid", f"label {text[:100]!r} isn't in [0, {len(classes) or 'any'})")
    return int(number)


def refuse_judged(item: Input) -> None:
    """Raise the verdict on an input that was refused after all images were scanned."""
    if item["verdict"] is not None:
        reason, message = json.loads(item["verdict"])
        raise Refused(reason, message)


def read_texts(job: SegmentJob, item: Input, sidecar: bytes | None = None) -> Texts:
    """An input's captions, label and annotations, checked.

    Args:
        sidecar: content of the object that holds its caption, where there is one.

    Raises:
        Refused: one of them can't be used.
    """
    source = job.config.source
    row = item if sidecar is None else source.with_text(item, sidecar)
    return Texts(
        captions=_captions(job.config, row) if source.has_captions else (),
        label=parse_label(item["label"], job.classes) if source.has_labels else None,
        annotations=parse_annotations(item["annotations"]),
        extra=json.loads(item["extra"]) if item["extra"] is not None else {},
    )


def _captions(config: PrepConfig, item: Input) -> tuple[str, ...]:
    """All captions that can be used, of which `txt` holds the first."""
    if item["captions"] is None:
        return (captions.clean(item["caption"], config.caption),)
    usable: dict[str, None] = {}
    refused = Refused("caption_empty", "no caption")
    for number, text in enumerate(json.loads(item["captions"])):
        try:
            usable[captions.clean(text.encode("utf-8", "surrogatepass"), config.caption)] = None
        except Refused as why:
            refused = why if number == 0 else refused
    if not usable:
        raise refused
    return tuple(usable)


def _make(job: SegmentJob, item: Input, texts: Texts | None, fetched: Fetched) -> _ConvertedSample | SidecarRow:
    digest = hashlib.sha256(fetched.data)
    try:
        if item["sha256"] is not None and item["sha256"] != digest.digest():
            raise Refused("changed_while_reading", "the image has changed since it was scanned")
        texts = texts or read_texts(job, item, fetched.sidecar)
        image = images.convert(fetched.data, job.config.image)
        annotations = follow_image(texts.annotations, image.geometry) if texts.annotations is not None else None
    except Refused as refused:
        return _failure(item, refused, digest.hexdigest())
    row = SidecarRow(
        url=_shown(item["url"]),
        caption=texts.captions[0] if texts.captions else None,
        key=sample_key(item["position"]),
        status="success",
        error_message=None,
        width=image.geometry.width,
        height=image.geometry.height,
        original_width=image.geometry.source[0],
        original_height=image.geometry.source[1],
        exif=image.exif,
        sha256=digest.hexdigest(),
        reason="",
        position=item["position"],
        extra=json.dumps(texts.extra, ensure_ascii=False, sort_keys=True) if texts.extra else None,
    )
    return _ConvertedSample(row, image.extension, image.data, texts, annotations)


def _apply_filters(
    job: SegmentJob, inputs: Sequence[Input], results: list[_ConvertedSample | SidecarRow | None]
) -> None:
    """Replace samples that a filter refuses by their failures, and note the scores of the others."""
    if not job.config.filters:
        return
    usable = [i for i, result in enumerate(results) if isinstance(result, _ConvertedSample)]
    candidates = []
    for i in usable:
        sample = results[i]
        assert isinstance(sample, _ConvertedSample)
        candidates.append(Candidate(sample.image, sample.row.caption or "", sample.row.url, sample.texts.extra))
    for i, verdict in zip(usable, judge(job.config.filters, candidates, job.scorers), strict=True):
        sample = results[i]
        assert isinstance(sample, _ConvertedSample)
        if isinstance(verdict, Refused):
            results[i] = _failure(inputs[i], verdict, sample.row.sha256)
        elif verdict:
            extra = sample.texts.extra | verdict
            shown = json.dumps(extra, ensure_ascii=False, sort_keys=True)
            results[i] = sample._replace(row=sample.row._replace(extra=shown), texts=sample.texts._replace(extra=extra))


def _sample(converted: _ConvertedSample) -> Sample:
    facts = converted.row._asdict()
    for column in ("reason", "position", "tar_sha256", "extra"):  # ours, which img2dataset doesn't write
        del facts[column]
    facts = converted.texts.extra | facts
    if len(converted.texts.captions) > 1:
        facts["captions"] = list(converted.texts.captions)
    if converted.annotations is not None:
        facts["annotations"] = converted.annotations
    members = {converted.extension: converted.image}
    if converted.texts.captions:
        members["txt"] = converted.texts.captions[0].encode()
    members["json"] = json_bytes(facts)
    if converted.texts.label is not None:
        members["cls"] = b"%d" % converted.texts.label
    return Sample(converted.row.key, members)


def _failure(item: Input, refused: Refused, sha256: str | None) -> SidecarRow:
    return SidecarRow(
        url=_shown(item["url"]),
        caption=_shown(item["caption"]) if item["caption"] is not None else None,
        key=sample_key(item["position"]),
        status=REASONS[refused.reason].status,
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
