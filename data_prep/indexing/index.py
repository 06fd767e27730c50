"""Existing tars as a data set, without copying them: what `vitrail index` does.

Each tar is read once, several at a time; what the loader needs is written beside them or into a folder of its own. The
shards stand in the byte order of the tars' names, whichever was read first, so the result depends on the tars alone.
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
from data_prep.indexing.walk import TarRecord, compressed, walk
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
SAY_EVERY_S = 10.0
_SHOWN = 20  # kinds of unread members that the manifest names

Say = Callable[[str], None]


class IndexOptions(NamedTuple):
    """Which tars are indexed, and how.

    Args:
        url: folder of the tars.
        to: folder for the index files and the manifest; None: the tars' own.
        match: pattern for the names of the tars to take, relative to the folder.
        classes: names of the labels; (): their numbers.
        skip_bad: leave out tars that can't be used instead of raising.
        readers: tars read at a time, each by a thread.
    """

    url: str
    to: str | None = None
    match: str = "*"
    classes: tuple[str, ...] = ()
    skip_bad: bool = False
    readers: int = 8

    @property
    def folder(self) -> str:
        """Where the manifest goes."""
        return self.to or self.url


class IndexResult(NamedTuple):
    """The result of indexing."""

    manifest: Manifest
    num_read: int  # tars that were read this time
    changed: tuple[str, ...]  # of these, tars that have changed since they were last read
    gone: tuple[str, ...]  # tars that were read before and no longer exist
    already: bool  # everything was up to date

    @property
    def facts(self) -> Mapping[str, Any]:
        """The manifest's account of the tars."""
        facts: Mapping[str, Any] = self.manifest.info["indexed"]
        return facts

    def document(self) -> dict[str, Any]:
        """The result as plain data, for `vitrail index --json` and chains."""
        manifest = self.manifest
        return {
            "data_set": manifest.url,
            "tars_at": manifest.shards_url or manifest.url,
            "num_samples": manifest.num_samples,
            "num_shards": len(manifest.shards),
            "size_bytes": sum(shard.size_bytes for shard in manifest.shards),
            "num_classes": len(manifest.classes),
            "fingerprint": manifest.fingerprint,
            "num_read": self.num_read,
            "changed": list(self.changed),
            "gone": list(self.gone),
            "already": self.already,
            **self.facts,
        }


class _Listing(NamedTuple):
    """What lies in the folders."""

    tars: dict[str, storage.Entry]  # by name, in byte order
    indices: dict[str, int]  # name -> size of the existing index files


def index_tars(
    options: IndexOptions, *, say: Say = lambda line: None, stop: Callable[[], bool] = lambda: False
) -> IndexResult:
    """Make a data set of existing tars, or bring it up to date.

    Args:
        say: called with lines for people: tars that have changed, and progress every few seconds.
        stop: called between pieces; True gives up.

    Raises:
        ConfigError: the folder holds something else.
        DataError: there are no tars, some can't be used, or labels lie beyond the classes.
        StorageError: a place can't be read or written.
        Stopped: `stop` returned True; the same call resumes.
    """
    options = _absolute(options)
    before = _manifest_before(options)
    listed = _list(options)
    records = Records(options.folder)
    try:
        records.begin(options.url, options.match)
    except StorageError as error:
        if isinstance(error, storage.StorageUnavailable) or options.to is not None:
            raise
        fix = "name a writable folder with --to; the tars stay where they are"
        raise StorageError(error.what, where=error.where, fix=fix) from error
    known = records.read()
    todo = [name for name, entry in listed.tars.items() if not _up_to_date(known.get(name), entry, listed)]
    changed = tuple(name for name in todo if name in known and not _unchanged(known[name], listed.tars[name]))
    gone = tuple(sorted(set(known) - set(listed.tars)))
    for name in changed:
        say(f"{name} has changed since it was indexed: reading it again")
    for name in gone:
        say(f"{name} was indexed and no longer exists")
    for record in _read(options, {name: listed.tars[name] for name in todo}, records, say, stop):
        known[record.name] = record
    tar_records = [known[name] for name in listed.tars]
    records.finish(tar_records)
    manifest = _manifest(options, tar_records)
    already = not todo and not gone and before is not None and manifest_bytes(before) == manifest_bytes(manifest)
    if not already:
        storage.write(storage.join(options.folder, MANIFEST_NAME), manifest_bytes(manifest))
    for name in gone:
        storage.delete(storage.join(options.folder, _index_name(name)))
    return IndexResult(manifest, len(todo), changed, gone, already)


def _absolute(options: IndexOptions) -> IndexOptions:
    """The same options with absolute paths."""

    def absolute(url: str) -> str:
        return url.rstrip("/") if storage.is_remote(url) else os.path.abspath(url.removeprefix("file://"))

    url = absolute(options.url)
    if url.endswith((".tar", *COMPRESSED_TARS)):
        raise ConfigError(
            "is a tar, not a folder of tars",
            where=options.url,
            fix="give its folder; --match NAME picks some of the tars in it, and --to puts the index elsewhere",
        )
    to = None if options.to is None else absolute(options.to)
    return options._replace(url=url, to=None if to == url else to)


