"""Reading tars: what is in them comes out, damage is named, nothing in them is executed."""

from __future__ import annotations

import contextlib
import io
import pickle
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.data.images.decode import UnreadableSample
from pipeline.data.manifest import Manifest
from pipeline.data.order.tasks import ManifestReads, SampleLocation
from pipeline.data.reading.shards import ReadAhead, ShardReader, parse_sample, patiently
from pipeline.data.reading.tar import EXTENSIONS
from pipeline.errors import StorageError


def tar(
    *members: tuple[str, bytes], fmt: int = tarfile.USTAR_FORMAT, end: bool = False, **fields: object
) -> memoryview:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
        stop = archive.offset
    return memoryview(buffer.getvalue() if end else buffer.getvalue()[:stop])


MEMBERS = st.dictionaries(st.sampled_from(sorted(EXTENSIONS)), st.binary(max_size=1500), min_size=1)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@given(
    members=MEMBERS, fmt=FORMATS, key=st.text("abcäß-_/1", min_size=1, max_size=120), mtime=st.sampled_from([0, 1.5])
)
@settings(deadline=None)
def test_members_come_back_from_every_tar_format(members, fmt, key: str, mtime: float) -> None:
    key = "/".join(part or "x" for part in key.split("/"))
    if fmt == tarfile.USTAR_FORMAT:
        key, mtime = key[:40], 0
    data = tar(*((f"{key}.{extension}", content) for extension, content in members.items()), fmt=fmt, mtime=mtime)
    sample = parse_sample(data, 5)
    assert sample == (5, key, members)


def test_keys_end_at_the_first_dot_and_extensions_are_lower_case() -> None:
    sample = parse_sample(tar(("a.b/0001.JPG", b"x"), ("a.b/0001.Txt", b"y")), 0)
    assert sample.key == "a.b/0001"
    assert sample.members == {"jpg": b"x", "txt": b"y"}


def test_unknown_members_are_passed_over_and_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    bomb = pickle.dumps(Bomb())
    sample = parse_sample(
        tar(("a.pyd", bomb), ("a.pickle", bomb), ("pipe:touch x", b""), ("a.seg.png", b"z"), ("a.txt", b"t")), 0
    )
    assert sample.members == {"txt": b"t"}
    assert list(tmp_path.iterdir()) == []


def test_links_and_devices_are_passed_over() -> None:
    data = bytes(tar(("a.jpg", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd")) + bytes(tar(("a.txt", b"t")))
    assert parse_sample(memoryview(data), 0).members == {"txt": b"t"}


def damaged(data: memoryview, at: int, value: int) -> memoryview:
    changed = bytearray(data)
    changed[at] = value
    return memoryview(bytes(changed))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar(("a.txt", b"x"), ("b.txt", b"y")), "members of 'a' and of 'b'"),
        (tar(("a.txt", b"x"), ("a.TXT", b"y")), "holds a.txt twice"),
        (tar(("a.exe", b"x")), "no member of a known kind"),
        (memoryview(b""), "no member of a known kind"),
        (tar(("a.txt", b"x" * 2000))[:1024], "goes on beyond"),
        (tar(("a.txt", b"x"))[:300], "within a tar header"),
        (damaged(tar(("a.txt", b"x")), 3, 65), "checksum"),
        (damaged(tar(("a.txt", b"x")), 150, 255), "checksum"),
    ],
)
def test_damage_is_named(data: memoryview, message: str) -> None:
    with pytest.raises(UnreadableSample, match=message):
        parse_sample(data, 0)


@given(at=st.integers(0, 2047), value=st.integers(0, 255), length=st.integers(0, 2048))
@settings(deadline=None, max_examples=300)
def test_any_damage_is_an_unreadable_sample_at_worst(at: int, value: int, length: int) -> None:
    data = tar(("a.txt", b"hello"), ("a.jpg", b"x" * 300))
    with contextlib.suppress(UnreadableSample):
        assert parse_sample(damaged(data, at, value)[:length], 0).key


def test_runs_of_samples_are_one_read(data_set: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = data_set([10, 10])
    calls = []
    whole = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda *args: calls.append(args) or whole(*args))
    reads = ManifestReads(manifest)
    read = ShardReader(threading.Event()).read(reads.read(12, 17))
    found = [read.sample(number, 10 + number).members["txt"] for number in range(2, 7)]
    assert found == [f"caption {i}".encode() for i in range(12, 17)]
    assert len(calls) == 1
    with pytest.raises(ValueError, match="several shards"):
        reads.read(8, 12)


def test_read_ahead_forgets_what_isnt_kept(data_set: Callable[..., Manifest]) -> None:
    reads = ManifestReads(data_set([10]))
    ahead = ReadAhead(ShardReader(threading.Event()))
    try:
        ahead.open({0: (reads.read(0, 2),), 1: (reads.read(4, 6), reads.read(8, 9))})
        assert ahead.sample(SampleLocation(1, 1, 8), 8).id == 8
        ahead.forget([0])
        assert ahead.sample(SampleLocation(1, 0, 5), 5).key == "000005"
        assert ahead.shard(SampleLocation(1, 0, 5)).url.endswith("00000.tar")
        with pytest.raises(KeyError):
            ahead.sample(SampleLocation(0, 0, 0), 0)
    finally:
        ahead.close()


def test_an_outage_is_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    outage = [storage.StorageUnavailable("silent", where="s3://b/k", fix="wait")] * 3

    class Patient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return False

    def read() -> bytes:
        if outage:
            raise outage.pop()
        return b"there"

    assert patiently(read, Patient()) == b"there"
    outage[:] = [storage.StorageUnavailable("silent", where="s3://b/k", fix="wait")]
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(StorageError, match="silent"):
        patiently(read, stopped)
