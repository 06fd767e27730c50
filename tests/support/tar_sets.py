"""Tars as other programs leave them: SA-1B's, img2dataset's, whatever the standard library's tarfile can write."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from tests.support.prep_cases import encoded

Members = Iterable[tuple[str, bytes]]


def write_tar(path: Path, members: Members, kind: int = tarfile.GNU_FORMAT, folder: str = "") -> Path:
    """Members in this order, after a member for `folder` where one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        if folder:
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sa1b_annotation(number: int, height: int = 32, width: int = 48) -> dict[str, Any]:
    """One object as SA-1B's JSON has it: no category, a box as x, y, width, height, a mask as compressed RLE."""
    top, left = 2 + number % 5, 3 + number % 7
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[top : top + 16, left : left + 20] = 1
    rle = coco_mask.encode(mask)
    return {
        "id": 1000 + number,
        "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
        "bbox": [left, top, 19, 15],
        "area": 320,
        "predicted_iou": 0.93,
        "stability_score": 0.97,
        "crop_box": [0, 0, width, height],
        "point_coords": [[left + 5.0, top + 5.0]],
    }


def sa1b_members(first: int, count: int, prefix: str = "./") -> Iterator[tuple[str, bytes]]:
    """`count` images with two objects each, jpg before json."""
    for i in range(first, first + count):
        name = f"sa_{i}"
        facts = {
            "image": {"image_id": i, "width": 48, "height": 32, "file_name": f"{name}.jpg"},
            "annotations": [sa1b_annotation(i), sa1b_annotation(i + 3)],
        }
        yield f"{prefix}{name}.jpg", encoded(i)
        yield f"{prefix}{name}.json", json.dumps(facts).encode()


def pair_members(first: int, count: int, *, label: bool = False) -> Iterator[tuple[str, bytes]]:
    """`count` pairs as img2dataset names them: {row of nine digits}.jpg, .txt, .json."""
    for i in range(first, first + count):
        key = f"{i:09d}"
        facts = {"caption": f"a picture of {i}", "url": f"http://x/{i}", "key": key, "status": "success"}
        yield f"{key}.jpg", encoded(i)
        yield f"{key}.txt", f"a picture of {i}".encode()
        yield f"{key}.json", json.dumps(facts).encode()
        if label:
            yield f"{key}.cls", str(i % 4).encode()
