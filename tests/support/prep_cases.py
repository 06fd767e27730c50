"""Small sources for tests of data preparation: encoded images, tables, settings, and what a build left behind."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from data_prep.config import PrepConfig
from pipeline.config import validate
from pipeline.data.manifest import read_manifest


def pixels(seed: int, width: int = 48, height: int = 32) -> np.ndarray:
    """A smooth image, so that lossy codecs keep it nearly as it is."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(seed: int, kind: str = "JPEG", width: int = 48, height: int = 32, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, width, height)).save(buffer, kind, **options)
    return buffer.getvalue()


def write_pairs(folder: Path, count: int, **columns: list[Any]) -> Path:
    """`count` different images in all three formats under `folder`/images, and a Parquet table of them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    urls = []
    for i in range(count):
        kind, ending = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[i % 3]
        (folder / "images" / f"{i}.{ending}").write_bytes(encoded(i, kind, 40 + i % 7, 30 + i % 5))
        urls.append(f"images/{i}.{ending}")
    return write_table(
        folder / "pairs.parquet", url=urls, caption=[f"a picture of {i}" for i in range(count)], **columns
    )


def write_table(path: Path, **columns: list[Any]) -> Path:
    pa.parquet.write_table(pa.table(columns), path)
    return path


def settings(table: Path | str, output: Path | str, **more: Any) -> PrepConfig:
    """Settings in the form YAML gives them; keys of `source` are merged."""
    document: dict[str, Any] = {
        "output": str(output),
        "shard": {"samples": 8},
        "ray": {"tasks": 0},
        **more,
        "source": {"type": "table", "url": str(table), **more.get("source", {})},
    }
    return validate(PrepConfig, document, where="test")


def samples(folder: Path | str) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> bytes of a split, read with the standard library in the manifest's order."""
    samples_by_key: dict[str, dict[str, bytes]] = {}
    for shard in read_manifest(str(folder)).shards:
        with tarfile.open(Path(folder) / shard.name) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                samples_by_key.setdefault(key, {})[extension] = file.read()
    return samples_by_key


def sidecar(folder: Path | str) -> list[dict[str, Any]]:
    """All rows of a split's sidecars."""
    tables = [pa.parquet.read_table(path) for path in sorted(Path(folder).glob("*.parquet"))]
    return pa.concat_tables(tables).to_pylist()


def hashes(output: Path | str) -> dict[str, str]:
    """Name -> sha256 of everything a build made, but for what tells when and how."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(output).rglob("*"))
        if path.is_file() and not path.name.endswith("_stats.json") and "_prep" not in path.parts
    }


def reasons(output: Path | str) -> dict[str, int]:
    """Refusals by reason, as prep.json tells them."""
    document = json.loads((Path(output) / "prep.json").read_text())
    return document["filtered"] | document["failed"]
