"""Rendered scenes: raw pairs with labels, boxes and masks, for the demo and for tests.

A scene shows one main object, a textured shape whose (shape, texture) pair is the label, before a lit and patterned
background, with a few small objects of the same kinds around it. Position, size, tilt, colors, light, image size and
file format vary independently of the class. It writes single image files, `classes.json` and
`pairs.parquet` (the table last, so that a folder with a table is complete).
"""

from __future__ import annotations

import concurrent.futures
import io
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image
from pydantic import Field, model_validator

from data_prep.scenes.captions import caption, class_name
from data_prep.scenes.draw import SHAPES, TEXTURES, Scene, draw_scene
from pipeline import storage
from pipeline.config import Config
from pipeline.machine import available_cores

FORMAT_VERSION = 1
TABLE_NAME = "pairs.parquet"
CLASSES_NAME = "classes.json"
SETTINGS_NAME = "scenes.json"
CLASSES = tuple((shape, texture) for shape in SHAPES for texture in TEXTURES)
"""(shape, texture) of every label."""

_SPLITS = ("train", "validation", "heldout")
_TASK_SCENES = 64  # rendered by one task
_WRITERS = 16  # objects written at once
_COLUMNS = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("label", pa.int64()),
        ("split", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("annotations", pa.string()),
    ]
)


class ScenesConfig(Config):
    """What is rendered. Equal settings give equal bytes."""

    seed: int = Field(default=0, ge=0)
    num_train: int = Field(default=4000, ge=0)
    num_validation: int = Field(default=400, ge=0)
    num_heldout: int = Field(default=800, ge=0)
    min_side: int = Field(default=72, ge=32)  # pixels
    max_side: int = Field(default=128, ge=32)  # pixels
    max_aspect: float = Field(default=1.25, ge=1)  # longer over shorter side
    max_clutter: int = Field(default=3, ge=0, le=6)  # small objects beside the main one, at most
    part_share: float = Field(default=0, ge=0, le=1)  # of main objects that bear a part, an annotated object of its own

    @model_validator(mode="after")
    def _check(self) -> ScenesConfig:
        if self.min_side > self.max_side:
            raise ValueError("min_side is larger than max_side")
        if not any(self.num_scenes(split) for split in _SPLITS):
            raise ValueError("num_train, num_validation and num_heldout are all 0")
        return self

    def num_scenes(self, split: str) -> int:
        """Scenes of a split."""
        return {"train": self.num_train, "validation": self.num_validation, "heldout": self.num_heldout}[split]


class RenderedScene(NamedTuple):
    """One row of the table, and the image it points to."""

    row: dict[str, Any]
    data: bytes


class ScenesReport(NamedTuple):
    """The result of `write_scenes`."""

    url: str
    num_scenes: int
    num_rendered: int  # 0 where everything existed already


def class_names() -> tuple[str, ...]:
    """Names of the labels 0, 1, ..."""
    return tuple(class_name(shape, texture) for shape, texture in CLASSES)


def label_of(config: ScenesConfig, split: str, index: int) -> int:
    """The label of scene `index`: each block of as many scenes as there are classes holds every class once."""
    block, place = divmod(index, len(CLASSES))
    order = np.random.default_rng([config.seed, _SPLITS.index(split), block, 1]).permutation(len(CLASSES))
    return int(order[place])


def render(config: ScenesConfig, split: str, index: int) -> RenderedScene:
    """Scene `index` of a split: a function of its arguments alone."""
    draw = np.random.default_rng([config.seed, _SPLITS.index(split), index, 0])
    label = label_of(config, split, index)
    width, height = _draw_size(config, draw)
    with_part = config.part_share > 0 and draw.uniform() < config.part_share
    scene = draw_scene(
        draw, *CLASSES[label], height=height, width=width, max_clutter=config.max_clutter, with_part=with_part
    )
    text = caption(scene, draw)
    extension, data = _encode(scene.image, draw)
    row = {
        "url": f"images/{split}/{index:06d}.{extension}",
        "caption": text,
        "label": label,
        "split": split,
        "width": width,
        "height": height,
        "annotations": json.dumps(_annotations(scene), separators=(",", ":")),
    }
    return RenderedScene(row, data)


