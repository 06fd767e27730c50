"""Damaged and hostile shards, through the whole loader: named, at weight 0, never a crash, a hang or an execution.

What the tar reader does with single damaged headers is in test_shards; here whole shards are damaged behind the
manifest's back, as bad disks and other writers do it.
"""

from __future__ import annotations

import io
import logging
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.images.transforms import EvalImage, ImageExample
from pipeline.data.manifest import Manifest
from tests.support.loaders import swept
from tests.unit.data.conftest import numbered

TRANSFORM = ImageExample(EvalImage((8, 8)), label=True)
Damage = Callable[[bytearray, np.ndarray], bytes]


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.path, "w"))


def outcome(manifest: Manifest) -> tuple[set[int], set[int]]:
    """Ids that were read and ids that weren't."""
    read, unread = set(), set()
    for batch in swept(manifest, TRANSFORM, rank=0, world_size=1, batch=8):
        for i, weight in zip(batch.ids.tolist(), batch.weight.tolist(), strict=True):
            if i >= 0:
                (read if weight else unread).add(i)
    return read, unread


def damage(manifest: Manifest, change: Damage, shard: int = 1) -> None:
    tar = Path(manifest.url) / manifest.shards[shard].name
    offsets = np.load(Path(manifest.url) / manifest.shards[shard].index_name)
    tar.write_bytes(change(bytearray(tar.read_bytes()), offsets))


def test_flipped_bits_cost_the_samples_they_hit(data_set: Callable[..., Manifest], caplog) -> None:
    manifest = data_set([10, 10])

    def flip(data: bytearray, offsets: np.ndarray) -> bytes:
        data[offsets[2] + 5] ^= 4  # a header
        data[offsets[5] + 600] ^= 255  # the second byte of an image's content and on
        data[offsets[5] + 512 : offsets[5] + 560] = bytes(48)
        return bytes(data)

    damage(manifest, flip)
    with caplog.at_level(logging.WARNING):
        read, unread = outcome(manifest)
    assert unread == {12, 15}
    assert len(read) == 18
    assert "number 2 of" in caplog.text
    assert "checksum" in caplog.text


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.8])
def test_truncation_costs_what_is_cut_off(data_set: Callable[..., Manifest], keep: float, caplog) -> None:
    manifest = data_set([10, 10])
    damage(manifest, lambda data, _: bytes(data[: int(len(data) * keep)]))
    with caplog.at_level(logging.WARNING):
        read, unread = outcome(manifest)
    assert set(range(10)) <= read
    assert unread == set(range(min(unread), 20))
    assert "the shard ends before the sample does" in caplog.text


def test_a_missing_member_is_named(data_set: Callable[..., Manifest], caplog) -> None:
    shards = numbered([6])
    del shards[0][2][1]["cls"]
    shards[0][4] = (shards[0][4][0], {"txt": b"no image"})
    with caplog.at_level(logging.WARNING):
        _, unread = outcome(data_set(shards=shards))
    assert unread == {2, 4}
    assert "no cls member" in caplog.text
    assert "no image among its members (txt)" in caplog.text


def test_members_that_arent_adjacent_are_two_halves_of_a_sample(data_set: Callable[..., Manifest], caplog) -> None:
    """The halves of sample 1 lie in the ranges of 1 and 3: neither is taken for a whole one."""
    shards = numbered([5])
    key, members = shards[0][1]
    extension = next(name for name in members if name in ("jpg", "png", "webp"))
    manifest = data_set(shards=shards)

    def rename(data: bytearray, offsets: np.ndarray) -> bytes:
        """Give an image the name of another sample's, with a right checksum."""
        at = int(offsets[3])
        name = f"{key}.{extension}".encode()
        data[at : at + 100] = name.ljust(100, b"\0")
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        return bytes(data)

    damage(manifest, rename, shard=0)
    with caplog.at_level(logging.WARNING):
        read, unread = outcome(manifest)
    assert unread == {3}
    assert read == {0, 1, 2, 4}
    assert f"holds members of '{key}' and of '000003'" in caplog.text


def test_names_that_are_commands_and_pickles_inside_do_nothing(
    data_set: Callable[..., Manifest], tmp_path: Path, caplog
) -> None:
    """`pipe:` names, absolute paths, links and `.pyd` members are passed over; the image beside them is read."""
    marker = tmp_path / "executed"
    evil = pickle.dumps(Hostile(str(marker)))
    shards = numbered([4])
    good = next(name for name in shards[0][0][1] if name in ("jpg", "png", "webp"))
    picture = shards[0][0][1][good]
    manifest = data_set(shards=shards)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in [
            (f"000000.{good}", picture),
            ("000000.pyd", evil),
            ("000000.pkl", evil),
            (f"pipe:touch {marker}", b"x"),
            (f"/etc/../pipe: touch {marker} |.sh", b"x"),
            ("000000.cls", b"3"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("000000.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        stop = tar.offset
    hostile = buffer.getvalue()[:stop]
    offsets = np.load(Path(manifest.url) / "00000.index.npy")
    shifted = np.concatenate([[0], offsets[1:] - offsets[1] + len(hostile)])
    tar_path = Path(manifest.url) / "00000.tar"
    tar_path.write_bytes(hostile + tar_path.read_bytes()[offsets[1] :])
    read, unread = outcome(_reindexed(manifest, shifted, tar_path.stat().st_size))
    assert (read, unread) == ({0, 1, 2, 3}, set())
    assert not marker.exists()


def _reindexed(manifest: Manifest, offsets: np.ndarray, size: int) -> Manifest:
    import dataclasses
    import hashlib

    from pipeline.data.manifest import index_bytes

    data = index_bytes(offsets)
    (Path(manifest.url) / "00000.index.npy").write_bytes(data)
    shard = manifest.shards[0]._replace(size_bytes=size, index_sha256=hashlib.sha256(data).hexdigest())
    return dataclasses.replace(manifest, shards=(shard,))


def test_noise_in_the_place_of_a_shard_costs_that_shard(data_set: Callable[..., Manifest]) -> None:
    manifest = data_set([10, 10, 10])
    damage(manifest, lambda data, _: np.random.default_rng(0).bytes(len(data)))
    read, unread = outcome(manifest)
    assert unread == set(range(10, 20))
    assert len(read) == 20
