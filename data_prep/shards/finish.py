"""Publishing a segment: committed shards get their final names, then the manifests and the account are written.

Shards are numbered without gaps in the order of the partitions, leaving out those of which no input succeeded. The
names follow from the markers alone, so every step can be repeated: a build that is killed here resumes from them.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from data_prep.account import PrepReport, SplitCount, by_reason
from data_prep.config import PrepConfig
from data_prep.plan.segments import Segment, read_positions
from data_prep.shards import page
from data_prep.shards.commit import (
    STAGED,
    Committed,
    final_names,
    json_bytes,
    marker_bytes,
    marker_url,
    read_document,
    read_marker,
    shard_stem,
    sidecar_bytes,
)
from pipeline import storage
from pipeline.data.manifest import MANIFEST_NAME, Manifest, Shard, manifest_bytes
from pipeline.errors import ConfigError, DataError

REPORT_NAME = "prep.json"
SIZES_NAME = "sizes.json"
REPORT_FORMAT_VERSION = 2
_AT_ONCE = 16

Markers = dict[tuple[int, str, int], Committed]


class NamedPartition(NamedTuple):
    """A committed partition with its final names."""

    part: Committed
    stem: str
    sidecar: str

    @property
    def shard(self) -> Shard | None:
        """The shard as the manifest lists it."""
        if self.part.shard is None:
            return None
        archive, index, *_ = final_names(self.stem)
        return self.part.shard._replace(name=archive, index_name=index)


Splits = dict[str, list[NamedPartition]]  # by name, each with its partitions in order


def read_markers(url: str, segments: Sequence[Segment]) -> Markers:
    """The partitions that are committed so far.

    Raises:
        ConfigError: one belongs to another build.
    """
    markers: Markers = {}
    places = [entry.url for entry in storage.entries(storage.join(url, "_prep", "partitions"))]
    fingerprints = {segment.number: segment.fingerprint for segment in segments}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for place, data in zip(places, pool.map(storage.read, places), strict=True):
            committed = read_marker(data, place)
            if committed.fingerprint != fingerprints.get(committed.segment):
                raise ConfigError(
                    "a partition of another build", where=place, fix="choose another output for this build"
                )
            markers[committed.place] = committed
    return markers


def named(committed: Iterable[Committed]) -> dict[str, list[NamedPartition]]:
    """Split -> its partitions in order with their final names."""
    splits: dict[str, list[NamedPartition]] = defaultdict(list)
    full: Counter[str] = Counter()
    empty: Counter[str] = Counter()
    for part in sorted(committed, key=lambda part: part.place):
        if part.shard is not None:
            stem = shard_stem(full[part.split])
            splits[part.split].append(NamedPartition(part, stem, f"{stem}.parquet"))
            full[part.split] += 1
        else:
            stem = f"failed-{shard_stem(empty[part.split])}"
            splits[part.split].append(NamedPartition(part, stem, f"{stem}.parquet"))
            empty[part.split] += 1
    return dict(sorted(splits.items()))


def finish(
    config: PrepConfig,
    committed: Markers,
    segments: Sequence[Segment],
    classes: tuple[str, ...],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PrepReport:
    """Publish the committed partitions, and write the manifests and the account.

    Args:
        progress: called with the number of published partitions and of all.

    Raises:
        DataError: a split holds no sample, or a committed object is missing.
    """
    url = config.output
    last = segments[-1]
    splits = named(committed.values())
    for split, parts in splits.items():
        if not any(part.shard for part in parts):
            raise DataError(
                f"no input of split {split!r} became a sample",
                where=url,
                fix="correct that split's inputs and build it again",
            )
    done = 0
    total = sum(len(parts) for parts in splits.values())
    for split, parts in splits.items():
        for _ in _publish(url, split, parts):
            done += 1
            progress(done, total)
    if last.kind == "retry":
        splits = _remove_retried(url, splits, last)
    manifests = {split: _manifest(url, split, parts, classes, last.fingerprint) for split, parts in splits.items()}
    for split, manifest in manifests.items():
        sizes = {shard.name: shard.num_samples for shard in manifest.shards}
        storage.write(storage.join(url, split, SIZES_NAME), json_bytes(sizes))
    for split, manifest in manifests.items():
        storage.write(storage.join(url, split, MANIFEST_NAME), manifest_bytes(manifest))
    report = _report(config, splits, manifests, last)
    document = {
        "format": "vitrail.prep",
        "format_version": REPORT_FORMAT_VERSION,
        "segments": len(segments),
        **report.document(),
    }
    page.write_page(report, manifests)
    storage.write(storage.join(url, REPORT_NAME), json_bytes(document))
    _clean_up(url)
    return report


def finished_report(name: str, url: str) -> tuple[int, PrepReport] | None:
    """The number of finished segments and their account; None before the first."""
    place = storage.join(url, REPORT_NAME)
    try:
        document = read_document(place, REPORT_FORMAT_VERSION, "an account of a build", "delete it and run again")
    except FileNotFoundError:
        return None
    report = PrepReport(
        name=name,
        url=url,
        inputs=document["inputs"],
        written=document["written"],
        filtered=by_reason(document["filtered"]),
        failed=by_reason(document["failed"]),
        splits={split: SplitCount(**count) for split, count in document["splits"].items()},
        fingerprint=document["fingerprint"],
        examples=document["examples"],
        resumed_partitions=sum(count["shards"] for count in document["splits"].values()),
    )
    return document["segments"], report


def _publish(url: str, split: str, parts: Sequence[NamedPartition]) -> Iterable[None]:
    """Move staged objects to their final names, many at once; existing ones stay."""
    folder = storage.join(url, split)
    published = {entry.url.rpartition("/")[2] for entry in storage.entries(folder)}

    def move(part: NamedPartition) -> None:
        stats = [] if part.part.shard is None else ["archive", "index", "stats"]
        for ending, name in zip(STAGED, final_names(part.stem), strict=True):
            if ending != "rows" and ending not in stats:
                continue
            target = part.sidecar if ending == "rows" else name
            if target not in published:
                _move(storage.join(url, f"{part.part.staged}.{ending}"), storage.join(folder, target))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(move, parts):
            yield
    _check_sizes(folder, parts)


def _move(source: str, target: str) -> None:
    try:
        storage.move(source, target)
    except FileNotFoundError as error:
        if not storage.exists(target):
            raise DataError(
                "a committed object is missing",
                where=source,
                fix="delete the marker that names it, below _prep/partitions, and run the same command",
            ) from error


def _check_sizes(folder: str, parts: Sequence[NamedPartition]) -> None:
    """Compare the shards with their markers, by one listing."""
    sizes = {entry.url.rpartition("/")[2]: entry.size_bytes for entry in storage.entries(folder)}
    for part in parts:
        shard = part.shard
        if shard is not None and (sizes.get(shard.name) != shard.size_bytes or shard.index_name not in sizes):
            raise DataError(
                f"{shard.name} was committed with {shard.size_bytes} bytes and now has {sizes.get(shard.name, 'none')}",
                where=folder,
                fix="restore it from a copy, or build it again",
            )


def _remove_retried(
    url: str, splits: dict[str, list[NamedPartition]], retry: Segment
) -> dict[str, list[NamedPartition]]:
    """Remove the inputs that a retry tried again from their former sidecars, so that each input has one row."""
    positions = pa.array(read_positions(url, retry))

    def without(item: NamedPartition) -> NamedPartition:
        part = item.part
        if part.segment >= retry.number or part.retried >= retry.number or not set(part.refused) & set(retry.reasons):
            return item
        place = storage.join(url, part.split, item.sidecar)
        table = pyarrow.parquet.read_table(io.BytesIO(storage.read(place)))
        remaining = table.filter(pc.invert(pc.is_in(table.column("position"), positions)))
        data = sidecar_bytes(remaining)
        counts = Counter(reason for reason in remaining.column("reason").to_pylist() if reason)
        part = part._replace(
            inputs=remaining.num_rows,
            refused=by_reason(counts),
            examples={reason: example for reason, example in part.examples.items() if counts[reason]},
            sidecar_sha256=hashlib.sha256(data).hexdigest(),
            retried=retry.number,
        )
        storage.write(place, data)
        storage.write(marker_url(url, part.place), marker_bytes(part))
        return item._replace(part=part)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return {split: list(pool.map(without, parts)) for split, parts in splits.items()}


def _manifest(
    url: str, split: str, parts: list[NamedPartition], classes: tuple[str, ...], fingerprint: str
) -> Manifest:
    shards = tuple(shard for part in parts if (shard := part.shard) is not None)
    refused: Counter[str] = Counter()
    for part in parts:
        refused.update(part.part.refused)
    return Manifest(
        url=storage.join(url, split),
        shards=shards,
        num_samples=sum(shard.num_samples for shard in shards),
        fingerprint=hashlib.sha256(f"{fingerprint} {split}".encode()).hexdigest(),
        classes=classes,
        info={
            "split": split,
            "inputs": sum(part.part.inputs for part in parts),
            "filtered": by_reason(refused, filtered=True),
            "failed": by_reason(refused, filtered=False),
            "sidecars": {part.sidecar: part.part.sidecar_sha256 for part in parts},
        },
    )


def _report(
    config: PrepConfig, splits: dict[str, list[NamedPartition]], manifests: dict[str, Manifest], last: Segment
) -> PrepReport:
    refused: Counter[str] = Counter()
    examples: dict[str, str] = {}
    inputs = 0
    for parts in splits.values():
        for part, _, _ in parts:
            inputs += part.inputs
            refused.update(part.refused)
            for reason, example in part.examples.items():
                examples.setdefault(reason, example)
    counts = {
        split: SplitCount(
            manifest.num_samples, len(manifest.shards), sum(shard.size_bytes for shard in manifest.shards)
        )
        for split, manifest in manifests.items()
    }
    report = PrepReport(
        name=config.name,
        url=config.output,
        inputs=inputs,
        written=sum(count.samples for count in counts.values()),
        filtered=by_reason(refused, filtered=True),
        failed=by_reason(refused, filtered=False),
        splits=counts,
        fingerprint=last.fingerprint,
        examples={reason: examples[reason] for reason in by_reason(refused) if reason in examples},
    )
    if report.inputs != report.written + sum(report.filtered.values()) + sum(report.failed.values()):
        raise RuntimeError(f"the account doesn't add up: {report}")
    if report.inputs != last.stop:
        raise RuntimeError(f"{last.stop} inputs were read, but {report.inputs} are accounted for: {report}")
    return report


def _clean_up(url: str) -> None:
    """Delete what only this segment needed: staged objects of dead tasks, and copies of downloads."""
    leftovers = [entry.url for entry in storage.entries(storage.join(url, "_prep", "staged"))]
    leftovers += [
        entry.url for entry in storage.entries(storage.join(url, "_prep", "scan")) if entry.url.endswith(".bytes")
    ]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(storage.delete, leftovers))
