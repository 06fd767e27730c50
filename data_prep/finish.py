"""The end of a build: shards without gaps in their numbers, manifests, the account.

Every step can be repeated: a build that is killed here goes on from the commit markers.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from data_prep.account import PrepReport, SplitCount, by_reason
from data_prep.config import PrepConfig
from data_prep.shards import Committed, json_bytes, marker_bytes, marker_url, read_marker, shard_stem
from pipeline import storage
from pipeline.data.manifest import MANIFEST_NAME, Manifest, Shard, manifest_bytes
from pipeline.errors import ConfigError, DataError

REPORT_NAME = "prep.json"
SIZES_NAME = "sizes.json"
REPORT_FORMAT_VERSION = 1
_MARKERS_AT_ONCE = 16

Markers = dict[tuple[str, int], Committed]


def read_markers(url: str, fingerprint: str) -> Markers:
    """The partitions that are committed so far, by split and number.

    Raises:
        ConfigError: one belongs to another build.
    """
    found: Markers = {}
    places = [entry.url for entry in storage.entries(storage.join(url, "_prep", "partitions"))]
    with ThreadPoolExecutor(_MARKERS_AT_ONCE) as pool:
        for place, data in zip(places, pool.map(storage.read, places), strict=True):
            committed = read_marker(data, place)
            if committed.fingerprint != fingerprint:
                raise ConfigError(
                    "a partition of another build lies here", where=place, fix="choose another output for this build"
                )
            found[committed.split, committed.number] = committed
    return found


def finish(config: PrepConfig, committed: Markers, classes: tuple[str, ...], fingerprint: str) -> PrepReport:
    """Write what makes the committed partitions a data set.

    Raises:
        DataError: a split holds no sample, or a committed shard has gone.
    """
    url = config.output
    failed: Counter[str] = Counter()
    examples: dict[str, str] = {}
    splits: dict[str, SplitCount] = {}
    manifests: dict[str, Manifest] = {}
    for split in sorted({split for split, _ in committed}):
        parts = [committed[key] for key in sorted(committed) if key[0] == split]
        for part in parts:
            failed.update(part.failed)
            for reason, example in part.examples.items():
                examples.setdefault(reason, example)
        parts = close_gaps(url, parts)
        manifests[split] = _manifest(url, split, parts, classes, fingerprint)
        shards = manifests[split].shards
        splits[split] = SplitCount(manifests[split].num_samples, len(shards), sum(shard.size_bytes for shard in shards))
    for split, manifest in manifests.items():
        sizes = {shard.name: shard.num_samples for shard in manifest.shards}
        storage.write(storage.join(url, split, SIZES_NAME), json_bytes(sizes))
    for split, manifest in manifests.items():
        storage.write(storage.join(url, split, MANIFEST_NAME), manifest_bytes(manifest))
    report = PrepReport(
        name=config.name,
        url=url,
        inputs=sum(part.inputs for part in committed.values()),
        written=sum(count.samples for count in splits.values()),
        failed=by_reason(failed),
        splits=splits,
        fingerprint=fingerprint,
        examples={reason: examples[reason] for reason in by_reason(failed)},
    )
    if report.inputs != report.written + sum(report.failed.values()):
        raise RuntimeError(f"the account doesn't add up: {report}")
    document = {"format": "vitrail.prep", "format_version": REPORT_FORMAT_VERSION} | report.document()
    storage.write(storage.join(url, REPORT_NAME), json_bytes(document))
    return report


def finished_report(name: str, url: str, fingerprint: str) -> PrepReport | None:
    """The account of a build that is complete; None of any other."""
    try:
        document = json.loads(storage.read(storage.join(url, REPORT_NAME)))
    except FileNotFoundError:
        return None
    if document["fingerprint"] != fingerprint:
        return None
    return PrepReport(
        name=name,
        url=url,
        inputs=document["inputs"],
        written=document["written"],
        failed=by_reason(document["failed"]),
        splits={split: SplitCount(**count) for split, count in document["splits"].items()},
        fingerprint=fingerprint,
        examples=document["examples"],
        resumed_partitions=sum(count["shards"] for count in document["splits"].values()),
    )


def close_gaps(url: str, parts: list[Committed]) -> list[Committed]:
    """The partitions of a split, their shards numbered 0, 1, ...: loaders take brace ranges of shard names.

    A partition without samples leaves a gap, which the split's last shard then fills. First its objects are copied,
    then its marker names the copies, then the old ones go; repeating any of it does no harm.
    """
    full = [part for part in parts if part.shard is not None]
    parts = list(parts)
    taken = {_stem(part) for part in full}
    gaps = [shard_stem(n) for n in range(len(full)) if shard_stem(n) not in taken]
    surplus = [part for part in full if int(_stem(part)) >= len(full)]
    for stem, part in zip(gaps, surplus, strict=True):
        parts[parts.index(part)] = _rename(url, part, stem)
    for part in parts:
        if part.shard is not None and _stem(part) != shard_stem(part.number):
            for name in _object_names(shard_stem(part.number)):
                storage.delete(storage.join(url, part.split, name))
    return parts


def _rename(url: str, part: Committed, stem: str) -> Committed:
    assert part.shard is not None
    folder = storage.join(url, part.split)
    old_names, new_names = _object_names(_stem(part)), _object_names(stem)
    for old, new in zip(old_names, new_names, strict=True):
        storage.write(storage.join(folder, new), storage.read(storage.join(folder, old)))
    shard = part.shard._replace(name=f"{stem}.tar", index_name=f"{stem}.index.npy")
    renamed = part._replace(shard=shard, sidecar_name=f"{stem}.parquet")
    storage.write(marker_url(url, part.split, part.number), marker_bytes(renamed))
    return renamed


def _stem(part: Committed) -> str:
    assert part.shard is not None
    return part.shard.name.removesuffix(".tar")


def _object_names(stem: str) -> tuple[str, ...]:
    return f"{stem}.tar", f"{stem}.index.npy", f"{stem}.parquet", f"{stem}_stats.json"


def _manifest(url: str, split: str, parts: list[Committed], classes: tuple[str, ...], fingerprint: str) -> Manifest:
    full = sorted((part for part in parts if part.shard is not None), key=lambda part: int(_stem(part)))
    shards = tuple(part.shard for part in full if part.shard is not None)
    if not shards:
        raise DataError(
            f"no input of split {split!r} became a sample", where=url, fix="mend that split's inputs and build anew"
        )
    _check_sizes(url, split, shards)
    failed: Counter[str] = Counter()
    for part in parts:
        failed.update(part.failed)
    return Manifest(
        url=storage.join(url, split),
        shards=shards,
        num_samples=sum(shard.num_samples for shard in shards),
        fingerprint=hashlib.sha256(f"{fingerprint} {split}".encode()).hexdigest(),
        classes=classes,
        info={
            "split": split,
            "inputs": sum(part.inputs for part in parts),
            "failed": by_reason(failed),
            "sidecars": {part.sidecar_name: part.sidecar_sha256 for part in parts},
        },
    )


def _check_sizes(url: str, split: str, shards: tuple[Shard, ...]) -> None:
    """What the markers name must still lie there, in one listing."""
    folder = storage.join(url, split)
    found = {entry.url.rpartition("/")[2]: entry.size_bytes for entry in storage.entries(folder)}
    for shard in shards:
        if found.get(shard.name) != shard.size_bytes or shard.index_name not in found:
            raise DataError(
                f"{shard.name} was committed with {shard.size_bytes} bytes and now has {found.get(shard.name, 'none')}",
                where=folder,
                fix="delete the marker that names it, below _prep/partitions, and run the same command",
            )
