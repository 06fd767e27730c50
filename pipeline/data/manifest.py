"""The manifest of a data set: which shards there are, and where in them every sample lies.

A data set is a folder (local or `s3://`) of WebDataset tars with one `manifest.json`, written last. Beside every
`00000.tar` stands `00000.index.npy`, int64 [num_samples + 1]: sample *i* of the shard is the byte range
[index[i], index[i+1]) of the tar, all its members with their headers. So any run of neighbouring samples is one
ranged read, and the bytes read are themselves tar members. See docs/formats.md.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from pipeline import storage
from pipeline.errors import DataError

FORMAT = "vitrail.manifest"
FORMAT_VERSION = 2  # 2 adds `shards_url`; what has none is written as 1, which older readers take
MANIFEST_NAME = "manifest.json"


class Shard(NamedTuple):
    """One tar of a data set; names are relative to the manifest's folder, the tar's to `Manifest.shards_url`."""

    name: str
    num_samples: int
    size_bytes: int
    sha256: str
    index_name: str
    index_sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A data set as its `manifest.json` tells it. Sample ids number the samples through all shards in order."""

    url: str  # the folder it was read from
    shards: tuple[Shard, ...]
    num_samples: int
    fingerprint: str  # of the inputs and settings that made it
    classes: tuple[str, ...] = ()  # names of `cls` labels, () where the data have none
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # free facts: source, counts by reason
    shards_url: str | None = None  # folder of the tars, where that isn't the manifest's own

    def tar_url(self, shard: Shard) -> str:
        """Where a shard's tar lies."""
        return storage.join(self.shards_url or self.url, shard.name)

    def index_url(self, shard: Shard) -> str:
        """Where a shard's index lies."""
        return storage.join(self.url, shard.index_name)

    @functools.cached_property
    def starts(self) -> Int64[np.ndarray, " shards_plus_1"]:
        """Id of each shard's first sample, and the number of samples at the end."""
        return np.cumsum([0, *(shard.num_samples for shard in self.shards)], dtype=np.int64)

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard number, index within the shard) of a sample id.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, int(sample_id - self.starts[shard])


def _no_data_set(url: str) -> DataError:
    """What to do about a folder without a manifest; other people's tars are told apart."""
    seen = itertools.islice(storage.entries(url), 10_000)
    names = [entry.url.removeprefix(url.rstrip("/") + "/") for entry in seen]
    tars = [name for name in names if name.endswith(".tar") and "/" not in name]
    if tars:
        return DataError(
            f"no manifest.json, but tars such as {tars[0]}: nothing tells where their samples begin",
            where=url,
            fix="run `vitrail index THIS FOLDER`, which finds that out and leaves the tars as they are (--to OTHER "
            "FOLDER where this one is read-only); to resize or filter, `vitrail prep` with source {type: tars}",
        )
    return DataError(
        "no manifest.json: not a finished data set",
        where=url,
        fix="build it with `vitrail prep`, finish `vitrail index`, or mend the URL",
    )


def read_manifest(url: str) -> Manifest:
    """Read the manifest of the data set at folder `url`.

    Raises:
        DataError: there is none, it isn't one of ours, it contradicts itself, or it is newer than this reader.
        StorageError: the place can't be read.
    """
    path = storage.join(url, MANIFEST_NAME)
    try:
        document = json.loads(storage.read(path))
    except FileNotFoundError as error:
        raise _no_data_set(url) from error
    except ValueError as error:
        raise DataError(f"manifest.json is no JSON ({error})", where=path, fix=_REBUILD_MANIFEST) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(
            "manifest.json isn't a vitrail manifest",
            where=path,
            fix="point at a folder that `vitrail prep` or `vitrail index` wrote",
        )
    version = document.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise DataError(
            f"format_version {version} is newer than this reader ({FORMAT_VERSION})",
            where=path,
            fix="update vitrail",
        )
    try:
        return _parse(url, document)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"manifest.json is damaged: {reason}", where=path, fix=_REBUILD_MANIFEST) from error


