"""One tar, read once from front to back: where its samples lie, what they hold, and what is wrong with it.

Samples are what WebDataset sees in the tar: neighbouring members that share a key. In memory are only two pieces
of a tar, 16 bytes for each key and 8 for each offset.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from pipeline import storage
from pipeline.data.images.decode import UnreadableSample
from pipeline.data.reading.members import class_number
from pipeline.data.reading.tar import (
    BLOCK_BYTES,
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    DamagedTar,
    TarEntry,
    key_and_extension,
    tar_entries,
)
from pipeline.errors import Stopped

PIECE_BYTES = 16 * 2**20
NO_SAMPLE, LINK = "without an extension", "links and devices"  # kinds of members that belong to no sample
_MAX_LABEL_BYTES = 64
_MAX_KINDS = 50  # of members that no stage reads; more are counted together
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
_UNPACK = "unpack it (`gunzip`, `unzstd`, ...): images don't get smaller, and only a plain tar can be read in parts"
_FETCH = "fetch or write it again"


class TarProblem(NamedTuple):
    """Why a tar can't be used as it is."""

    what: str
    fix: str


class TarRecord(NamedTuple):
    """What is known about a tar that was read."""

    name: str  # relative to the folder of the tars
    size_bytes: int
    stamp: str  # `storage.Entry.stamp`
    sha256: str = ""  # where there is a problem, this and the fields below are empty
    num_samples: int = 0
    index_sha256: str = ""
    members: Mapping[str, int] = {}  # extension -> members that stages read
    unread: Mapping[str, int] = {}  # kind -> members that no stage reads
    num_without_image: int = 0
    num_several_images: int = 0
    num_labels: int = 0
    num_bad_labels: int = 0  # labels that aren't class numbers
    highest_label: int = -1
    examples: Mapping[str, str] = {}  # kind of member, or one of the counts above -> the name of such a member
    problem: TarProblem | None = None


class _UnusableTar(Exception):  # noqa: N818 -- ends the reading of one tar only
    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.problem = TarProblem(what, fix)


def refused(name: str, entry: storage.Entry, what: str, fix: str) -> TarRecord:
    """What is known about a tar that can't be used."""
    return TarRecord(name, entry.size_bytes, entry.stamp, problem=TarProblem(what, fix))


def compressed(name: str, entry: storage.Entry, how: str) -> TarRecord:
    """What is known about a compressed tar."""
    return refused(name, entry, f"compressed ({how})", _UNPACK)


def walk(
    name: str,
    entry: storage.Entry,
    *,
    stop: Callable[[], bool] = lambda: False,
    passed: Callable[[int], None] = lambda size_bytes: None,
) -> tuple[TarRecord, Int64[np.ndarray, " n_plus_1"]]:
    """Read a tar.

    Args:
        name: its name in the manifest.
        entry: where it lies, as it was listed.
        stop: called between pieces; True gives up.
        passed: called with the size of each piece that was read.

    Returns:
        What is known about it, and the offsets of its samples: none where there is a problem.

    Raises:
        Stopped: `stop` returned True.
        StorageError: the place can't be read.
    """
    stream = _Stream(entry, stop, passed)
    samples = _Samples(stream)
    try:
        _walk(stream, samples, entry.size_bytes)
    except _UnusableTar as error:
        return refused(name, entry, *error.problem), np.zeros(1, dtype=np.int64)
    known = samples.known(name, entry)
    return known._replace(sha256=stream.sha256()), samples.offsets()


def _walk(stream: _Stream, samples: _Samples, size_bytes: int) -> None:
    if size_bytes == 0:
        raise _UnusableTar("an empty file", _FETCH)
    head = bytes(stream.take(0, min(8, size_bytes)))
    for magic, how in _COMPRESSED.items():
        if head.startswith(magic):
            raise _UnusableTar(f"compressed ({how}), not a tar", _UNPACK)
    end = 0
    try:
        for item in tar_entries(stream.take, size_bytes):
            if item.kind == "end":
                break
            end = item.stop + -item.stop % BLOCK_BYTES
            samples.add(item)
        else:
            raise _UnusableTar(
                f"ends at byte {size_bytes} without an end of archive: cut off, or its writer was killed", _FETCH
            )
    except DamagedTar as damage:
        if damage.at == 0:
            raise _UnusableTar(
                f"not a tar ({damage.reason} at its start)", "move it elsewhere, or fetch it again"
            ) from damage
        if "end within" in damage.reason:
            raise _UnusableTar(f"cut off at byte {size_bytes}, within a member's header", _FETCH) from damage
        if "beyond the end" in damage.reason:
            raise _UnusableTar(
                f"cut off at byte {size_bytes}, within the member at byte {damage.at}", _FETCH
            ) from damage
        raise _UnusableTar(f"{damage.reason} at byte {damage.at}", _FETCH) from damage
    samples.close()
    if not stream.only_zeros(end):
        raise _UnusableTar(
            f"continues after its end of archive at byte {end}: several tars joined, of which readers see the first",
            "unpack it (`tar --ignore-zeros -xf`) and pack it again, or fetch the parts as separate files",
        )


