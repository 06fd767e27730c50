"""A data set of tars that stay as they are: what `vitrail index` does.

Each tar is read once, several at a time; what the loader needs is written beside them or into a folder of its own. The
order of the shards is the byte order of the tars' names, whatever was read when, so the result is a function of the
tars alone.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from data_prep.indexing.records import FOLDER, Records
from data_prep.indexing.walk import Walked, compressed, walk
from pipeline import storage
from pipeline.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    index_bytes,
    index_size_bytes,
    manifest_bytes,
    read_manifest,
)
from pipeline.errors import ConfigError, DataError, Stopped, StorageError

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_NUMBERED_CLASSES = 100_000
TELL_S = 10.0
_SHOWN = 20  # kinds of unread members that the manifest names

Say = Callable[[str], None]


class Choice(NamedTuple):
    """What is to be indexed, and how.

    Args:
        url: folder of the tars.
        to: folder of the indices and the manifest; None: the tars' own.
        match: a pattern of the names, relative to the folder, of the tars that are meant.
        classes: names of the labels; (): their numbers.
        skip_bad: leave tars that can't be used out instead of refusing.
        workers: tars read at a time.
    """

    url: str
    to: str | None = None
    match: str = "*"
    classes: tuple[str, ...] = ()
    skip_bad: bool = False
    workers: int = 8

    @property
    def folder(self) -> str:
        """Where the manifest goes."""
        return self.to or self.url


class Indexed(NamedTuple):
    """What came of it."""

    manifest: Manifest
    num_read: int  # tars that were read this time
    changed: tuple[str, ...]  # of these, tars that were read before and are other ones now
    gone: tuple[str, ...]  # tars that were read before and aren't there any more
    already: bool  # nothing was to be done

    @property
    def facts(self) -> Mapping[str, Any]:
        """The manifest's account of the tars."""
        found: Mapping[str, Any] = self.manifest.info["indexed"]
        return found


class _Listing(NamedTuple):
    tars: dict[str, storage.Entry]  # by name, in byte order
    indices: dict[str, int]  # name -> size of the index files that are there


def index_tars(choice: Choice, *, say: Say = lambda line: None, stop: Callable[[], bool] = lambda: False) -> Indexed:
    """Make a data set of existing tars, or bring it up to date.

    Raises:
        ConfigError: the folder holds something else.
        DataError: there are no tars, some can't be used, or labels lie beyond the classes.
        StorageError: a place can't be read or written.
        Stopped: `stop` said so; the same call goes on.
    """
    choice = _absolute(choice)
    before = _manifest_before(choice)
    listed = _list(choice)
    records = Records(choice.folder)
    try:
        records.begin(choice.url, choice.match)
    except StorageError as error:
        if isinstance(error, storage.StorageUnavailable) or choice.to is not None:
            raise
        fix = "give a folder that can be written to with --to; the tars themselves stay where they are"
        raise StorageError(error.what, where=error.where, fix=fix) from error
    known = records.read()
    todo = [name for name, entry in listed.tars.items() if not _up_to_date(known.get(name), entry, listed)]
    changed = tuple(name for name in todo if name in known and not _same(known[name], listed.tars[name]))
    gone = tuple(sorted(set(known) - set(listed.tars)))
    for name in changed:
        say(f"{name} has changed since it was indexed: reading it again")
    for name in gone:
        say(f"{name} was indexed and isn't there any more")
    for record in _read(choice, {name: listed.tars[name] for name in todo}, records, say, stop):
        known[record.name] = record
    found = [known[name] for name in listed.tars]
    records.finish(found)
    manifest = _manifest(choice, found)
    already = not todo and not gone and before is not None and manifest_bytes(before) == manifest_bytes(manifest)
    if not already:
        storage.write(storage.join(choice.folder, MANIFEST_NAME), manifest_bytes(manifest))
    for name in gone:
        storage.delete(storage.join(choice.folder, _index_name(name)))
    return Indexed(manifest, len(todo), changed, gone, already)


def _absolute(choice: Choice) -> Choice:
    """The same with places that don't depend on the working directory."""

    def absolute(url: str) -> str:
        return url.rstrip("/") if storage.is_remote(url) else os.path.abspath(url.removeprefix("file://"))

    url = absolute(choice.url)
    if url.endswith((".tar", *COMPRESSED_TARS)):
        raise ConfigError(
            "names a tar, not a folder of tars",
            where=choice.url,
            fix="give its folder; --match NAME picks some of several tars, and --to another place for the index",
        )
    to = None if choice.to is None else absolute(choice.to)
    return choice._replace(url=url, to=None if to == url else to)