def _parse(url: str, document: Mapping[str, Any]) -> Manifest:
    """Build the manifest; KeyError, TypeError or ValueError where the document isn't one."""
    if document["format_version"] not in range(1, FORMAT_VERSION + 1):
        raise ValueError(f"format_version {document['format_version']!r}")
    shards_url = document["shards_url"] if document["format_version"] > 1 else None
    if shards_url is not None and not (isinstance(shards_url, str) and shards_url.startswith(("/", "s3://"))):
        raise ValueError(f"shards_url {shards_url!r} is neither an absolute path nor an s3:// URL")
    shards = tuple(Shard(**_typed(shard, _SHARD_TYPES, f"shard {i}")) for i, shard in enumerate(document["shards"]))
    for shard in shards:
        if shard.num_samples < 0 or shard.size_bytes < 0:
            raise ValueError(f"{shard.name} has a negative size")
        for name in (shard.name, shard.index_name):
            if not name or name.startswith("/") or ".." in name.split("/") or "://" in name:
                raise ValueError(f"{name!r} doesn't name a file of this folder")
    top = _typed({key: document[key] for key in _MANIFEST_TYPES}, _MANIFEST_TYPES, "the document")
    if top["num_samples"] != sum(shard.num_samples for shard in shards):
        raise ValueError("num_samples isn't the sum over the shards")
    if not all(isinstance(name, str) for name in top["classes"]):
        raise ValueError("classes must be names")
    return Manifest(
        url=url,
        shards=shards,
        num_samples=top["num_samples"],
        fingerprint=top["fingerprint"],
        classes=tuple(top["classes"]),
        info=top["info"],
        shards_url=shards_url,
    )


_SHARD_TYPES = {
    "name": str,
    "num_samples": int,
    "size_bytes": int,
    "sha256": str,
    "index_name": str,
    "index_sha256": str,
}
_MANIFEST_TYPES = {"num_samples": int, "fingerprint": str, "classes": list, "info": dict}


def _typed(values: object, types: Mapping[str, type], where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{where} is no mapping")
    for key, kind in types.items():
        if not isinstance(values[key], kind):
            raise TypeError(f"{key} of {where} is no {kind.__name__}")
    return values


def manifest_bytes(manifest: Manifest) -> bytes:
    """`manifest.json` of a manifest: deterministic, so that equal data sets have equal bytes."""
    document = {
        "format": FORMAT,
        "format_version": 1 if manifest.shards_url is None else FORMAT_VERSION,
        "num_samples": manifest.num_samples,
        "fingerprint": manifest.fingerprint,
        "classes": list(manifest.classes),
        "info": manifest.info,
        "shards": [shard._asdict() for shard in manifest.shards],
        **({} if manifest.shards_url is None else {"shards_url": manifest.shards_url}),
    }
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def index_bytes(offsets: Int64[np.ndarray, " n_plus_1"]) -> bytes:
    """The `.index.npy` of a shard."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(offsets, dtype="<i8"), allow_pickle=False)
    return buffer.getvalue()


def index_size_bytes(num_samples: int) -> int:
    """Size of the `.index.npy` of a shard."""
    return len(index_bytes(np.zeros(0, dtype=np.int64))) + 8 * (num_samples + 1)


def read_index(manifest: Manifest, shard: Shard) -> Int64[np.ndarray, " n_plus_1"]:
    """Offsets of a shard's samples; see `read_index_at`."""
    return read_index_at(manifest.index_url(shard), shard.index_sha256, shard.num_samples, shard.size_bytes)


def read_index_at(path: str, sha256: str, num_samples: int, size_bytes: int) -> Int64[np.ndarray, " n_plus_1"]:
    """Offsets of a shard's samples: sample i is the range [index[i], index[i+1]) of its tar.

    Args:
        path: of the index.
        sha256: of the index.
        num_samples: of the shard.
        size_bytes: of the shard's tar.

    Raises:
        DataError: there is no index, or it doesn't belong to the shard.
        StorageError: the place can't be read.
    """
    try:
        data = storage.read(path)
    except FileNotFoundError as error:
        raise DataError("the shard's index is missing", where=path, fix=_REBUILD) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError("the index isn't the one the manifest knows (sha256 differs)", where=path, fix=_REBUILD)
    try:
        offsets: Int64[np.ndarray, " n_plus_1"] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"no index of offsets ({error})", where=path, fix=_REBUILD) from error
    if offsets.dtype != np.dtype("<i8") or offsets.shape != (num_samples + 1,):
        raise DataError(
            f"the index is {offsets.dtype} {list(offsets.shape)}, the manifest wants int64 [{num_samples + 1}]",
            where=path,
            fix=_REBUILD,
        )
    if offsets[0] < 0 or offsets[-1] > size_bytes or bool((np.diff(offsets) <= 0).any()):
        raise DataError("the index's offsets don't rise within the shard", where=path, fix=_REBUILD)
    return offsets


_REBUILD = "build it anew with `vitrail prep`; for tars made elsewhere, delete it and run `vitrail index` again"
_REBUILD_MANIFEST = "delete it and run `vitrail prep` or `vitrail index`, whichever wrote it, again"
