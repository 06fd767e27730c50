"""Appending to a data set, trying refused inputs again, and what stays as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.build import build
from data_prep.shards.verify import verify
from pipeline.data.manifest import read_manifest
from pipeline.errors import ConfigError, Stopped
from tests.support.prep_cases import encoded, hashes, samples, settings, sidecar, write_table


def grow(folder: Path, count: int, missing: tuple[int, ...] = ()) -> Path:
    """A table of `count` images of which some aren't there."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / "images" / f"{i}.jpg"
        if i in missing:
            path.unlink(missing_ok=True)
        elif not path.exists():
            path.write_bytes(encoded(i))
    urls = [f"images/{i}.jpg" for i in range(count)]
    return write_table(folder / "pairs.parquet", url=urls, caption=[f"picture {i}" for i in range(count)])


def positions(folder: Path) -> list[int]:
    return sorted(row["position"] for row in sidecar(folder))


def tars(folder: Path) -> dict[str, str]:
    return {name: sha for name, sha in hashes(folder).items() if name.endswith((".tar", ".npy"))}


def test_appended_inputs_leave_old_shards_as_they_are(tmp_path: Path) -> None:
    build(settings(grow(tmp_path / "raw", 20), tmp_path / "out"))
    before = tars(tmp_path / "out")
    old = read_manifest(str(tmp_path / "out" / "train"))
    report = build(settings(grow(tmp_path / "raw", 33), tmp_path / "out"))
    assert (report.inputs, report.written) == (33, 33)
    after = tars(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    new = read_manifest(str(tmp_path / "out" / "train"))
    assert new.shards[: len(old.shards)] == old.shards
    assert [shard.name for shard in new.shards] == [f"{i:05d}.tar" for i in range(len(new.shards))]
    assert new.fingerprint != old.fingerprint
    assert positions(tmp_path / "out" / "train") == list(range(33))
    assert sorted(samples(tmp_path / "out" / "train")) == [f"{i:012d}" for i in range(33)]
    assert verify(str(tmp_path / "out")).problems == ()


def test_what_is_appended_to_an_unfinished_build_waits_its_turn(tmp_path: Path) -> None:
    asked: Iterator[bool] = iter([False, False, True])
    with pytest.raises(Stopped):
        build(settings(grow(tmp_path / "raw", 40), tmp_path / "out"), stop=lambda: next(asked))
    build(settings(grow(tmp_path / "raw", 50), tmp_path / "out"))
    build(settings(grow(tmp_path / "raw", 40), tmp_path / "whole"))
    build(settings(grow(tmp_path / "raw", 50), tmp_path / "whole"))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_shard_that_failed_whole_leaves_its_number_to_the_next_segment(tmp_path: Path) -> None:
    table = grow(tmp_path / "raw", 16, missing=tuple(range(16)))
    options: dict[str, Any] = {"max_failed": 1.0, "shard": {"samples": 4}}
    (tmp_path / "raw" / "images" / "3.jpg").write_bytes(encoded(3))
    build(settings(table, tmp_path / "out", **options))
    build(settings(grow(tmp_path / "raw", 24, missing=(5,)), tmp_path / "out", **options))
    manifest = read_manifest(str(tmp_path / "out" / "train"))
    assert [shard.name for shard in manifest.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert positions(tmp_path / "out" / "train") == list(range(24))


def test_refused_inputs_are_tried_again_by_reason(tmp_path: Path) -> None:
    table = grow(tmp_path / "raw", 40, missing=(3, 8, 30))
    (tmp_path / "raw" / "images" / "11.jpg").write_bytes(b"no image")
    first = build(settings(table, tmp_path / "out"))
    assert first.failed == {"not_found": 3, "not_an_image": 1}
    before = tars(tmp_path / "out")
    for i in (3, 30):
        (tmp_path / "raw" / "images" / f"{i}.jpg").write_bytes(encoded(i))
    (tmp_path / "raw" / "images" / "11.jpg").write_bytes(encoded(11))
    report = build(settings(table, tmp_path / "out"), retry_reasons=["not_found"])
    assert (report.inputs, report.written) == (40, 38)
    assert report.failed == {"not_found": 1, "not_an_image": 1}
    after = tars(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert positions(tmp_path / "out" / "train") == list(range(40))
    assert {"000000000003", "000000000030"} <= set(samples(tmp_path / "out" / "train"))
    assert verify(str(tmp_path / "out")).problems == ()

    again = build(settings(table, tmp_path / "out"), retry_reasons=["not_found", "not_an_image"])
    assert (again.written, again.failed) == (39, {"not_found": 1})
    assert positions(tmp_path / "out" / "train") == list(range(40))
    # The account is the same when it is only told.
    assert build(settings(table, tmp_path / "out")).document() == again.document()


def test_a_retry_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    lost = tuple(range(0, 40, 2))
    table = grow(tmp_path / "raw", 40, missing=lost)
    options: dict[str, Any] = {"max_failed": 0.9, "shard": {"samples": 4}}
    build(settings(table, tmp_path / "out", **options))
    grow(tmp_path / "raw", 40)
    asked: Iterator[bool] = iter([False, False, True])
    with pytest.raises(Stopped):
        build(settings(table, tmp_path / "out", **options), retry_reasons=["not_found"], stop=lambda: next(asked))
    report = build(settings(table, tmp_path / "out", **options))
    assert (report.inputs, report.written, report.failed) == (40, 40, {})
    assert positions(tmp_path / "out" / "train") == list(range(40))
    assert verify(str(tmp_path / "out")).problems == ()


def test_a_retry_names_a_reason_that_exists(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'timeout'"):
        build(settings(grow(tmp_path / "raw", 4), tmp_path / "out"), retry_reasons=["timeuot"])


def test_inputs_appended_after_a_retry_come_last(tmp_path: Path) -> None:
    build(settings(grow(tmp_path / "raw", 20, missing=(3,)), tmp_path / "out"))
    table = grow(tmp_path / "raw", 20)
    build(settings(table, tmp_path / "out"), retry_reasons=["not_found"])
    before = tars(tmp_path / "out")
    report = build(settings(grow(tmp_path / "raw", 25), tmp_path / "out"))
    assert (report.inputs, report.written) == (25, 25)
    assert {name: tars(tmp_path / "out")[name] for name in before} == before
    assert positions(tmp_path / "out" / "train") == list(range(25))


def test_nothing_that_served_the_build_alone_stays(tmp_path: Path) -> None:
    build(settings(grow(tmp_path / "raw", 20), tmp_path / "out"))
    folders = sorted(path.relative_to(tmp_path / "out" / "_prep").parts[0] for path in tmp_path.rglob("_prep/*"))
    assert folders == ["attempts", "build.json", "partitions", "segments", "staged"]
    assert not list((tmp_path / "out" / "_prep" / "staged").iterdir())
    assert json.loads((tmp_path / "out" / "prep.json").read_text())["segments"] == 1