class _Stream:
    """A tar's bytes from front to back, hashed as they pass; earlier bytes are dropped."""

    def __init__(self, entry: storage.Entry, stop: Callable[[], bool], passed: Callable[[int], None]) -> None:
        self._entry = entry
        self._stop = stop
        self._passed = passed
        self._hash = hashlib.sha256()
        self._held = b""
        self._held_at = 0  # position of its first byte

    @property
    def _end(self) -> int:
        return self._held_at + len(self._held)

    def take(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop); `start` must not lie before an earlier call's."""
        while self._end < stop:
            begin = self._end
            piece = self._next()
            if start >= begin:
                self._held, self._held_at = piece, begin
            else:
                self._held, self._held_at = self._held[start - self._held_at :] + piece, start
        return self._held[start - self._held_at : stop - self._held_at]

    def only_zeros(self, start: int) -> bool:
        """Whether nothing but zeros follows; reads to the end."""
        rest = self._held[max(0, start - self._held_at) :]
        clean = not rest.strip(b"\0")
        while self._end < self._entry.size_bytes:
            begin = self._end
            self._held, self._held_at = self._next(), begin
            clean = clean and not self._held[max(0, start - begin) :].strip(b"\0")
        return clean

    def sha256(self) -> str:
        """Digest of everything that was read."""
        return self._hash.hexdigest()

    def _next(self) -> bytes:
        if self._stop():
            raise Stopped("stopped as requested")
        start, size_bytes = self._end, self._entry.size_bytes
        try:
            piece = storage.read_range(self._entry.url, start, min(start + PIECE_BYTES, size_bytes))
        except FileNotFoundError as error:
            raise _UnusableTar("gone since it was listed", "run the same command again") from error
        if len(piece) < min(PIECE_BYTES, size_bytes - start):
            raise _UnusableTar("became shorter while it was read", "wait until its writer is done, then run this again")
        self._hash.update(piece)
        self._passed(len(piece))
        return piece


class _Samples:
    """Groups the members of a tar by their keys."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._starts = array("q")
        self._stop = 0  # of the last sample
        self._seen: set[bytes] = set()
        self._key: str | None = None
        self._at = self._end = 0  # of the members of the key, headers and padding included
        self._extensions: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._members: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._highest_label = -1

    def add(self, item: TarEntry) -> None:
        """The next member."""
        if item.kind == "folder":
            return
        parts = key_and_extension(item.name) if item.kind == "file" else None
        if parts is None:
            self._pass_over(LINK if item.kind == "other" else NO_SAMPLE, item.name)
            return
        key, extension = parts
        if key != self._key:
            self._begin(key, item)
        if extension in self._extensions:
            raise _UnusableTar(
                f"holds {key}.{extension} twice (byte {item.header})", "write it again with each name once in a tar"
            )
        self._extensions.add(extension)
        self._end = item.stop + -item.stop % BLOCK_BYTES
        if extension not in EXTENSIONS:
            self._pass_over(extension, item.name)
            return
        self._members[extension] += 1
        if extension == "cls":
            self._label(item)

    def close(self) -> None:
        """End the current sample: all members of its key were added."""
        known = self._extensions & EXTENSIONS
        if not known:
            return
        self._starts.append(self._at)
        self._stop = self._end
        num_images = len(known.intersection(IMAGE_EXTENSIONS))
        if num_images != 1:
            self._count("num_several_images" if num_images else "num_without_image", str(self._key))

    def known(self, name: str, entry: storage.Entry) -> TarRecord:
        """Everything but the hashes."""
        return TarRecord(
            name=name,
            size_bytes=entry.size_bytes,
            stamp=entry.stamp,
            num_samples=len(self._starts),
            members=dict(sorted(self._members.items())),
            unread=dict(sorted(self._unread.items())),
            num_without_image=self._counts["num_without_image"],
            num_several_images=self._counts["num_several_images"],
            num_labels=self._counts["num_labels"],
            num_bad_labels=self._counts["num_bad_labels"],
            highest_label=self._highest_label,
            examples=dict(sorted(self._examples.items())),
        )

    def offsets(self) -> Int64[np.ndarray, " n_plus_1"]:
        """Position of each sample's start, and of the last one's end."""
        offsets: Int64[np.ndarray, " n_plus_1"] = np.array([*self._starts, self._stop], dtype=np.int64)
        return offsets

    def _begin(self, key: str, item: TarEntry) -> None:
        self.close()
        digest = hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=16).digest()
        if digest in self._seen:
            raise _UnusableTar(
                f"key {key!r} comes a second time (byte {item.header}, {item.name}): its members aren't stored side by "
                "side, or two samples have this name",
                "unpack it and pack it again, sorted (`tar --sort=name -cf NEW.tar FOLDER`)",
            )
        self._seen.add(digest)
        self._key, self._at, self._extensions = key, item.header, set()

    def _label(self, item: TarEntry) -> None:
        try:
            if item.stop - item.start > _MAX_LABEL_BYTES:
                raise UnreadableSample("too long for a number")
            label = class_number(bytes(self._stream.take(item.start, item.stop)))
        except UnreadableSample:
            self._count("num_bad_labels", item.name)
            return
        self._counts["num_labels"] += 1
        if label > self._highest_label:
            self._highest_label = label
            self._examples["highest_label"] = item.name

    def _pass_over(self, kind: str, name: str) -> None:
        kind = kind if kind in self._unread or len(self._unread) < _MAX_KINDS else "others"
        self._unread[kind] += 1
        self._examples.setdefault(kind, name)

    def _count(self, what: str, name: str) -> None:
        self._counts[what] += 1
        self._examples.setdefault(what, name)