def write_scenes(config: ScenesConfig, url: str, *, processes: int | None = None) -> ScenesReport:
    """Render every scene into folder `url`; a repeated call after a stop writes only what is missing.

    Args:
        config: what to render.
        url: a folder or s3:// prefix.
        processes: that render; None: one per core this process may use, 1: this process alone.

    Raises:
        StorageError: `url` can't be written.
    """
    settings = json.dumps({"format_version": FORMAT_VERSION, **config.model_dump(mode="json")}, indent=1) + "\n"
    total = sum(config.num_scenes(split) for split in _SPLITS)
    table_url = storage.join(url, TABLE_NAME)
    if _is_begun(url, settings):
        if storage.exists(table_url):
            return ScenesReport(url, total, 0)
        present = _sizes(url)
    else:
        # A table marks a complete folder, so it is deleted before anything of another rendering is replaced.
        storage.delete(table_url)
        storage.write(storage.join(url, SETTINGS_NAME), settings.encode())
        present = {}
    rows = _write_images(config, url, present, processes or available_cores())
    names = json.dumps(class_names(), indent=1) + "\n"
    storage.write(storage.join(url, CLASSES_NAME), names.encode())
    storage.write(table_url, _table(rows))
    return ScenesReport(url, total, total)


def _draw_size(config: ScenesConfig, draw: np.random.Generator) -> tuple[int, int]:
    width = int(draw.integers(config.min_side, config.max_side + 1))
    height = round(width * config.max_aspect ** draw.uniform(-1, 1))
    return width, min(max(height, config.min_side), config.max_side)


def _encode(image: np.ndarray, draw: np.random.Generator) -> tuple[str, bytes]:
    """File extension and bytes: half of the images are JPEG, a quarter each PNG and WebP."""
    kind, quality = draw.uniform(), int(draw.integers(85, 96))
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    if kind < 0.5:
        picture.save(buffer, "JPEG", quality=quality)
        return "jpg", buffer.getvalue()
    if kind < 0.75:
        picture.save(buffer, "PNG", compress_level=1)
        return "png", buffer.getvalue()
    picture.save(buffer, "WEBP", quality=quality, method=0)
    return "webp", buffer.getvalue()


def _annotations(scene: Scene) -> list[dict[str, Any]]:
    """COCO annotations of every object, the main one first and its part last."""
    from pycocotools import mask as coco_mask

    annotations = []
    for item in (*reversed(scene.objects), *([scene.part] if scene.part else [])):
        mask = coco_mask.encode(np.asfortranarray(item.mask.astype(np.uint8)))
        annotations.append(
            {
                "bbox": coco_mask.toBbox(mask).tolist(),
                "category_id": CLASSES.index((item.shape, item.texture)),
                "segmentation": {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")},
                "area": int(coco_mask.area(mask)),
                "iscrowd": 0,
            }
        )
    return annotations


def _is_begun(url: str, settings: str) -> bool:
    """Whether the folder belongs to a rendering with these settings."""
    try:
        return storage.read(storage.join(url, SETTINGS_NAME)) == settings.encode()
    except FileNotFoundError:
        return False


def _sizes(url: str) -> dict[str, int]:
    """Path below the folder -> size in bytes, of the existing images."""
    folder = storage.join(url, "images")
    return {"images" + entry.url.split("/images")[-1]: entry.size_bytes for entry in storage.entries(folder)}


def _write_images(config: ScenesConfig, url: str, present: dict[str, int], processes: int) -> list[dict[str, Any]]:
    """Write the missing images; returns the rows of all."""
    rows = []
    with concurrent.futures.ThreadPoolExecutor(_WRITERS) as writers:
        pending: set[concurrent.futures.Future[None]] = set()
        for scene in _render_all(config, processes):
            rows.append(scene.row)
            if present.get(scene.row["url"]) != len(scene.data):
                pending.add(writers.submit(storage.write, storage.join(url, scene.row["url"]), scene.data))
            if len(pending) >= 4 * _WRITERS:  # bounds the images in memory
                done, pending = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
                for write in done:
                    write.result()
        for write in pending:
            write.result()
    return rows


def _render_all(config: ScenesConfig, processes: int) -> Iterator[RenderedScene]:
    """All scenes in the table's order."""
    tasks = [
        (config, split, start, min(start + _TASK_SCENES, config.num_scenes(split)))
        for split in _SPLITS
        for start in range(0, config.num_scenes(split), _TASK_SCENES)
    ]
    if processes == 1 or len(tasks) == 1:
        yield from itertools.chain.from_iterable(map(_render_range, tasks))
        return
    # Spawned, since a fork would inherit an S3 client's threads and locks.
    with concurrent.futures.ProcessPoolExecutor(
        min(processes, len(tasks)), multiprocessing.get_context("spawn"), initializer=_end_with_parent
    ) as pool:
        yield from itertools.chain.from_iterable(pool.map(_render_range, tasks))


def _render_range(task: tuple[ScenesConfig, str, int, int]) -> list[RenderedScene]:
    config, split, start, stop = task
    return [render(config, split, index) for index in range(start, stop)]


def _end_with_parent() -> None:
    """End this process when its parent ends, since it would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _table(rows: Sequence[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows), schema=_COLUMNS), buffer, compression="zstd")
    return buffer.getvalue()
