import io
import tarfile

import numpy as np
import pytest

from data_prep.shards.commit import Sample, ShardWriter, sample_key, tar_header


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    sizes = [0, 1, 511, 512, 513, 5000]
    return [Sample(sample_key(i), {"jpg": rng.bytes(size), "txt": b"caption %d" % i}) for i, size in enumerate(sizes)]


def packed() -> tuple[bytes, np.ndarray]:
    writer = ShardWriter()
    for sample in samples():
        writer.add(sample)
    return writer.finish()


def test_an_archive_holds_what_was_added_in_order() -> None:
    archive, _ = packed()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = tar.getmembers()
        content = [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    expected = [(f"{s.key}.{extension}", data) for s in samples() for extension, data in s.members.items()]
    assert [(member.name, data) for member, data in zip(members, content, strict=True)] == expected


def test_headers_carry_neither_time_nor_owner() -> None:
    for name, size in (("000000000001.jpg", 0), ("a.txt", 123456789)):
        header = tar_header(name, size)
        info = tarfile.TarInfo.frombuf(header, "ascii", "strict")  # checks the checksum
        assert (info.name, info.size, info.mode, info.isreg()) == (name, size, 0o644, True)
        assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
        assert header[257:265] == b"ustar\x0000"


def test_each_range_of_the_index_is_an_archive_of_one_sample() -> None:
    archive, offsets = packed()
    assert offsets[0] == 0
    assert len(archive) == offsets[-1] + 1024
    for sample, start, stop in zip(samples(), offsets[:-1], offsets[1:], strict=True):
        with tarfile.open(fileobj=io.BytesIO(archive[start:stop])) as tar:
            assert tar.getnames() == [f"{sample.key}.jpg", f"{sample.key}.txt"]


def test_the_same_samples_make_the_same_bytes() -> None:
    assert packed()[0] == packed()[0]


def test_what_no_header_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="doesn't fit"):
        tar_header("x" * 101, 1)
    with pytest.raises(ValueError, match="doesn't fit"):
        tar_header("x", 8**11)


def test_keys_have_no_dot_and_sort_by_position() -> None:
    keys = [sample_key(i) for i in (0, 9, 10, 123_456_789)]
    assert keys == sorted(keys)
    assert not any("." in key for key in keys)
