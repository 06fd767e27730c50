"""A data set for people's own code: decoded samples by number or in order, and its shards as a WebDataset pipeline."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from pipeline import storage
from pipeline.data.batch import RawSample
from pipeline.data.images.decode import UnreadableSample, decode
from pipeline.data.manifest import Manifest, Shard, read_index_at, read_manifest
from pipeline.data.reading.members import caption, class_number, image_member
from pipeline.data.reading.shards import parse_sample
from pipeline.data.reading.tar import IMAGE_EXTENSIONS
from pipeline.errors import DataError

READ_BYTES = 16 * 2**20  # of a shard at a time

log = logging.getLogger("vitrail")


class DecodedSample(NamedTuple):
    """One sample of a data set."""

    id: int  # in [0, len(dataset))
    key: str
    image: UInt8[np.ndarray, "h w 3"]
    caption: str | None
    label: int | None  # a number of `Dataset.classes`
    info: Mapping[str, Any]  # of its json member: annotations, size, what the source says; {} where it has none


class Dataset:
    """The samples of a data set that `vitrail prep` or `vitrail index` made, read as they are asked for.

    Args:
        manifest: of the data set.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._offsets = functools.lru_cache(maxsize=64)(functools.partial(_read_offsets, manifest))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, () where there are none."""
        return self.manifest.classes

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, number: int) -> DecodedSample:
        """One sample; negative numbers count from the end.

        Raises:
            IndexError: there is no such sample.
            DataError: it can't be decoded, or the shard is missing.
            StorageError: its shard can't be read.
        """
        sample_id = number + len(self) if number < 0 else number
        shard_number, within = self.manifest.locate(sample_id)
        shard = self.manifest.shards[shard_number]
        start, stop = (int(offset) for offset in self._offsets(shard)[within : within + 2])
        data = _read(self.manifest.tar_url(shard), start, stop)
        try:
            return _decoded(parse_sample(memoryview(data), sample_id))
        except UnreadableSample as error:
            where = f"{self.manifest.tar_url(shard)}, sample {sample_id}"
            raise DataError(error.reason, where=where, fix="leave this sample out") from error

    def __iter__(self) -> Iterator[DecodedSample]:
        """All samples in the order of their ids. One that can't be decoded is left out, with a warning.

        Raises:
            DataError, StorageError: a shard is missing or can't be read.
        """
        first = 0
        for shard in self.manifest.shards:
            yield from _samples_of(self.manifest, shard, first, _decoded)
            first += shard.num_samples

    def webdataset(self, *, decode: bool = True) -> Any:
        """A `webdataset.DataPipeline` over the shards, to which `compose` adds shuffling, mapping and batching. Each
        process and each worker of a `DataLoader` gets its share of the shards.

        A sample is a dict of `__key__`, `__url__` and its members by extension. Decoded are images (uint8 [H,W,3]),
        txt, cls and json; nothing else is passed on, so nothing in a tar can run code, as it can in what webdataset's
        own `decode` unpickles.

        Args:
            decode: otherwise the members are bytes.
        """
        import webdataset

        urls = [self.manifest.tar_url(shard) for shard in self.manifest.shards]
        return webdataset.DataPipeline(
            webdataset.SimpleShardList(urls),
            webdataset.split_by_node,
            webdataset.split_by_worker,
            functools.partial(_webdataset_samples, self.manifest, decode),
        )

    def __repr__(self) -> str:
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"Dataset({self.manifest.url!r}: {len(self)} samples{classes})"


def read_dataset(url: str) -> Dataset:
    """The data set in a folder, local or s3://.

        >>> dataset = vitrail.read_dataset("data/train")
        >>> len(dataset), dataset[0].caption
        (64, 'caption 0')

    Raises:
        DataError: there is none, or it is damaged.
        StorageError: the place can't be read.
    """
    return Dataset(read_manifest(url))


def _read_offsets(manifest: Manifest, shard: Shard) -> Int64[np.ndarray, " n_plus_1"]:
    return read_index_at(manifest.index_url(shard), shard.index_sha256, shard.num_samples, shard.size_bytes)


def _read(url: str, start: int, stop: int) -> bytes:
    try:
        return storage.read_range(url, start, stop)
    except FileNotFoundError as error:
        raise DataError("the shard is missing", where=url, fix="restore it, or make the data set anew") from error


def _samples_of(manifest: Manifest, shard: Shard, first_id: int, make: Callable[[RawSample], Any]) -> Iterator[Any]:
    """What `make` makes of a shard's samples, in order; one that can't be used is left out, with a warning."""
    offsets = _read_offsets(manifest, shard)
    url = manifest.tar_url(shard)
    for first, stop in _runs(offsets):
        data = memoryview(_read(url, int(offsets[first]), int(offsets[stop])))
        for number in range(first, stop):
            begin, end = (int(offset - offsets[first]) for offset in offsets[number : number + 2])
            try:
                yield make(parse_sample(data[begin:end], first_id + number))
            except UnreadableSample as error:
                log.warning("%s: sample %d is left out: %s", url, first_id + number, error.reason)


def _runs(offsets: Int64[np.ndarray, " n_plus_1"]) -> Iterator[tuple[int, int]]:
    """Runs of neighbouring samples of at most `READ_BYTES`, or of one sample where that is larger."""
    first, num_samples = 0, len(offsets) - 1
    while first < num_samples:
        stop = int(np.searchsorted(offsets, offsets[first] + READ_BYTES, side="right")) - 1
        stop = max(stop, first + 1)
        yield first, stop
        first = stop


def _decoded(sample: RawSample) -> DecodedSample:
    members = sample.members
    return DecodedSample(
        id=sample.id,
        key=sample.key,
        image=decode(image_member(sample)),
        caption=caption(sample) if "txt" in members else None,
        label=class_number(bytes(members["cls"])) if "cls" in members else None,
        info=_json(bytes(members["json"])) if "json" in members else {},
    )


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnreadableSample("damaged json member") from error


def _webdataset_samples(
    manifest: Manifest, decode_members: bool, shards: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A stage of a webdataset pipeline: the samples of the shards whose URLs come in."""
    by_url = {manifest.tar_url(shard): number for number, shard in enumerate(manifest.shards)}
    for source in shards:
        number = by_url[source["url"]]
        make = functools.partial(_members, source["url"], decode_members)
        yield from _samples_of(manifest, manifest.shards[number], int(manifest.starts[number]), make)


def _members(url: str, decode_members: bool, sample: RawSample) -> dict[str, Any]:
    decoded = {name: _member(name, sample) if decode_members else bytes(data) for name, data in sample.members.items()}
    return {"__key__": sample.key, "__url__": url, **decoded}


def _member(extension: str, sample: RawSample) -> Any:
    data = bytes(sample.members[extension])
    if extension in IMAGE_EXTENSIONS:
        return decode(data)
    if extension == "txt":
        return caption(sample)
    return class_number(data) if extension == "cls" else _json(data)