def _manifest_before(options: IndexOptions) -> Manifest | None:
    """The manifest that an earlier call wrote, if any.

    Raises:
        ConfigError: the tars, or the folder for the index, already are another data set.
    """
    for folder in dict.fromkeys((options.url, options.folder)):
        if not storage.exists(storage.join(folder, MANIFEST_NAME)):
            continue
        manifest = read_manifest(folder)
        if "indexed" not in manifest.info:
            raise ConfigError(
                f"already is a data set of {manifest.num_samples} samples in {len(manifest.shards)} shards",
                where=folder,
                fix="train on it as it is (data.train)" if folder == options.url else "name another folder with --to",
            )
        if folder == options.folder:
            return manifest
    return None


def _list(options: IndexOptions) -> _Listing:
    """The tars, and the index files that exist already.

    Raises:
        DataError: there are no tars, or data sets lie below the folder.
    """
    tars: dict[str, storage.Entry] = {}
    indices: dict[str, int] = {}
    others: list[str] = []
    for folder in dict.fromkeys((options.url, options.folder)):
        for entry in storage.entries(folder):
            name = entry.url[len(folder) + 1 :]
            if folder == options.folder and name.endswith(".index.npy"):
                indices[name] = entry.size_bytes
            if folder != options.url or name.startswith(f"{FOLDER}/") or entry.url.startswith(f"{options.to}/"):
                continue
            if name.endswith((".tar", *COMPRESSED_TARS)) and fnmatch.fnmatchcase(name, options.match):
                tars[name] = entry
            elif name.endswith(f"/{MANIFEST_NAME}"):
                others.append(name.rpartition("/")[0])
    inner = [place for place in others if any(name.startswith(f"{place}/") for name in tars)]
    if inner:
        raise DataError(
            f"has data sets below it: {', '.join(inner[:3])}",
            where=options.url,
            fix="train on those as they are, or pick the other tars with --match",
        )
    if not tars:
        pattern = "" if options.match == "*" else f" matching {options.match}"
        raise DataError(f"no tars{pattern} here", where=options.url, fix="correct the URL, or --match")
    return _Listing(tars, indices)


def _unchanged(record: TarRecord, entry: storage.Entry) -> bool:
    return (record.size_bytes, record.stamp) == (entry.size_bytes, entry.stamp)


def _up_to_date(record: TarRecord | None, entry: storage.Entry, listed: _Listing) -> bool:
    """Whether a tar needn't be read again."""
    if record is None or not _unchanged(record, entry):
        return False
    if not record.num_samples:
        return True
    return listed.indices.get(_index_name(record.name)) == index_size_bytes(record.num_samples)


def _index_name(name: str) -> str:
    return name.removesuffix(".tar") + ".index.npy"


def _read(
    options: IndexOptions, tars: Mapping[str, storage.Entry], records: Records, say: Say, stop: Callable[[], bool]
) -> Iterator[TarRecord]:
    """Read tars, several at a time, and write their index files; yields records in the order of completion.

    Raises:
        Stopped, StorageError: as `walk`; finished tars stay recorded.
    """
    progress = _Progress(len(tars), sum(entry.size_bytes for entry in tars.values()), say)
    ended = threading.Event()

    def read(name: str, entry: storage.Entry) -> TarRecord:
        how = next((ending for ending in COMPRESSED_TARS if name.endswith(ending)), None)
        if how is not None:
            record = compressed(name, entry, how.rpartition(".")[2])
        else:
            record, offsets = walk(name, entry, stop=lambda: stop() or ended.is_set(), passed=progress.passed)
            if record.num_samples:
                data = index_bytes(offsets)
                storage.write(storage.join(options.folder, _index_name(name)), data)
                record = record._replace(index_sha256=hashlib.sha256(data).hexdigest())
        records.add(record)
        progress.tar()
        return record

    waiting = iter(tars.items())
    running: set[Future[TarRecord]] = set()
    with ThreadPoolExecutor(options.readers, thread_name_prefix="index") as pool:
        try:
            while True:
                while len(running) < 2 * options.readers and (item := next(waiting, None)) is not None:
                    running.add(pool.submit(read, *item))
                if not running:
                    return
                if stop():
                    raise Stopped("stopped as requested; the same command continues with the remaining tars")
                done, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            ended.set()
            for future in running:
                future.cancel()
            wait(running)
            with contextlib.suppress(StorageError):  # the first error says more
                records.flush()


