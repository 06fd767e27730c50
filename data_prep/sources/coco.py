"""COCO's instances as a source: images, their objects, and captions where a captions file is given."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pyarrow as pa

from data_prep.sources.base import AllowedPlaces, Source, batches_of, places_below
from data_prep.sources.options import SourceOptions
from pipeline import storage
from pipeline.errors import DataError


class CocoOptions(SourceOptions):
    """COCO's instances: images with their objects, and captions where a captions file is given.

    Categories are renumbered 0, 1, ... in the order of their COCO ids.
    """

    type: Literal["coco"]
    url: str  # instances_*.json
    images: str  # folder of the images
    captions: str | None = None  # captions_*.json

    def open(self) -> Source:
        return CocoSource(self)

    @property
    def has_captions(self) -> bool:
        return self.captions is not None


class CocoSource:
    """The images of an instances file in the order of their ids, with and without objects. See `CocoOptions`.

    COCO's files are single JSON documents, which this source holds in memory.
    """

    def __init__(self, options: CocoOptions) -> None:
        self.options = options
        self._document: dict[str, Any] | None = None

    def check(self) -> None:
        if not self._instances()["images"]:
            raise DataError("lists no images", where=self.options.url, fix="correct source.url")
        list(self._captions())

    def batches(self) -> Iterator[pa.RecordBatch]:
        return batches_of(self._rows())

    def size_bytes(self) -> int:
        return storage.size_bytes(self.options.url)

    def places(self) -> AllowedPlaces:
        return places_below(self.options.images.rstrip("/"), self.options.allow, None)

    def classes(self) -> tuple[str, ...]:
        return tuple(category["name"] for category in self._categories())

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        numbers = {category["id"]: number for number, category in enumerate(self._categories())}
        objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for item in self._instances()["annotations"]:
            objects[item["image_id"]].append(item | {"category_id": numbers[item["category_id"]]})
        captions = self._captions()
        for image in sorted(self._instances()["images"], key=lambda image: image["id"]):
            annotations = objects.pop(image["id"], [])
            row: dict[str, Any] = {
                "url": image["file_name"].encode(),
                "annotations": json.dumps(annotations).encode(),
                "extra": json.dumps({"image_id": image["id"]}).encode(),
            }
            if self.options.captions is not None:
                row["captions"] = json.dumps(captions.get(image["id"], [])).encode()
            yield row

    def _categories(self) -> list[dict[str, Any]]:
        return sorted(self._instances()["categories"], key=lambda category: category["id"])

    def _captions(self) -> dict[int, list[str]]:
        """Image id -> captions."""
        captions: dict[int, list[str]] = defaultdict(list)
        if self.options.captions is not None:
            for item in _read(self.options.captions, ("annotations",))["annotations"]:
                captions[item["image_id"]].append(item["caption"])
        return captions

    def _instances(self) -> dict[str, Any]:
        if self._document is None:
            self._document = _read(self.options.url, ("images", "annotations", "categories"))
        return self._document


def _read(url: str, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        document = json.loads(storage.read(url))
    except FileNotFoundError as error:
        raise DataError("no such file", where=url, fix="correct source.url or source.captions") from error
    except ValueError as error:
        raise DataError(f"not JSON ({error})", where=url, fix="fetch the annotations again") from error
    missing = [key for key in keys if not isinstance(document, dict) or not isinstance(document.get(key), list)]
    if missing:
        raise DataError(f"holds no {', '.join(missing)}", where=url, fix="give a file in COCO's format")
    return dict(document)
