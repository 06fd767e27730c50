"""Signatures of evaluation sets, by which their images are kept out of a training set (decontamination)."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_prep import partitions
from data_prep.account import Refused
from data_prep.config import ImageConfig, PrepConfig
from data_prep.duplicates import scanning
from data_prep.duplicates.dedup import Signatures
from data_prep.duplicates.signatures import perceptual_hash
from data_prep.samples import images
from data_prep.sources.folders import is_image
from pipeline import storage
from pipeline.data.manifest import MANIFEST_NAME, read_index, read_manifest
from pipeline.data.reading.tar import first_image
from pipeline.errors import DataError

_IMAGES_A_TASK = 1024
_ANY_SIZE = ImageConfig(max_aspect=1e9, max_pixels=400_000_000)


class _Task(NamedTuple):
    """Images of an evaluation set: a shard's, or files."""

    number: int
    folder: str
    shard: int | None
    files: tuple[str, ...]


def signatures(config: PrepConfig, stop: Callable[[], bool]) -> Signatures:
    """Those of all images of the evaluation sets that `config.dedup` names; stored in the output, so computed once.

    Raises:
        DataError: a set can't be read, or holds no image.
    """
    parts = []
    for place in config.dedup.evaluation:
        name = hashlib.sha256(place.encode()).hexdigest()[:16]
        stored = storage.join(config.output, "_prep", "evaluation", f"{name}.npz")
        if not storage.exists(stored):
            results = partitions.run(_signatures, _tasks(place), config.ray, stop=stop)
            images_of_set = scanning.joined([part for _, part in sorted(results, key=lambda result: result[0])])
            if not len(images_of_set.usable):
                raise DataError("holds no images", where=f"dedup.evaluation {place}", fix="correct the place")
            buffer = io.BytesIO()
            np.savez(buffer, digests=images_of_set.digests, hashes=images_of_set.hashes)
            storage.create(stored, buffer.getvalue())
        arrays = np.load(io.BytesIO(storage.read(stored)), allow_pickle=False)
        parts.append(Signatures(arrays["digests"], arrays["hashes"], np.ones(len(arrays["hashes"]), dtype=bool)))
    return scanning.joined(parts)


def _tasks(place: str) -> list[_Task]:
    if storage.exists(storage.join(place, MANIFEST_NAME)):
        shards = range(len(read_manifest(place).shards))
        return [_Task(number, place, number, ()) for number in shards]
    files = [entry.url for entry in storage.entries(place) if is_image(entry.url)]
    return [
        _Task(number, place, None, tuple(files[start : start + _IMAGES_A_TASK]))
        for number, start in enumerate(range(0, len(files), _IMAGES_A_TASK))
    ]


def _signatures(task: _Task) -> tuple[int, Signatures]:
    digests, hashes = [], []
    pairs = _of_shard(task.folder, task.shard) if task.shard is not None else _of_files(task.files)
    for digest, data in pairs:
        try:
            hashes.append(perceptual_hash(images.thumbnail(data, _ANY_SIZE)))
            digests.append(digest)
        except Refused:
            continue  # an image that can't be decoded can't be evaluated on either
    words = np.frombuffer(b"".join(digest[:16] for digest in digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    return task.number, Signatures(words, np.array(hashes, dtype=np.uint64), np.ones(len(hashes), dtype=bool))


def _of_files(files: tuple[str, ...]) -> list[tuple[bytes, bytes]]:
    """(digest, image) of each file."""
    return [(hashlib.sha256(data).digest(), data) for data in map(storage.read, files)]


def _of_shard(folder: str, number: int) -> list[tuple[bytes, bytes]]:
    """(digest of the source, stored image) of each sample."""
    from pipeline.data.reading.shards import parse_sample  # imports torch, which nothing else here needs

    manifest = read_manifest(folder)
    shard = manifest.shards[number]
    archive = memoryview(storage.read(manifest.tar_url(shard)))
    offsets = read_index(manifest, shard).tolist()
    pairs = []
    for start, stop in itertools.pairwise(offsets):
        members = parse_sample(archive[start:stop], 0).members
        image = first_image(members)
        if image is None:
            continue  # tars of other programs may hold such samples, and any JSON
        data = bytes(image)
        facts = json.loads(bytes(members.get("json", b"{}")))
        digest = facts.get("sha256") if isinstance(facts, dict) else None
        pairs.append((bytes.fromhex(digest) if digest else hashlib.sha256(data).digest(), data))
    return pairs
