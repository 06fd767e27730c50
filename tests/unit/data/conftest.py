"""Small data sets in the agreed folder format, written with the standard library's tarfile."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.data.manifest import MANIFEST_NAME, Manifest, Shard, index_bytes, manifest_bytes, read_manifest

Members = Mapping[str, bytes]  # by extension


def picture(seed: int, height: int = 40, width: int = 48, kind: str = "JPEG") -> bytes:
    """A patchwork of colours, encoded."""
    colours = np.random.default_rng(seed).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def sample(i: int) -> dict[str, bytes]:
    """Sample i: an image in one of three formats, its caption and its label."""
    extension, kind = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")][i % 3]
    return {
        extension: picture(i, kind=kind),
        "txt": f"caption {i}".encode(),
        "json": json.dumps({"number": i}).encode(),
        "cls": str(i % 7).encode(),
    }


def tar_bytes(samples: Sequence[tuple[str, Members]]) -> tuple[bytes, list[int]]:
    """A USTAR archive, and where each sample starts and the last ends."""
    buffer = io.BytesIO()
    offsets = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            offsets.append(tar.offset)
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        offsets.append(tar.offset)
    return buffer.getvalue(), offsets


CLASSES = tuple(f"class {i}" for i in range(7))


def write_data_set(
    url: str,
    shards: Sequence[Sequence[tuple[str, Members]]],
    classes: Sequence[str] = CLASSES,
) -> Manifest:
    """Write tars, indices and manifest; every shard a list of (key, members)."""
    entries = []
    for number, samples in enumerate(shards):
        archive, offsets = tar_bytes(samples)
        index = index_bytes(np.asarray(offsets))
        name, index_name = f"{number:05d}.tar", f"{number:05d}.index.npy"
        storage.write(storage.join(url, name), archive)
        storage.write(storage.join(url, index_name), index)
        hashes = [hashlib.sha256(data).hexdigest() for data in (archive, index)]
        entries.append(Shard(name, len(samples), len(archive), hashes[0], index_name, hashes[1]))
    manifest = Manifest(url, tuple(entries), sum(map(len, shards)), "fingerprint", tuple(classes), {"source": "test"})
    storage.write(storage.join(url, MANIFEST_NAME), manifest_bytes(manifest))
    return read_manifest(url)


def numbered(sizes: Sequence[int]) -> list[list[tuple[str, Members]]]:
    """Shards of these sizes, samples numbered through."""
    starts = np.cumsum([0, *sizes])
    return [[(f"{i:06d}", sample(i)) for i in range(starts[s], starts[s + 1])] for s in range(len(sizes))]


@pytest.fixture
def data_set(tmp_path: Path) -> Callable[..., Manifest]:
    """Writes a data set of shards of the given sizes, or of the given shards, into a fresh folder."""
    count = 0

    def make(sizes: Sequence[int] = (), shards: Sequence[Sequence[tuple[str, Members]]] = ()) -> Manifest:
        nonlocal count
        count += 1
        return write_data_set(str(tmp_path / f"data-{count}"), shards or numbered(sizes))

    return make


@pytest.fixture(scope="session")
def ninety(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A data set of 90 samples in 4 shards, of which sample 17 is no image and sample 60 has a damaged header."""
    shards = numbered([30, 25, 20, 15])
    shards[0][17] = ("000017", {**sample(17), "webp": b"no image at all"})
    url = str(tmp_path_factory.mktemp("ninety"))
    manifest = write_data_set(url, shards)
    tar = Path(url) / "00002.tar"
    offsets = np.load(Path(url) / "00002.index.npy")
    damaged = bytearray(tar.read_bytes())
    damaged[offsets[5] + 130] ^= 1
    tar.write_bytes(bytes(damaged))
    return manifest


@pytest.fixture(scope="session")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Another data set, of 40 samples in 2 shards."""
    return write_data_set(str(tmp_path_factory.mktemp("forty")), numbered([25, 15]))