def _manifest_before(choice: Choice) -> Manifest | None:
    """The manifest that an earlier call wrote.

    Raises:
        ConfigError: the tars, or the folder that the index is to go to, are another data set.
    """
    for folder in dict.fromkeys((choice.url, choice.folder)):
        if not storage.exists(storage.join(folder, MANIFEST_NAME)):
            continue
        found = read_manifest(folder)
        if "indexed" not in found.info:
            raise ConfigError(
                f"is a data set already, of {found.num_samples} samples in {len(found.shards)} shards",
                where=folder,
                fix="train on it as it is (data.train)" if folder == choice.url else "give another folder with --to",
            )
        if folder == choice.folder:
            return found
    return None


def _list(choice: Choice) -> _Listing:
    """What lies in the folders.

    Raises:
        DataError: there are no tars, or data sets of their own lie below.
    """
    tars: dict[str, storage.Entry] = {}
    indices: dict[str, int] = {}
    others: list[str] = []
    for folder in dict.fromkeys((choice.url, choice.folder)):
        for entry in storage.entries(folder):
            name = entry.url[len(folder) + 1 :]
            if folder == choice.folder and name.endswith(".index.npy"):
                indices[name] = entry.size_bytes
            if folder != choice.url or name.startswith(f"{FOLDER}/") or entry.url.startswith(f"{choice.to}/"):
                continue
            if name.endswith((".tar", *COMPRESSED_TARS)) and fnmatch.fnmatchcase(name, choice.match):
                tars[name] = entry
            elif name.endswith(f"/{MANIFEST_NAME}"):
                others.append(name.rpartition("/")[0])
    inner = [place for place in others if any(name.startswith(f"{place}/") for name in tars)]
    if inner:
        raise DataError(
            f"holds data sets of their own: {', '.join(inner[:3])}",
            where=choice.url,
            fix="train on these as they are, or choose the others' names with --match",
        )
    if not tars:
        wanted = "" if choice.match == "*" else f" called {choice.match}"
        raise DataError(f"no tars{wanted} there", where=choice.url, fix="mend the URL, or --match")
    return _Listing(tars, indices)


def _same(record: Walked, entry: storage.Entry) -> bool:
    return (record.size_bytes, record.stamp) == (entry.size_bytes, entry.stamp)


def _up_to_date(record: Walked | None, entry: storage.Entry, listed: _Listing) -> bool:
    """Whether a tar needn't be read again."""
    if record is None or not _same(record, entry):
        return False
    if not record.num_samples:
        return True
    return listed.indices.get(_index_name(record.name)) == index_size_bytes(record.num_samples)


def _index_name(name: str) -> str:
    return name.removesuffix(".tar") + ".index.npy"


def _read(
    choice: Choice, tars: Mapping[str, storage.Entry], records: Records, say: Say, stop: Callable[[], bool]
) -> Iterator[Walked]:
    """Read tars, several at a time, and write their indices; in whatever order they are done.

    Raises:
        Stopped, StorageError: as `walk`; what was done so far is remembered.
    """
    progress = _Progress(len(tars), sum(entry.size_bytes for entry in tars.values()), say)
    ended = threading.Event()

    def one(name: str, entry: storage.Entry) -> Walked:
        how = next((ending for ending in COMPRESSED_TARS if name.endswith(ending)), None)
        if how is not None:
            record = compressed(name, entry, how.rpartition(".")[2])
        else:
            record, offsets = walk(name, entry, stop=lambda: stop() or ended.is_set(), passed=progress.passed)
            if record.num_samples:
                data = index_bytes(offsets)
                storage.write(storage.join(choice.folder, _index_name(name)), data)
                record = record._replace(index_sha256=hashlib.sha256(data).hexdigest())
        records.add(record)
        progress.tar()
        return record

    waiting = iter(tars.items())
    running: set[Future[Walked]] = set()
    with ThreadPoolExecutor(choice.workers, thread_name_prefix="index") as pool:
        try:
            while True:
                while len(running) < 2 * choice.workers and (item := next(waiting, None)) is not None:
                    running.add(pool.submit(one, *item))
                if not running:
                    return
                if stop():
                    raise Stopped("asked to stop; the same command goes on with the tars that aren't done")
                done, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            ended.set()
            for future in running:
                future.cancel()
            wait(running)
            with contextlib.suppress(StorageError):  # the cause of the end says more
                records.flush()


