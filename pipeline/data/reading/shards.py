"""Reading samples from shards: ranged reads through storage, of which the tar's members are taken.

Only regular files with an extension of `EXTENSIONS` become members; everything else in a tar is passed over unseen,
nothing is unpickled, and no name is ever taken for a command or a path. A sample that can't be read is an
`UnreadableSample` that says why; only a place that doesn't answer is an error.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64

from pipeline import storage
from pipeline.data.batch import RawSample
from pipeline.data.images.decode import UnreadableSample
from pipeline.data.manifest import read_index_at
from pipeline.data.order.tasks import Read, SampleLocation, ShardPlace
from pipeline.data.reading.cache import RangeCache
from pipeline.data.reading.tar import EXTENSIONS, key_and_extension, tar_members

COPIED_BYTES = 4096  # smaller members are copied out of what was read; larger ones are views of it
READ_THREADS = 8
PATIENCE_S = 300.0  # how long a store may stay silent in the middle of a run

_KEPT_INDICES = 64

logger = logging.getLogger(__name__)


def parse_sample(data: memoryview, sample_id: int) -> RawSample:
    """The sample whose tar members, with their headers, are `data`.

    Raises:
        UnreadableSample: damaged headers, members of several samples, the same extension twice, or no member.
    """
    key: str | None = None
    members: dict[str, bytes | memoryview] = {}
    for member in tar_members(data):
        parts = key_and_extension(member.name)
        if parts is None or parts[1] not in EXTENSIONS:
            continue
        member_key, extension = parts
        if key is None:
            key = member_key
        elif member_key != key:
            raise UnreadableSample(f"holds members of {key!r} and of {member_key!r}")
        if extension in members:
            raise UnreadableSample(f"holds {key}.{extension} twice")
        content = data[member.start : member.stop]
        members[extension] = content if len(content) >= COPIED_BYTES else bytes(content)
    if key is None:
        raise UnreadableSample("no member of a known kind")
    return RawSample(sample_id, key, members)


class Bytes(NamedTuple):
    """What was read of a run of neighbouring samples of one shard."""

    first: int  # number of the first sample within the shard
    data: memoryview
    offsets: Int64[np.ndarray, " n_plus_1"]  # of the samples in the shard
    fault: str = ""  # why there is nothing

    def sample(self, number: int, sample_id: int) -> RawSample:
        """One of the samples, by its number within the shard.

        Raises:
            UnreadableSample: see `parse_sample`; or the shard is missing or too short.
        """
        if self.fault:
            raise UnreadableSample(self.fault)
        i = number - self.first
        start, stop = (int(offset - self.offsets[0]) for offset in self.offsets[i : i + 2])
        if stop > len(self.data):
            raise UnreadableSample("the shard ends before the sample does")
        return parse_sample(self.data[start:stop], sample_id)


class ShardReader:
    """Reads runs of samples; may be used by several threads.

    Args:
        stop: ends the retries against a store that doesn't answer.
        cache: keeps what is read of remote shards; None: nothing is kept.
    """

    def __init__(self, stop: threading.Event, cache: RangeCache | None = None) -> None:
        self._stop = stop
        self._cache = cache
        self._index = functools.lru_cache(maxsize=_KEPT_INDICES)(self._read_index)

    def read(self, read: Read) -> Bytes:
        """A run of samples, in one ranged read.

        Raises:
            DataError: the shard's index is missing or isn't the manifest's.
            StorageError: the place can't be read; one that is busy is waited for, up to `PATIENCE_S`.
        """
        shard = read.shard
        offsets = self._index(shard)[read.first : read.stop + 1]
        start, stop = int(offsets[0]), int(offsets[-1])

        def fetch(start: int, stop: int) -> bytes:
            return patiently(lambda: storage.read_range(shard.url, start, stop), self._stop)

        try:
            data: bytes | memoryview
            if self._cache is not None and storage.is_remote(shard.url):
                data = self._cache.read(f"{shard.url} {shard.sha256}", start, stop, shard.size_bytes, fetch)
            else:
                data = fetch(start, stop)
        except FileNotFoundError:
            return Bytes(read.first, memoryview(b""), offsets, "the shard is missing")
        return Bytes(read.first, memoryview(data), offsets)

    def _read_index(self, shard: ShardPlace) -> Int64[np.ndarray, " n_plus_1"]:
        return patiently(
            lambda: read_index_at(shard.index_url, shard.index_sha256, shard.num_samples, shard.size_bytes), self._stop
        )


ResultT = TypeVar("ResultT")


def patiently(read: Callable[[], ResultT], stop: threading.Event) -> ResultT:
    """The result of `read`, tried again while the store doesn't answer: an outage shouldn't end a long run."""
    deadline = time.monotonic() + PATIENCE_S
    wait_s = 1.0
    while True:
        try:
            return read()
        except storage.StorageUnavailable as error:
            if time.monotonic() + wait_s > deadline:
                raise
            logger.warning("%s: %s; trying again in %.0f s", error.where, error.what, wait_s)
            if stop.wait(wait_s):
                raise
            wait_s = min(2 * wait_s, 30.0)


class ReadAhead:
    """Groups of reads done by a few threads before they are needed."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="shards")
        self._groups: dict[int, list[tuple[ShardPlace, Future[Bytes]]]] = {}

    def open(self, groups: Mapping[int, Sequence[Read]]) -> None:
        """Start reading groups."""
        for number, reads in groups.items():
            self._groups[number] = [(read.shard, self._threads.submit(self._reader.read, read)) for read in reads]

    def forget(self, groups: Sequence[int]) -> None:
        """Drop groups that aren't needed any more."""
        for number in groups:
            for _, data in self._groups.pop(number):
                data.cancel()

    def sample(self, location: SampleLocation, sample_id: int) -> RawSample:
        """One sample of an open group, waiting for it.

        Raises:
            UnreadableSample: it can't be used.
            DataError, StorageError: the data set can't be read.
        """
        return self._groups[location.group][location.read][1].result().sample(location.number, sample_id)

    def shard(self, location: SampleLocation) -> ShardPlace:
        """The shard a sample of an open group lies in."""
        return self._groups[location.group][location.read][0]

    def close(self) -> None:
        """Drop everything; reads under way are waited for."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._groups.clear()
