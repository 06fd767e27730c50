"""Tars that stay as they are: what an index finds in them is what others read, and nothing is lost unseen."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data_prep.build import build
from data_prep.indexing import index as indexing
from data_prep.indexing import walk as walking
from data_prep.indexing.index import IndexOptions, IndexResult, index_tars
from data_prep.shards.contents import first_samples
from data_prep.shards.verify import verify
from pipeline import storage
from pipeline.data.manifest import Manifest, read_index, read_manifest
from pipeline.data.reading.shards import parse_sample
from pipeline.data.reading.tar import EXTENSIONS
from pipeline.errors import ConfigError, DataError, Stopped, StorageError
from tests.support.prep_cases import encoded, settings, write_pairs
from tests.support.tar_sets import pair_members, sa1b_members, write_tar

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def indexed(folder: Path | str, **choice: Any) -> IndexResult:
    return index_tars(IndexOptions(str(folder), **choice))


def ours(manifest: Manifest) -> list[tuple[str, dict[str, bytes]]]:
    """(key, extension -> bytes) of all samples, by the index."""
    pairs = []
    for shard in manifest.shards:
        for start, stop in itertools.pairwise(read_index(manifest, shard).tolist()):
            data = storage.read_range(manifest.tar_url(shard), start, stop)
            sample = parse_sample(memoryview(data), 0)
            pairs.append((sample.key, {extension: bytes(value) for extension, value in sample.members.items()}))
    return pairs


def theirs(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    """The same by the package webdataset, of members that stages read."""
    tars = sorted(map(str, folder.rglob("*.tar")))
    rows = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    samples = [(s["__key__"], {name: data for name, data in s.items() if name in EXTENSIONS}) for s in rows]
    return [(key, members) for key, members in samples if members]


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_the_index_finds_the_samples_that_webdataset_reads(tmp_path: Path, kind: int) -> None:
    folder = tmp_path / "tars"
    write_tar(folder / "sa_000000.tar", sa1b_members(0, 5), kind, folder="./")
    write_tar(folder / "sa_000001.tar", sa1b_members(5, 4, prefix=""), kind)
    write_tar(folder / "part" / "00000.tar", pair_members(0, 6, label=True), kind, folder="images")
    odd = [
        ("notes", b"not a sample"),
        (".hidden.jpg", b"not one either"),
        ("0.JPG", encoded(1)),
        ("0.caption.txt", b"with a second dot"),
        ("0.Txt", b"upper case"),
        ("deep/er.d/1.webp", encoded(2, "WEBP")),
        ("deep/er.d/1.cls", b"3"),
        ("2.npy", b"nothing that a stage reads"),
        ("3.png", encoded(3, "PNG")),
        ("3.pth", b"unpickled by nobody"),
    ]
    if kind != tarfile.USTAR_FORMAT:
        odd += [(f"{'long/' * 40}{'name' * 30}.jpg", encoded(4)), (f"{'long/' * 40}{'name' * 30}.txt", b"long")]
        odd += [("äöü.jpg", encoded(5)), ("äöü.txt", "ß".encode())]
    write_tar(folder / "odd.tar", odd, kind)
    manifest = indexed(folder).manifest
    assert ours(manifest) == theirs(folder)
    assert manifest.num_samples == 5 + 4 + 6 + (3 if kind == tarfile.USTAR_FORMAT else 5)
    assert read_manifest(str(folder)) == manifest
    facts = manifest.info["indexed"]
    unread = {"caption.txt": 1, "npy": 1, "pth": 1, walking.NO_SAMPLE: 2}
    assert facts["unread"] == dict(sorted(unread.items()))
    assert facts["examples"]["caption.txt"] == "0.caption.txt in odd.tar"
    with_members = {extension: sum(extension in m for _, m in ours(manifest)) for extension in EXTENSIONS}
    assert facts["members"] == {extension: n for extension, n in sorted(with_members.items()) if n}


def test_what_webdatasets_writer_leaves_is_read(tmp_path: Path) -> None:
    """Its times are fractions, which make PAX headers."""
    (tmp_path / "tars").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "tars" / "%05d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"a/{i:04d}", "jpg": encoded(i), "cls": i % 3, "json": {"number": i}})
    manifest = indexed(tmp_path / "tars").manifest
    assert ours(manifest) == theirs(tmp_path / "tars")
    assert [shard.num_samples for shard in manifest.shards] == [4, 4, 2]
    assert manifest.classes == ("0", "1", "2")
    assert verify(str(tmp_path / "tars")).problems == ()


@pytest.mark.parametrize("piece", [512, 700, 4096])
def test_pieces_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    write_tar(tmp_path / "a.tar", pair_members(0, 8, label=True), tarfile.PAX_FORMAT, folder="x")
    whole = indexed(tmp_path, to=str(tmp_path / "whole")).manifest
    monkeypatch.setattr(walking, "PIECE_BYTES", piece)
    in_pieces = indexed(tmp_path, to=str(tmp_path / "pieces")).manifest
    assert in_pieces.shards == whole.shards
    assert whole.shards[0].sha256 == hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()


def test_a_read_only_source_has_its_index_elsewhere(tmp_path: Path) -> None:
    source, to = tmp_path / "tars", tmp_path / "index"
    write_tar(source / "sub" / "0.tar", pair_members(0, 6))
    before = files_of(source)
    manifest = indexed(source, to=str(to)).manifest
    assert files_of(source) == before
    assert read_manifest(str(to)) == manifest
    assert manifest.shards_url == str(source)
    assert ours(manifest) == theirs(source)
    assert verify(str(to)).problems == ()
    document = json.loads((to / "manifest.json").read_text())
    assert (document["format_version"], document["shards_url"]) == (2, str(source))
    document["format_version"] = 3
    (to / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="format_version 3 is newer than this reader"):
        read_manifest(str(to))


def test_a_manifest_beside_its_tars_can_be_read_by_older_readers(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pair_members(0, 3))
    indexed(tmp_path)
    document = json.loads((tmp_path / "manifest.json").read_text())
    assert document["format_version"] == 1
    assert "shards_url" not in document


@pytest.mark.parametrize("shards_url", ["tars", "../tars", "http://x/tars", 3])
def test_tars_elsewhere_must_be_named_in_full(tmp_path: Path, shards_url: object) -> None:
    write_tar(tmp_path / "tars" / "0.tar", pair_members(0, 3))
    indexed(tmp_path / "tars", to=str(tmp_path / "to"))
    path = tmp_path / "to" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shards_url": shards_url}))
    with pytest.raises(DataError, match="neither an absolute path nor an s3:// URL"):
        read_manifest(str(tmp_path / "to"))


def test_a_folder_that_cannot_be_written_sends_the_index_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "0.tar", pair_members(0, 3))

    def refuse(url: str, data: object) -> None:
        raise StorageError("permission denied", where=url, fix="change the permissions, or use another place")

    monkeypatch.setattr(storage, "write", refuse)  # tests may run as root, whom no permission stops
    with pytest.raises(StorageError, match="--to"):
        indexed(tmp_path)


def cut(data: bytes, at: float) -> bytes:
    return data[: int(len(data) * at) // 512 * 512 + 100]


def joined(first: bytes, second: bytes) -> bytes:
    return first + second


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: cut(data, 0.2), r"cut off at byte \d+, within the member at byte \d+.*again"),
        (lambda data: data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512), "without an end of archive"),
        (lambda data: data[: 512 * 3 + 200], r"cut off at byte 1736, within a member's header"),
        (lambda data: b"", "an empty file"),
        (lambda data: b"<html>not found</html>" * 100, "not a tar"),
        (gzip.compress, r"compressed \(gzip\).*unpack"),
        (lambda data: joined(data, data), "continues after its end of archive.*several tars joined"),
        (lambda data: flipped(data, 512 + 1024 + 3), r"cut off|damaged tar header"),
    ],
)
def test_a_tar_that_cannot_be_used_is_named_with_what_to_do(
    tmp_path: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    good = write_tar(tmp_path / "good.tar", pair_members(0, 3))
    bad = write_tar(tmp_path / "bad.tar", [("9.txt", b"x" * 900), ("9.jpg", encoded(9))], tarfile.USTAR_FORMAT)
    bad.write_bytes(spoil(bad.read_bytes()))
    with pytest.raises(DataError, match=f"1 of 2 tars can't be used: bad.tar: .*({message})"):
        indexed(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    result = indexed(tmp_path, skip_bad=True)
    assert result.num_read == 0, "neither tar has changed since"
    assert [shard.name for shard in result.manifest.shards] == ["good.tar"]
    assert list(result.facts["left_out"]) == ["bad.tar"]
    good.unlink()
    with pytest.raises(DataError, match="no sample of 1 tars holds an image"):
        indexed(tmp_path, skip_bad=True)


def test_a_mended_tar_alone_is_read_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pair_members(0, 3))
    second = write_tar(tmp_path / "1.tar", pair_members(3, 3))
    whole = second.read_bytes()
    second.write_bytes(cut(whole, 0.2))
    with pytest.raises(DataError, match=r"1.tar: cut off"):
        indexed(tmp_path)
    second.write_bytes(whole)
    result = indexed(tmp_path)
    assert (result.num_read, result.changed, result.manifest.num_samples) == (1, ("1.tar",), 6)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("0.jpg", encoded(0)), ("1.jpg", encoded(1)), ("0.txt", b"zero"), ("1.txt", b"one")],
            r"key '0' comes a second time \(byte \d+, 0.txt\).*side by side.*tar --sort=name",
        ),
        ([("0.jpg", encoded(0)), ("0.JPG", encoded(1))], r"holds 0.jpg twice \(byte \d+\)"),
        (
            [("0.jpg", encoded(0)), ("1.jpg", encoded(1)), ("0.jpg", encoded(0))],
            r"key '0' comes a second time",
        ),
    ],
)
def test_members_that_others_would_read_as_other_samples_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=f"a.tar: {message}"):
        indexed(tmp_path)


def test_compressed_tars_are_told_not_passed_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pair_members(0, 3))
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    with pytest.raises(DataError, match=r"1.tar.gz: compressed \(gz\).*unpack it"):
        indexed(tmp_path)


def test_samples_without_image_and_with_several_are_counted(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar",
        [
            *pair_members(0, 3),
            ("README.txt", b"a note"),
            ("x.jpg", encoded(7)),
            ("x.png", encoded(8, "PNG")),
        ],
    )
    write_tar(tmp_path / "1.tar", [])
    manifest = indexed(tmp_path).manifest
    facts = manifest.info["indexed"]
    assert (manifest.num_samples, facts["without_image"], facts["several_images"]) == (5, 1, 1)
    assert facts["examples"] == {"several_images": "x in 0.tar", "without_image": "README in 0.tar"}
    assert facts["empty"] == ["1.tar"]
    assert ours(manifest) == theirs(tmp_path)
    problems = verify(str(tmp_path)).problems
    assert [problem.what for problem in problems] == ["0 images"], "such a slot counts nothing in training either"


def test_a_set_of_something_else_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.flac", b"sound"), ("0.txt", b"words"), ("1.image.jpg", encoded(1))])
    with pytest.raises(DataError, match=r"members are txt, flac, image.jpg.*000.image.jpg must be called 000.jpg"):
        indexed(tmp_path)


def test_labels_need_names_or_get_numbers(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pair_members(0, 6, label=True))
    assert indexed(tmp_path).manifest.classes == ("0", "1", "2", "3")
    names = ("cat", "dog", "hen", "owl")
    result = indexed(tmp_path, classes=names)
    assert (result.manifest.classes, result.num_read, result.already) == (names, 0, False)
    with pytest.raises(DataError, match=r"label 3 of 000000003.cls, and 3 classes"):
        indexed(tmp_path, classes=names[:3])


def test_labels_that_are_no_class_numbers_are_counted(tmp_path: Path) -> None:
    labels = [b"n01440764", b"-1", b"1" * 90, b" 2\n", b"123456789"]
    members = [pair for i, label in enumerate(labels) for pair in ((f"{i}.jpg", encoded(i)), (f"{i}.cls", label))]
    write_tar(tmp_path / "0.tar", members)
    manifest = indexed(tmp_path).manifest
    facts = manifest.info["indexed"]
    assert (facts["labels"], facts["bad_labels"], facts["examples"]["bad_labels"]) == (2, 3, "0.cls in 0.tar")
    assert manifest.classes == (), "a hundred million classes would be no classes"


def test_indexed_already_means_nothing_to_do(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pair_members(0, 3))
    assert not indexed(tmp_path).already
    before = files_of(tmp_path)
    again = indexed(tmp_path)
    assert (again.already, again.num_read) == (True, 0)
    assert files_of(tmp_path) == before


def test_what_changes_is_seen_by_size_or_time_and_alters_the_fingerprint(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", pair_members(10 * i, 3))
    first = indexed(tmp_path).manifest
    path = tmp_path / "1.tar"
    path.write_bytes(flipped(path.read_bytes(), 700))  # of the same size
    write_tar(tmp_path / "3.tar", pair_members(30, 2))
    (tmp_path / "2.tar").unlink()
    result = indexed(tmp_path)
    assert (result.num_read, result.changed, result.gone) == (2, ("1.tar",), ("2.tar",))
    assert [shard.name for shard in result.manifest.shards] == ["0.tar", "1.tar", "3.tar"]
    assert result.manifest.fingerprint != first.fingerprint
    assert not (tmp_path / "2.index.npy").exists()
    (tmp_path / "0.index.npy").unlink()
    assert indexed(tmp_path).num_read == 1, "an index that is gone is made anew"
    assert verify(str(tmp_path)).samples == 8


def test_the_fingerprint_is_of_the_bytes_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "0.tar", pair_members(0, 3))
    write_tar(tmp_path / "b" / "0.tar", pair_members(0, 3))
    assert indexed(tmp_path / "a").manifest.fingerprint == indexed(tmp_path / "b").manifest.fingerprint


def test_a_folder_of_training_and_validation_tars_makes_two_sets(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "x-train-0.tar", pair_members(0, 4))
    write_tar(tmp_path / "tars" / "x-val-0.tar", pair_members(4, 2))
    train = indexed(tmp_path / "tars", match="x-train-*.tar", to=str(tmp_path / "train")).manifest
    val = indexed(tmp_path / "tars", match="x-val-*.tar", to=str(tmp_path / "val")).manifest
    assert (train.num_samples, val.num_samples) == (4, 2)
    with pytest.raises(ConfigError, match=r"holds the index of .*x-train.*--to"):
        indexed(tmp_path / "tars", match="x-val-*.tar", to=str(tmp_path / "train"))
    with pytest.raises(DataError, match=r"no tars matching y-\*"):
        indexed(tmp_path / "tars", match="y-*", to=str(tmp_path / "y"))


def test_a_prepared_data_set_is_one_already(tmp_path: Path) -> None:
    build(settings(write_pairs(tmp_path / "raw", 8), tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"already is a data set of 8 samples.*data.train"):
        indexed(tmp_path / "out" / "train")
    with pytest.raises(DataError, match=r"has data sets below it: train"):
        indexed(tmp_path / "out", to=str(tmp_path / "to"))
    write_tar(tmp_path / "tars" / "0.tar", pair_members(0, 3))
    with pytest.raises(ConfigError, match=r"already is a data set.*another folder"):
        indexed(tmp_path / "tars", to=str(tmp_path / "out" / "train"))


def test_a_tar_alone_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a tar, not a folder"):
        indexed(write_tar(tmp_path / "0.tar", pair_members(0, 3)))


def test_a_stop_keeps_what_is_done_and_the_end_is_the_same(tmp_path: Path) -> None:
    source = tmp_path / "tars"
    for i in range(12):
        write_tar(source / f"{i:02d}.tar", pair_members(10 * i, 3))
    whole = tmp_path / "whole"
    indexed(source, to=str(whole))
    asked = itertools.count()
    with pytest.raises(Stopped):
        index_tars(IndexOptions(str(source), str(tmp_path / "parts"), readers=2), stop=lambda: next(asked) > 12)
    assert not (tmp_path / "parts" / "manifest.json").exists()
    result = indexed(source, to=str(tmp_path / "parts"))
    assert 0 < result.num_read < 12
    assert files_of(tmp_path / "parts") == files_of(whole)


def test_a_flipped_byte_is_found_by_verify(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", sa1b_members(0, 4), folder="./")
    manifest = indexed(tmp_path).manifest
    assert verify(str(tmp_path)).problems == ()
    assert [(s["key"], s["width"], s["num_annotations"]) for s in first_samples(manifest, 2)] == [
        ("./sa_0", 48, 2),
        ("./sa_1", 48, 2),
    ]
    start = int(read_index(manifest, manifest.shards[0])[1])
    path.write_bytes(flipped(path.read_bytes(), start + 512))
    whats = [problem.what for problem in verify(str(tmp_path)).problems]
    assert any("sha256" in what for what in whats)
    assert any("image can't be read" in what for what in whats)


def test_records_are_written_in_time_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pair_members(0, 3))
    indexed(tmp_path)
    place = tmp_path / "_index" / "tars.json"
    assert [tar["name"] for tar in json.loads(place.read_text())["tars"]] == ["0.tar"]
    assert not list((tmp_path / "_index" / "journal").iterdir())
    place.write_text("{")
    with pytest.raises(DataError, match=r"damaged records.*delete it"):
        indexed(tmp_path)


def test_no_more_than_two_pieces_of_a_tar_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "0.tar", [(f"{i}.jpg", os.urandom(50_000)) for i in range(40)])
    monkeypatch.setattr(walking, "PIECE_BYTES", 8192)
    held: list[int] = []
    take = walking._Stream.take

    def watched(self: walking._Stream, start: int, stop: int) -> bytes:
        data = take(self, start, stop)
        held.append(len(self._held))
        return data

    monkeypatch.setattr(walking._Stream, "take", watched)
    indexed(tmp_path)
    assert held
    assert max(held) <= 2 * 8192


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "SAY_EVERY_S", 0.0)
    write_tar(tmp_path / "0.tar", pair_members(0, 3))
    said: list[str] = []
    index_tars(IndexOptions(str(tmp_path)), say=said.append)
    assert any("of 1 tars" in line and "to go" in line for line in said)


@given(at=st.integers(0, 6000), value=st.integers(0, 255), length=st.integers(0, 12_000))
@hypothesis_settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_named_or_harmless(tmp_path: Path, at: int, value: int, length: int) -> None:
    path = write_tar(tmp_path / "0.tar", [("0.txt", b"x" * 600), ("0.cls", b"1"), ("1.txt", b"y"), ("1.cls", b"2")])
    data = bytearray(path.read_bytes())
    data[at] = value
    path.write_bytes(data[:length])
    record, offsets = walking.walk("0.tar", next(storage.entries(str(tmp_path))))
    assert (record.problem is None) == bool(record.sha256)
    assert len(offsets) == record.num_samples + 1
    for start, stop in itertools.pairwise(offsets.tolist()):
        assert parse_sample(memoryview(data)[start:stop], 0).members
    if record.problem is None:
        assert record.num_samples == 2 or at < 512 * 10
    path.unlink()
