"""Records of the tars that were indexed, so that a killed run resumes and a later one sees what has changed.

`_index/journal/` holds the latest records, several tars per object; a run that completes moves all of them into
`_index/tars.json` and leaves the journal empty.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_prep.indexing.walk import TarProblem, TarRecord
from data_prep.shards.commit import json_bytes, read_document
from pipeline import storage
from pipeline.errors import ConfigError, DataError

FORMAT = "vitrail.index"
FORMAT_VERSION = 1
FOLDER = "_index"
_CHUNK_TARS, _CHUNK_S = 64, 2.0  # a killed run reads at most this much again
_AT_ONCE = 16


class Records:
    """The records of a folder. `add` may be called by several threads."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._fresh: list[TarRecord] = []
        self._written = time.monotonic()

    def begin(self, url: str, match: str) -> None:
        """Claim the folder for an index of the tars of `url` whose names `match`.

        Raises:
            ConfigError: it holds another index.
            StorageError: it can't be written.
        """
        place = storage.join(self._folder, FOLDER, "settings.json")
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, "url": url, "match": match}
        try:
            settings = _document(place)
        except FileNotFoundError:
            storage.write(place, json_bytes(document))
            return
        if (settings.get("url"), settings.get("match")) != (url, match):
            raise ConfigError(
                f"holds the index of {settings.get('url')} ({settings.get('match')}), not of {url} ({match})",
                where=self._folder,
                fix="name another folder with --to; or, if the tars have moved, delete _index and manifest.json there",
            )

    def read(self) -> dict[str, TarRecord]:
        """Name -> what is known about the tar.

        Raises:
            DataError: a record is damaged.
        """
        items: list[Any] = []
        with contextlib.suppress(FileNotFoundError):
            items += _document(storage.join(self._folder, FOLDER, "tars.json"))["tars"]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for chunk in pool.map(_document, self._journal()):
                items += chunk["tars"]
        try:
            return {record.name: record for record in map(_walked, items)}
        except (TypeError, KeyError) as error:
            raise DataError(f"damaged records ({error})", where=self._folder, fix=_DELETE) from error

    def add(self, record: TarRecord) -> None:
        """Record a tar, on disk within `_CHUNK_S` seconds or `_CHUNK_TARS` tars, or at the next `flush`."""
        with self._lock:
            self._fresh.append(record)
            if len(self._fresh) >= _CHUNK_TARS or time.monotonic() - self._written >= _CHUNK_S:
                self._flush()

    def flush(self) -> None:
        """Write the records that are only in memory."""
        with self._lock:
            self._flush()

    def finish(self, records: Sequence[TarRecord]) -> None:
        """Keep these records and no others."""
        place = storage.join(self._folder, FOLDER, "tars.json")
        journal = self._journal()
        storage.write(place, _chunk(sorted(records, key=lambda record: record.name)))
        self._fresh = []
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(storage.delete, journal))

    def _journal(self) -> list[str]:
        return [entry.url for entry in storage.entries(storage.join(self._folder, FOLDER, "journal"))]

    def _flush(self) -> None:
        if self._fresh:
            name = f"{time.time_ns():020d}-{secrets.token_hex(4)}.json"  # later records come last, and win
            storage.write(storage.join(self._folder, FOLDER, "journal", name), _chunk(self._fresh))
        self._fresh, self._written = [], time.monotonic()


def _chunk(records: Iterable[TarRecord]) -> bytes:
    tars = [record._asdict() | {"problem": record.problem and record.problem._asdict()} for record in records]
    return json_bytes({"format": FORMAT, "format_version": FORMAT_VERSION, "tars": tars})


def _walked(item: Mapping[str, Any]) -> TarRecord:
    return TarRecord(**{**item, "problem": item["problem"] and TarProblem(**item["problem"])})


def _document(place: str) -> dict[str, Any]:
    return read_document(
        place,
        FORMAT_VERSION,
        "records",
        _DELETE,
        damaged="damaged records",
        renew="update vitrail, or delete the folder _index to read all tars again",
    )


_DELETE = "delete it and run the same command, which reads its tars again"
