"""Manifests: what was written is read back, damage is named."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.data.manifest import Manifest, index_bytes, manifest_bytes, read_index, read_manifest
from pipeline.errors import DataError


def test_round_trip(data_set: Callable[..., Manifest]) -> None:
    manifest = data_set([3, 0, 5])
    assert manifest_bytes(read_manifest(manifest.url)) == storage.read(storage.join(manifest.url, "manifest.json"))
    assert read_manifest(manifest.url) == manifest
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    assert manifest.classes[2] == "class 2"


def test_locate(data_set: Callable[..., Manifest]) -> None:
    manifest = data_set([3, 0, 5])
    assert [manifest.locate(i) for i in range(8)] == [(0, 0), (0, 1), (0, 2), *((2, i) for i in range(5))]
    for beyond in (-1, 8):
        with pytest.raises(IndexError):
            manifest.locate(beyond)


def test_index_covers_the_samples(data_set: Callable[..., Manifest]) -> None:
    manifest = data_set([4])
    offsets = read_index(manifest, manifest.shards[0])
    assert offsets.dtype == np.int64
    assert offsets[0] == 0
    assert offsets.shape == (5,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "isn't a vitrail manifest"),
        (lambda d: d.update(format_version=99), "newer than this reader"),
        (lambda d: d.update(format_version="1"), "format_version '1'"),
        (lambda d: d.pop("shards"), "'shards' is missing"),
        (lambda d: d.update(num_samples=4), "isn't the sum"),
        (lambda d: d["shards"][0].pop("sha256"), "'sha256' is missing"),
        (lambda d: d["shards"][0].update(extra=1), "extra"),
        (lambda d: d["shards"][0].update(name="../../etc/passwd"), "doesn't name a file"),
        (lambda d: d["shards"][0].update(num_samples=-3), "negative"),
        (lambda d: d.update(classes=[1]), "classes must be names"),
        (lambda d: d.update(shards=[7]), "no mapping"),
    ],
)
def test_damaged_manifests_are_named(data_set: Callable[..., Manifest], change, message: str) -> None:
    url = data_set([3]).url
    path = Path(url) / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(url)
    assert str(path) in caught.value.where


def test_a_missing_manifest_or_other_bytes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest.json.*vitrail prep"):
        read_manifest(str(tmp_path))
    (tmp_path / "sa_000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"tars such as sa_000000.tar.*vitrail index.*--to.*type: tars"):
        read_manifest(str(tmp_path))
    (tmp_path / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(DataError, match="no JSON"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"no array", "no index of offsets"),
        (index_bytes(np.arange(3)), r"int64 \[3\], the manifest wants int64 \[4\]"),
        (index_bytes(np.array([0, 512, 512, 1024])), "don't rise"),
        (index_bytes(np.array([0, 1, 2, 10**9])), "don't rise"),
    ],
)
def test_damaged_indices_are_named(data_set: Callable[..., Manifest], index: bytes, message: str) -> None:
    manifest = data_set([3])
    (Path(manifest.url) / "00000.index.npy").write_bytes(index)
    shard = manifest.shards[0]
    with pytest.raises(DataError, match="isn't the one the manifest knows"):
        read_index(manifest, shard)
    with pytest.raises(DataError, match=message):
        read_index(manifest, shard._replace(index_sha256=hashlib.sha256(index).hexdigest()))


def test_a_missing_index(data_set: Callable[..., Manifest]) -> None:
    manifest = data_set([3])
    (Path(manifest.url) / "00000.index.npy").unlink()
    with pytest.raises(DataError, match="index is missing"):
        read_index(manifest, manifest.shards[0])
