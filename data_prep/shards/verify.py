"""Check a data set against its manifest, down to the sample: what `vitrail verify` does."""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow.parquet
from jaxtyping import Int64

from data_prep.shards.contents import is_indexed, tar_content
from data_prep.shards.finish import REPORT_NAME, SIZES_NAME
from pipeline import storage
from pipeline.data.images.decode import UnreadableSample, decode
from pipeline.data.manifest import MANIFEST_NAME, Manifest, Shard, read_manifest
from pipeline.data.reading.tar import EXTENSIONS, IMAGE_EXTENSIONS, key_and_extension
from pipeline.errors import DataError

PIECE_BYTES = 16 * 2**20  # read at once, or one sample where that is larger


class Problem(NamedTuple):
    """One defect."""

    where: str  # the object
    sample: str | None  # its key, where one sample is affected
    what: str

    def __str__(self) -> str:
        return f"{self.where}{f', sample {self.sample}' if self.sample else ''}: {self.what}"


class VerifyReport(NamedTuple):
    """What was checked, and the defects."""

    url: str
    shards: int
    samples: int
    size_bytes: int
    problems: tuple[Problem, ...]

    def raise_if_damaged(self) -> None:
        """Raise a DataError that names the first problems, if there are any."""
        if self.problems:
            shown = "; ".join(str(problem) for problem in self.problems[:5])
            more = f"; and {len(self.problems) - 5} more" if len(self.problems) > 5 else ""
            raise DataError(
                f"{len(self.problems)} problems: {shown}{more}",
                where=self.url,
                fix="restore these objects from a copy, or make the data set again with `vitrail prep`, or, for "
                "others' tars, with `vitrail index`",
            )


