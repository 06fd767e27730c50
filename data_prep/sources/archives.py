"""Existing WebDataset tars as a source, as img2dataset, DataComp's tools and SA-1B write them.

A tar's headers are read once while planning, together with the small members (texts, JSON, labels); tasks read the
images' bytes as ranges of the tar. Nothing is unpacked to disk, and only regular files are taken.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, Literal

import pyarrow as pa

from data_prep.sources.base import (
    AllowedPlaces,
    RangedFile,
    Source,
    batches_of,
    json_captions,
    places_below,
    read_classes,
    refuse_if_empty,
)
from data_prep.sources.options import SourceOptions
from pipeline import storage
from pipeline.data.reading.tar import IMAGE_EXTENSIONS, key_and_extension
from pipeline.errors import DataError

_TEXTS = ("txt", "json", "cls")
_MAX_TEXT_BYTES = 64 * 2**20  # SA-1B's JSONs hold a hundred masks and more
_READ_AHEAD_BYTES = 2**20


class TarsOptions(SourceOptions):
    """Existing WebDataset tars, as img2dataset, DataComp or SA-1B write them; their samples go into new shards.

    Members that share a name up to its first dot are a sample. Captions come from `txt`, or from `caption_field` of the
    `json`; `annotations` of the `json` (SA-1B's masks) are taken where wanted, and `cls` is the label.
    """

    type: Literal["tars"]
    url: str  # a tar, or a folder of them
    captions: Literal["txt", "json", "none"] = "txt"
    caption_field: str = "caption"  # of the json
    labels: bool = False  # take `cls` members
    annotations: bool = False  # take `annotations` of `json` members
    keep_fields: tuple[str, ...] = ()  # of the json; they go into each sample's `json` and sidecar row
    classes: tuple[str, ...] | str = ()

    def open(self) -> Source:
        return TarsSource(self)

    @property
    def has_captions(self) -> bool:
        return self.captions != "none"

    @property
    def has_labels(self) -> bool:
        return self.labels


class TarsSource:
    """The samples of tars, in the order of the tars' names and of their members. See `TarsOptions`."""

    def __init__(self, options: TarsOptions) -> None:
        self.options = options

    def check(self) -> None:
        if not self._tars():
            raise DataError("no tars here", where=self.options.url, fix="set source.url to a tar or a folder of tars")
        self.classes()
        refuse_if_empty(self, self.options.url, "the first tar")

    def batches(self) -> Iterator[pa.RecordBatch]:
        return batches_of(row for tar in self._tars() for row in self._samples(tar.url))

    def size_bytes(self) -> int:
        return sum(tar.size_bytes for tar in self._tars()) // 100  # texts are a small part of a tar

    def places(self) -> AllowedPlaces:
        return places_below(self.options.url.rstrip("/").rpartition("/")[0], self.options.allow, None)

    def classes(self) -> tuple[str, ...]:
        names = self.options.classes
        return names if isinstance(names, tuple) else read_classes(names)

    def _tars(self) -> tuple[storage.Entry, ...]:
        url = self.options.url
        if url.endswith(".tar"):
            return (storage.Entry(url, storage.size_bytes(url)),)
        return tuple(entry for entry in storage.entries(url) if entry.url.endswith(".tar"))

    def _samples(self, url: str) -> Iterator[Mapping[str, Any]]:
        key: str | None = None
        members: dict[str, tuple[int, int]] = {}
        texts: dict[str, bytes] = {}
        for member, file in _members(url):
            parts = key_and_extension(member.name)
            if parts is None:
                continue
            if parts[0] != key:
                if key is not None:
                    yield from self._row(url, key, members, texts)
                key, members, texts = parts[0], {}, {}
            extension = parts[1]
            members[extension] = (member.offset_data, member.offset_data + member.size)
            if extension in _TEXTS and member.size <= _MAX_TEXT_BYTES:
                file.seek(member.offset_data)
                texts[extension] = file.read(member.size)
        if key is not None:
            yield from self._row(url, key, members, texts)

    def _row(
        self, url: str, key: str, members: Mapping[str, tuple[int, int]], texts: Mapping[str, bytes]
    ) -> Iterator[Mapping[str, Any]]:
        """The sample's row; nothing for a sample without an image, such as notes in a tar."""
        extension = next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)
        if extension is None:
            return
        options = self.options
        facts: dict[str, Any] = {}
        if "json" in texts and (options.captions == "json" or options.annotations or options.keep_fields):
            facts = _facts(texts["json"])
        start, stop = members[extension]
        row: dict[str, Any] = {
            "url": f"{url}/{key}.{extension}".encode("utf-8", "surrogateescape"),
            "held": url.encode("utf-8", "surrogateescape"),
            "start": start,
            "stop": stop,
        }
        if options.captions == "txt":
            row["caption"] = texts.get("txt")
        elif options.captions == "json":
            row |= json_captions(facts.get(options.caption_field))
        if options.labels:
            row["label"] = texts.get("cls")
        if options.annotations:
            row["annotations"] = json.dumps(facts.get("annotations") or []).encode()
        if options.keep_fields:
            row["extra"] = json.dumps({name: facts.get(name) for name in options.keep_fields}).encode()
        yield row


def _facts(data: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(data)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _members(url: str) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """The regular files of a tar.

    Raises:
        DataError: it is damaged, or ends within its last member, as after interrupted downloads: skipping the rest
            would silently lose samples.
    """
    damaged = DataError(
        "not a complete tar: it is damaged or cut off", where=url, fix="fetch it again, or move it out of the folder"
    )
    size = storage.size_bytes(url)
    with io.BufferedReader(RangedFile(url), _READ_AHEAD_BYTES) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                end = 0
                for member in tar:
                    end = member.offset_data + -(-member.size // 512) * 512
                    if end > size:
                        raise damaged
                    if member.isreg():
                        yield member, file
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
        except tarfile.TarError as error:
            raise damaged from error
        file.seek(end)
        if file.read(512) != bytes(512):
            raise damaged