class _Progress:
    """Says now and then how much has been read."""

    def __init__(self, num_tars: int, size_bytes: int, say: Say) -> None:
        self._num_tars, self._size_bytes, self._say = num_tars, size_bytes, say
        self._lock = threading.Lock()
        self._tars = self._bytes = 0
        self._begun = self._said = time.monotonic()

    def passed(self, size_bytes: int) -> None:
        with self._lock:
            self._bytes += size_bytes
            now = time.monotonic()
            if now - self._said >= SAY_EVERY_S:
                self._said = now
                rate = self._bytes / (now - self._begun)
                left_min = (self._size_bytes - self._bytes) / rate / 60
                self._say(
                    f"{self._tars} of {self._num_tars} tars, {self._bytes / 2**30:.1f} of "
                    f"{self._size_bytes / 2**30:.1f} GiB, {rate / 2**20:.0f} MiB/s, about {left_min:.0f} min to go"
                )

    def tar(self) -> None:
        with self._lock:
            self._tars += 1


def _manifest(options: IndexOptions, records: Sequence[TarRecord]) -> Manifest:
    """The manifest of the data set that the tars make up.

    Raises:
        DataError: a tar can't be used, none has a sample with an image, or a label lies beyond the classes.
    """
    bad = [record for record in records if record.problem is not None]
    if bad and not options.skip_bad:
        raise _refusal(options, bad, len(records))
    full = [record for record in records if record.num_samples]
    shards = tuple(
        Shard(r.name, r.num_samples, r.size_bytes, r.sha256, _index_name(r.name), r.index_sha256) for r in full
    )
    num_samples = sum(shard.num_samples for shard in shards)
    facts = _facts(options, records)
    if num_samples <= facts["without_image"]:
        kinds = ", ".join([*facts["members"], *facts["unread"]]) or "nothing"
        raise DataError(
            f"no sample of {len(records)} tars holds an image called jpg, jpeg, png or webp: members are {kinds}",
            where=options.url,
            fix="give tars of images; a member such as 000.image.jpg must be called 000.jpg",
        )
    hashes = "".join(f"{shard.sha256}\n" for shard in shards)
    return Manifest(
        url=options.folder,
        shards=shards,
        num_samples=num_samples,
        fingerprint=hashlib.sha256(hashes.encode()).hexdigest(),
        classes=_classes(options, full),
        info={"indexed": facts},
        shards_url=None if options.to is None else options.url,
    )


def _refusal(options: IndexOptions, bad: Sequence[TarRecord], num_tars: int) -> DataError:
    shown = [f"{record.name}: {record.problem.what}" for record in bad if record.problem is not None][:5]
    fixes = dict.fromkeys(record.problem.fix for record in bad if record.problem is not None)
    more = f"; and {len(bad) - len(shown)} more" if len(bad) > len(shown) else ""
    return DataError(
        f"{len(bad)} of {num_tars} tars can't be used: {'; '.join(shown)}{more}",
        where=options.url,
        fix=f"{'; or '.join(fixes)}; then run this again, which reads only what has changed. --skip-bad leaves out "
        "such tars",
    )


def _classes(options: IndexOptions, records: Sequence[TarRecord]) -> tuple[str, ...]:
    """Names of the labels; () where there are none, or labels too high to be class numbers."""
    highest = max(records, key=lambda record: record.highest_label)
    if not options.classes:
        numbered = highest.highest_label < MAX_NUMBERED_CLASSES
        return tuple(map(str, range(highest.highest_label + 1))) if numbered else ()
    if highest.highest_label >= len(options.classes):
        raise DataError(
            f"label {highest.highest_label} of {highest.examples['highest_label']}, and {len(options.classes)} classes "
            "are numbered from 0",
            where=storage.join(options.url, highest.name),
            fix="name all classes in --classes, in the order of their numbers",
        )
    return options.classes


def _facts(options: IndexOptions, records: Sequence[TarRecord]) -> dict[str, Any]:
    """The manifest's account of the tars, in which every tar and member is counted."""
    members: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for record in records:
        members.update(record.members)
        unread.update(record.unread)
        for what, name in record.examples.items():
            examples.setdefault(what.removeprefix("num_"), f"{name} in {record.name}")
    commonest = dict(sorted(unread.most_common(_SHOWN)))
    rest = sum(unread.values()) - sum(commonest.values())
    counts = {
        "without_image": sum(record.num_without_image for record in records),
        "several_images": sum(record.num_several_images for record in records),
        "bad_labels": sum(record.num_bad_labels for record in records),
    }
    return {
        "match": options.match,
        "tars": len(records),
        "empty": [record.name for record in records if not record.num_samples and record.problem is None],
        "left_out": {record.name: record.problem.what for record in records if record.problem is not None},
        "members": dict(sorted(members.items())),
        "unread": commonest | ({"others": commonest.get("others", 0) + rest} if rest else {}),
        "labels": sum(record.num_labels for record in records),
        **counts,
        "examples": {what: name for what, name in sorted(examples.items()) if what in commonest or counts.get(what)},
    }