def verify(url: str, *, progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
    """Read every shard of the data set at `url`, or of all splits below it, and check everything the manifests say.

    Checked are each shard's and index's size and sha256, each sample's byte range, members and image (decoded), the
    sidecars and `sizes.json`.

    Args:
        progress: called with the shards done and their total.

    Raises:
        DataError: there is no data set.
        StorageError: the place can't be read.
    """
    manifests = [read_manifest(folder) for folder in _folders(url)]
    total = sum(len(manifest.shards) for manifest in manifests)
    problems: list[Problem] = []
    done = 0
    for manifest in manifests:
        problems += _check_sizes_file(manifest)
        problems += _check_sidecars(manifest)
        for shard in manifest.shards:
            problems += _check_shard(manifest, shard)
            done += 1
            progress(done, total)
    shards = [shard for manifest in manifests for shard in manifest.shards]
    return VerifyReport(
        url=url,
        shards=total,
        samples=sum(shard.num_samples for shard in shards),
        size_bytes=sum(shard.size_bytes for shard in shards),
        problems=tuple(problems),
    )


def _folders(url: str) -> list[str]:
    """The folders of the splits below `url`, or `url` itself."""
    if storage.exists(storage.join(url, MANIFEST_NAME)):
        return [url]
    try:
        report = json.loads(storage.read(storage.join(url, REPORT_NAME)))
        return [storage.join(url, split) for split in report["splits"]]
    except FileNotFoundError:
        raise DataError(
            f"neither {MANIFEST_NAME} nor {REPORT_NAME}: not a finished data set",
            where=url,
            fix="correct the URL, or finish the build with `vitrail prep`, or run `vitrail index` on existing tars",
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{REPORT_NAME} is damaged ({error})", where=url, fix="name the splits' folders") from error


def _check_sizes_file(manifest: Manifest) -> Iterator[Problem]:
    if is_indexed(manifest):
        return  # there may be one, of somebody else's
    place = storage.join(manifest.url, SIZES_NAME)
    try:
        sizes = json.loads(storage.read(place))
    except (FileNotFoundError, ValueError) as error:
        yield Problem(place, None, f"missing or damaged ({error})")
        return
    if sizes != {shard.name: shard.num_samples for shard in manifest.shards}:
        yield Problem(place, None, "holds other counts than the manifest")


def _check_sidecars(manifest: Manifest) -> Iterator[Problem]:
    for name, sha256 in manifest.info.get("sidecars", {}).items():
        place = storage.join(manifest.url, name)
        try:
            data = storage.read(place)
        except FileNotFoundError:
            yield Problem(place, None, "missing")
            continue
        if hashlib.sha256(data).hexdigest() != sha256:
            yield Problem(place, None, "its bytes differ from those that were written (sha256)")


def _check_shard(manifest: Manifest, shard: Shard) -> Iterator[Problem]:
    place = manifest.tar_url(shard)
    offsets, wrong_index = _checked_index(manifest, shard)
    try:
        size_bytes = storage.size_bytes(place)
    except FileNotFoundError:
        yield Problem(place, None, "missing")
        return
    if size_bytes != shard.size_bytes:
        yield Problem(place, None, f"{size_bytes} bytes, the manifest says {shard.size_bytes}")
    keys, digests = _sidecar_samples(manifest, shard)
    whole = hashlib.sha256()
    damaged: list[Problem] = []  # by the sidecar's digests
    unusable: list[Problem] = []
    after = False  # whether anything follows the last sample
    for i, start, data in _pieces(place, offsets.tolist(), size_bytes):
        whole.update(data)
        if i is None:
            after = after or (start >= offsets[-1] and bool(data.strip(b"\0")))
            continue
        key = keys[i] if i < len(keys) else None
        if i < len(digests) and hashlib.sha256(data).hexdigest() != digests[i]:
            what = f"damaged: bytes {start} to {start + len(data)} differ from those that were written"
            damaged.append(Problem(place, key, what))
        what_is_wrong = sample_problem(data, key, foreign=is_indexed(manifest))
        if what_is_wrong is not None:
            unusable.append(Problem(place, key or f"number {i}", what_is_wrong))
    sound = size_bytes == shard.size_bytes and whole.hexdigest() == shard.sha256
    if size_bytes == shard.size_bytes and not sound:
        yield Problem(place, None, "its bytes differ from those that were written (sha256)")
    if wrong_index is not None:
        yield wrong_index
        return
    # In a damaged shard the sidecar's digests show which samples are affected.
    yield from damaged if digests and not sound else unusable
    if after and not is_indexed(manifest):
        yield Problem(place, None, f"holds bytes beyond its last sample, after {offsets[-1]}")


def _checked_index(manifest: Manifest, shard: Shard) -> tuple[Int64[np.ndarray, " n_plus_1"], Problem | None]:
    """A shard's offsets; where they are wrong, offsets of no sample, and the defect."""
    nothing = np.full(1, shard.size_bytes, dtype=np.int64)
    place = manifest.index_url(shard)
    try:
        index = storage.read(place)
        offsets = np.load(io.BytesIO(index), allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError) as error:
        return nothing, Problem(place, None, f"missing or damaged ({error})")
    if hashlib.sha256(index).hexdigest() != shard.index_sha256:
        return nothing, Problem(place, None, "its bytes differ from those that were written (sha256)")
    first_is_right = offsets[0] >= 0 if is_indexed(manifest) else offsets[0] == 0
    if len(offsets) != shard.num_samples + 1 or not first_is_right or (np.diff(offsets) <= 0).any():
        return nothing, Problem(place, None, f"isn't a rising list of {shard.num_samples + 1} offsets from 0")
    return offsets, None


def _pieces(place: str, offsets: list[int], size_bytes: int) -> Iterator[tuple[int | None, int, bytes]]:
    """All bytes of a tar in order: (number, start, bytes) of each sample, with number None for what lies before and
    after the samples. It is read in pieces of several samples, of which one is in memory.
    """
    if size_bytes < offsets[-1]:
        offsets = [min(offset, size_bytes) for offset in offsets]
    yield from _plain(place, 0, offsets[0])
    first = 0
    while first < len(offsets) - 1:
        stop = max(first + 1, bisect.bisect_right(offsets, offsets[first] + PIECE_BYTES) - 1)
        data = storage.read_range(place, offsets[first], offsets[stop])
        for i in range(first, stop):
            start, end = offsets[i] - offsets[first], offsets[i + 1] - offsets[first]
            yield i, offsets[i], data[start:end]
        first = stop
    yield from _plain(place, offsets[-1], size_bytes)


def _plain(place: str, start: int, stop: int) -> Iterator[tuple[None, int, bytes]]:
    for at in range(start, stop, PIECE_BYTES):
        yield None, at, storage.read_range(place, at, min(at + PIECE_BYTES, stop))


def sample_problem(data: bytes, key: str | None, *, foreign: bool = False) -> str | None:
    """What is wrong with one sample's byte range of a tar; None: nothing.

    Args:
        key: the key it must have, where that is known.
        foreign: another program wrote it: members that no stage reads, several images and empty captions are fine.
    """
    try:
        content = tar_content(data)
    except (tarfile.TarError, ValueError, EOFError) as error:
        return f"not tar members ({error})"
    members = {parts: value for name, value in content.items() if (parts := key_and_extension(name)) is not None}
    if foreign:
        members = {parts: value for parts, value in members.items() if parts[1] in EXTENSIONS}
    keys = {name for name, _ in members}
    if len(keys) != 1 or (key is not None and keys != {key}):
        return f"members of {sorted(keys)} where {key or 'one sample'} should be"
    by_extension = {extension: value for (_, extension), value in members.items()}
    unknown = set(by_extension) - EXTENSIONS
    if unknown:
        return f"unexpected members {sorted(unknown)}"
    pictures = [extension for extension in IMAGE_EXTENSIONS if extension in by_extension]
    if len(pictures) != 1 and not (foreign and pictures):
        return f"{len(pictures)} images"
    try:
        decode(by_extension[pictures[0]])
        json.loads(by_extension.get("json", b"{}"))
        int(by_extension.get("cls", b"0"))
        caption = by_extension.get("txt", b"-").decode()
    except UnreadableSample as error:
        return f"its image can't be read: {error.reason}"
    except ValueError as error:
        return f"a member is damaged ({error})"
    return None if caption or foreign else "an empty caption"


def _sidecar_samples(manifest: Manifest, shard: Shard) -> tuple[list[str], list[str]]:
    """Keys and digests of the shard's samples in order, from its sidecar; empty where that is missing or damaged."""
    name = shard.name.removesuffix(".tar") + ".parquet"
    if name not in manifest.info.get("sidecars", {}):
        return [], []  # a file of somebody else's
    place = storage.join(manifest.url, name)
    try:
        data = storage.read(place)
        table = pyarrow.parquet.read_table(io.BytesIO(data), columns=["key", "status", "tar_sha256"])
    except (FileNotFoundError, pyarrow.ArrowException, OSError):
        return [], []
    rows = [row for row in table.to_pylist() if row["status"] == "success"]
    return [row["key"] for row in rows], [row["tar_sha256"] for row in rows]