class _Progress:
    """Tells now and then how far it is."""

    def __init__(self, num_tars: int, size_bytes: int, say: Say) -> None:
        self._num_tars, self._size_bytes, self._say = num_tars, size_bytes, say
        self._lock = threading.Lock()
        self._tars = self._bytes = 0
        self._begun = self._told = time.monotonic()

    def passed(self, size_bytes: int) -> None:
        with self._lock:
            self._bytes += size_bytes
            now = time.monotonic()
            if now - self._told >= TELL_S:
                self._told = now
                rate = self._bytes / (now - self._begun)
                left_min = (self._size_bytes - self._bytes) / rate / 60
                self._say(
                    f"{self._tars} of {self._num_tars} tars, {self._bytes / 2**30:.1f} of "
                    f"{self._size_bytes / 2**30:.1f} GiB, {rate / 2**20:.0f} MiB/s, about {left_min:.0f} min to go"
                )

    def tar(self) -> None:
        with self._lock:
            self._tars += 1


def _manifest(choice: Choice, records: Sequence[Walked]) -> Manifest:
    """The data set that the tars are.

    Raises:
        DataError: a tar can't be used, none has a sample with an image, or a label lies beyond the classes.
    """
    bad = [record for record in records if record.problem is not None]
    if bad and not choice.skip_bad:
        raise _refusal(choice, bad, len(records))
    full = [record for record in records if record.num_samples]
    shards = tuple(
        Shard(r.name, r.num_samples, r.size_bytes, r.sha256, _index_name(r.name), r.index_sha256) for r in full
    )
    num_samples = sum(shard.num_samples for shard in shards)
    facts = _facts(choice, records)
    if num_samples <= facts["without_image"]:
        kinds = ", ".join([*facts["members"], *facts["unread"]]) or "nothing"
        raise DataError(
            f"no sample of {len(records)} tars holds an image called jpg, jpeg, png or webp: members are {kinds}",
            where=choice.url,
            fix="point at tars of images; a name such as 000.image.jpg has to become 000.jpg",
        )
    hashes = "".join(f"{shard.sha256}\n" for shard in shards)
    return Manifest(
        url=choice.folder,
        shards=shards,
        num_samples=num_samples,
        fingerprint=hashlib.sha256(hashes.encode()).hexdigest(),
        classes=_classes(choice, full),
        info={"indexed": facts},
        shards_url=None if choice.to is None else choice.url,
    )


def _refusal(choice: Choice, bad: Sequence[Walked], num_tars: int) -> DataError:
    shown = [f"{record.name}: {record.problem.what}" for record in bad if record.problem is not None][:5]
    fixes = dict.fromkeys(record.problem.fix for record in bad if record.problem is not None)
    more = f"; and {len(bad) - len(shown)} more" if len(bad) > len(shown) else ""
    return DataError(
        f"{len(bad)} of {num_tars} tars can't be used: {'; '.join(shown)}{more}",
        where=choice.url,
        fix=f"{'; or '.join(fixes)}; then run this again, which reads only what has changed. --skip-bad leaves such "
        "tars out",
    )


def _classes(choice: Choice, records: Sequence[Walked]) -> tuple[str, ...]:
    """Names of the labels; () where there are none, or so high ones that they can't be class numbers."""
    highest = max(records, key=lambda record: record.highest_label)
    if not choice.classes:
        numbered = highest.highest_label < MAX_NUMBERED_CLASSES
        return tuple(map(str, range(highest.highest_label + 1))) if numbered else ()
    if highest.highest_label >= len(choice.classes):
        raise DataError(
            f"label {highest.highest_label} of {highest.examples['highest_label']}, and {len(choice.classes)} classes "
            "are numbered from 0",
            where=storage.join(choice.url, highest.name),
            fix="give all classes' names in --classes, in the order of the numbers",
        )
    return choice.classes


def _facts(choice: Choice, records: Sequence[Walked]) -> dict[str, Any]:
    """What the manifest tells about the tars; every tar and member is counted somewhere."""
    members: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for record in records:
        members.update(record.members)
        unread.update(record.unread)
        for what, name in record.examples.items():
            examples.setdefault(what.removeprefix("num_"), f"{name} in {record.name}")
    kept = dict(sorted(unread.most_common(_SHOWN)))
    rest = sum(unread.values()) - sum(kept.values())
    counts = {
        "without_image": sum(record.num_without_image for record in records),
        "several_images": sum(record.num_several_images for record in records),
        "bad_labels": sum(record.num_bad_labels for record in records),
    }
    return {
        "match": choice.match,
        "tars": len(records),
        "empty": [record.name for record in records if not record.num_samples and record.problem is None],
        "left_out": {record.name: record.problem.what for record in records if record.problem is not None},
        "members": dict(sorted(members.items())),
        "unread": kept | ({"others": kept.get("others", 0) + rest} if rest else {}),
        "labels": sum(record.num_labels for record in records),
        **counts,
        "examples": {what: name for what, name in sorted(examples.items()) if what in kept or counts.get(what)},
    }
