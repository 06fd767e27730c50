"""Images that lie in folders, on a disk or below an s3:// prefix: with captions beside them, or a folder per class."""

from __future__ import annotations

import abc
import itertools
import json
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pyarrow as pa

from data_prep.account import Refused
from data_prep.sources.base import AllowedPlaces, Source, batches_of, json_captions, places_below, refuse_if_empty
from data_prep.sources.options import SourceOptions
from pipeline import storage
from pipeline.errors import DataError

IMAGE_ENDINGS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
_ROW_BYTES = 100  # of a listed image, for planning


class FolderOptions(SourceOptions):
    """All images below a folder or s3:// prefix, each with its `.txt` (caption) or `.json` beside it.

    A `.json` may hold `caption`, or the field named by `caption_field`; the rest of it is left alone.
    """

    type: Literal["folder"]
    captions: Literal["txt", "json", "none"] = "txt"
    caption_field: str = "caption"  # of the json

    def open(self) -> Source:
        return FolderSource(self)

    @property
    def has_captions(self) -> bool:
        return self.captions != "none"

    def with_text(self, row: Mapping[str, Any], text: bytes) -> Mapping[str, Any]:
        if self.captions == "txt":
            return {**row, "caption": text}
        try:
            facts = json.loads(text)
        except ValueError as error:
            raise Refused("caption_not_text", f"the sidecar isn't JSON ({error})") from None
        value = facts.get(self.caption_field) if isinstance(facts, dict) else None
        return {**row, **json_captions(value)}


class ClassFoldersOptions(SourceOptions):
    """ImageNet's layout: one folder per class below `url`; labels number the folders in the order of their names."""

    type: Literal["class_folders"]

    def open(self) -> Source:
        return ClassFoldersSource(self)

    @property
    def has_labels(self) -> bool:
        return True


class _FolderListing(abc.ABC):
    """A source whose inputs are the files below a folder."""

    options: FolderOptions | ClassFoldersOptions

    def batches(self) -> Iterator[pa.RecordBatch]:
        return batches_of(self._rows())

    def size_bytes(self) -> int:
        return _ROW_BYTES * sum(1 for _ in storage.entries(self.options.url))

    def places(self) -> AllowedPlaces:
        return places_below(self.options.url.rstrip("/"), self.options.allow, None)

    @abc.abstractmethod
    def _rows(self) -> Iterator[Mapping[str, Any]]:
        """The inputs, in the order of the listing."""


class FolderSource(_FolderListing):
    """Every image below a folder, with its text beside it. See `FolderOptions`.

    Only names are listed; tasks read the texts together with the images.
    """

    options: FolderOptions

    def __init__(self, options: FolderOptions) -> None:
        self.options = options

    def check(self) -> None:
        refuse_if_empty(self, self.options.url, "the folder")

    def classes(self) -> tuple[str, ...]:
        return ()

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        wanted = self.options.captions
        # Names that are equal up to their first dot are neighbours in a listing, so only these are held in memory.
        for _, group in itertools.groupby(storage.entries(self.options.url), lambda entry: _up_to_dot(entry.url)):
            urls = [entry.url for entry in group]
            texts = {posixpath.splitext(url)[0]: url for url in urls if _ending(url) == wanted}
            for url in urls:
                if _ending(url) in IMAGE_ENDINGS:
                    text = texts.get(posixpath.splitext(url)[0])
                    yield {"url": _encoded(url), "sidecar": _encoded(text) if text else None}


class ClassFoldersSource(_FolderListing):
    """One folder per class, as ImageNet lies on disks. See `ClassFoldersOptions`."""

    options: ClassFoldersOptions

    def __init__(self, options: ClassFoldersOptions) -> None:
        self.options = options
        self._classes: tuple[str, ...] | None = None

    def check(self) -> None:
        if not self.classes():
            raise DataError(
                "no folder holds an image",
                where=self.options.url,
                fix="set source.url to the folder that holds one folder per class",
            )

    def classes(self) -> tuple[str, ...]:
        if self._classes is None:
            self._classes = tuple(sorted({name for name, _ in self._images()}))
        return self._classes

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        numbers = {name: number for number, name in enumerate(self.classes())}
        for name, url in self._images():
            yield {"url": _encoded(url), "label": b"%d" % numbers[name]}

    def _images(self) -> Iterator[tuple[str, str]]:
        """(class, URL) of each image; images directly in the top folder are left out."""
        top = self.options.url.rstrip("/") + "/"
        for entry in storage.entries(self.options.url):
            folder, slash, _ = entry.url.removeprefix(top).partition("/")
            if slash and _ending(entry.url) in IMAGE_ENDINGS:
                yield folder, entry.url


def is_image(url: str) -> bool:
    """Whether a name ends like an image's."""
    return _ending(url) in IMAGE_ENDINGS


def _ending(url: str) -> str:
    return posixpath.splitext(url)[1][1:].lower()


def _up_to_dot(url: str) -> str:
    folder, _, name = url.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _encoded(url: str) -> bytes:
    return url.encode("utf-8", "surrogateescape")
