"""Check a data set against its manifest, down to the sample: what `vitrail verify` does."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
from jaxtyping import Int64

from data_prep.shards.finish import REPORT_NAME, SIZES_NAME
from pipeline import storage
from pipeline.data.images import UnreadableSample, decode
from pipeline.data.manifest import MANIFEST_NAME, Manifest, Shard, read_index, read_manifest
from pipeline.errors import DataError

_IMAGES = ("jpg", "jpeg", "png", "webp")
_OTHERS = ("txt", "json", "cls")


class Problem(NamedTuple):
    """One thing that is wrong."""

    where: str  # the object
    sample: str | None  # key of the sample, where it can be told
    what: str

    def __str__(self) -> str:
        return f"{self.where}{f', sample {self.sample}' if self.sample else ''}: {self.what}"


class VerifyReport(NamedTuple):
    """What was checked, and what is wrong with it."""

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
                fix="restore the objects named from a copy, or build the data set anew with `vitrail prep`",
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
            fix="mend the URL, or finish the build with `vitrail prep`",
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{REPORT_NAME} is damaged ({error})", where=url, fix="name the splits' folders") from error


def _check_sizes_file(manifest: Manifest) -> Iterator[Problem]:
    place = storage.join(manifest.url, SIZES_NAME)
    try:
        sizes = json.loads(storage.read(place))
    except (FileNotFoundError, ValueError) as error:
        yield Problem(place, None, f"missing or damaged ({error})")
        return
    if sizes != {shard.name: shard.num_samples for shard in manifest.shards}:
        yield Problem(place, None, "tells other counts than the manifest")


def _check_sidecars(manifest: Manifest) -> Iterator[Problem]:
    for name, sha256 in manifest.info.get("sidecars", {}).items():
        place = storage.join(manifest.url, name)
        try:
            data = storage.read(place)
        except FileNotFoundError:
            yield Problem(place, None, "missing")
            continue
        if hashlib.sha256(data).hexdigest() != sha256:
            yield Problem(place, None, "its bytes aren't those that were written (sha256)")


def _check_shard(manifest: Manifest, shard: Shard) -> Iterator[Problem]:
    place = storage.join(manifest.url, shard.name)
    try:
        archive = storage.read(place)
    except FileNotFoundError:
        yield Problem(place, None, "missing")
        return
    sound = True
    if len(archive) != shard.size_bytes:
        sound = False
        yield Problem(place, None, f"{len(archive)} bytes, the manifest says {shard.size_bytes}")
    elif hashlib.sha256(archive).hexdigest() != shard.sha256:
        sound = False
        yield Problem(place, None, "its bytes aren't those that were written (sha256)")
    keys, digests = _sidecar_samples(manifest, shard)
    index_place = storage.join(manifest.url, shard.index_name)
    try:
        index = storage.read(index_place)
        offsets = np.load(io.BytesIO(index), allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError) as error:
        yield Problem(index_place, None, f"missing or damaged ({error})")
        return
    if hashlib.sha256(index).hexdigest() != shard.index_sha256:
        yield Problem(index_place, None, "its bytes aren't those that were written (sha256)")
        return
    if len(offsets) != shard.num_samples + 1 or offsets[0] != 0 or (np.diff(offsets) <= 0).any():
        yield Problem(index_place, None, f"isn't a rising list of {shard.num_samples + 1} offsets from 0")
        return
    yield from _check_samples(place, archive, offsets, keys, digests, sound=sound)


def _check_samples(
    place: str,
    archive: bytes,
    offsets: Int64[np.ndarray, " n_plus_1"],
    keys: list[str],
    digests: list[str],
    *,
    sound: bool,
) -> Iterator[Problem]:
    """Check each sample's range; in an unsound shard, the sidecar's digests tell which samples are struck."""
    for i, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        key = keys[i] if i < len(keys) else None
        data = archive[start:stop]
        if not sound and i < len(digests):
            if hashlib.sha256(data).hexdigest() != digests[i]:
                yield Problem(place, key, f"damaged: bytes {start} to {stop} aren't those that were written")
            continue
        what = sample_problem(data, key)
        if what is not None:
            yield Problem(place, key or f"number {i}", what)
    if archive[offsets[-1] :].strip(b"\0"):
        yield Problem(place, None, f"holds bytes beyond its last sample, after {offsets[-1]}")


def sample_problem(data: bytes, key: str | None) -> str | None:
    """What is wrong with one sample's byte range of a tar; None if nothing is.

    Args:
        key: the key it must have, where that is known.
    """
    try:
        content = _content(data)
    except (tarfile.TarError, ValueError, EOFError) as error:
        return f"no tar members ({error})"
    keys = {name.partition(".")[0] for name in content}
    if len(keys) != 1 or (key is not None and keys != {key}):
        return f"members of {sorted(keys)} where {key or 'one sample'} should be"
    by_extension = {name.partition(".")[2]: value for name, value in content.items()}
    foreign = set(by_extension) - set(_IMAGES) - set(_OTHERS)
    if foreign:
        return f"unexpected members {sorted(foreign)}"
    pictures = [extension for extension in by_extension if extension in _IMAGES]
    if len(pictures) != 1:
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
    return None if caption else "an empty caption"


def _content(data: bytes) -> dict[str, bytes]:
    """Name -> bytes of the regular files in a piece of a tar."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        files = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        return {name: file.read() for name, file in files.items() if file is not None}


def members_of(data: bytes) -> dict[str, bytes]:
    """Extension -> bytes of one sample's members."""
    return {name.partition(".")[2]: value for name, value in _content(data).items()}


def first_members(manifest: Manifest, count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(shard's name, extension -> bytes) of a split's first samples; the split is shuffled, so they are mixed.

    Raises:
        DataError: an index is missing or damaged.
    """
    for shard in manifest.shards:
        offsets = read_index(manifest, shard)[: count + 1].tolist()
        data = storage.read_range(storage.join(manifest.url, shard.name), offsets[0], offsets[-1])
        for start, stop in itertools.pairwise(offsets):
            yield shard.name, members_of(data[start - offsets[0] : stop - offsets[0]])
        count -= len(offsets) - 1
        if count <= 0:
            return


def first_samples(manifest: Manifest, count: int) -> list[dict[str, Any]]:
    """The first samples of a split in words: shard, caption, members, and what the JSON tells.

    Raises:
        DataError: see `first_members`.
    """
    found: list[dict[str, Any]] = []
    for name, members in first_members(manifest, count):
        facts = json.loads(members.get("json", b"{}"))
        caption = members.get("txt", b"").decode("utf-8", "replace")
        found.append({"shard": name, "caption": caption, **facts, "members": sorted(members)})
    return found


def _sidecar_samples(manifest: Manifest, shard: Shard) -> tuple[list[str], list[str]]:
    """Keys and digests of the shard's samples in order, from its sidecar; empty where that is missing or damaged."""
    place = storage.join(manifest.url, shard.name.removesuffix(".tar") + ".parquet")
    try:
        data = storage.read(place)
        table = pyarrow.parquet.read_table(io.BytesIO(data), columns=["key", "status", "tar_sha256"])
    except (FileNotFoundError, pyarrow.ArrowException, OSError):
        return [], []
    rows = [row for row in table.to_pylist() if row["status"] == "success"]
    return [row["key"] for row in rows], [row["tar_sha256"] for row in rows]
