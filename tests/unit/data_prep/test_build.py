import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.build import build
from pipeline.data.manifest import read_index, read_manifest
from pipeline.errors import ConfigError, DataError, Stopped
from tests.support.prep_cases import encoded, hashes, reasons, samples, settings, sidecar, write_pairs, write_table


def test_every_input_becomes_one_sample(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 20)
    report = build(settings(table, tmp_path / "out"))
    assert (report.inputs, report.written, report.failed) == (20, 20, {})
    stored = samples(tmp_path / "out" / "train")
    assert sorted(stored) == [f"{i:012d}" for i in range(20)]
    for key, members in stored.items():
        assert list(members) == ["jpg", "txt", "json"]
        assert members["txt"].decode() == f"a picture of {int(key)}"
        facts = json.loads(members["json"])
        image = Image.open(io.BytesIO(members["jpg"]))
        assert (facts["width"], facts["height"]) == image.size
        assert facts["key"] == key
        assert facts["status"] == "success"


def test_manifest_index_and_sidecars_tell_the_same(tmp_path: Path) -> None:
    build(settings(write_pairs(tmp_path / "raw", 20), tmp_path / "out"))
    folder = tmp_path / "out" / "train"
    manifest = read_manifest(str(folder))
    assert [shard.name for shard in manifest.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [shard.num_samples for shard in manifest.shards] == [6, 7, 7]
    assert json.loads((folder / "sizes.json").read_text()) == {s.name: s.num_samples for s in manifest.shards}
    for shard in manifest.shards:
        assert read_index(manifest, shard)[-1] + 1024 == shard.size_bytes == (folder / shard.name).stat().st_size
    rows = sidecar(folder)
    assert [row["key"] for row in rows] == list(samples(folder))
    stats = json.loads((folder / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (6, 6, {"success": 6})


def test_two_builds_are_equal_to_the_byte_and_the_seed_shuffles(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 20)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(settings(table, tmp_path / name, seed=seed))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    orders = [list(samples(tmp_path / name / "train")) for name in ("a", "c")]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != sorted(orders[0])


def test_failures_are_counted_by_reason_and_keep_their_row(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 30)
    images = tmp_path / "raw" / "images"
    (images / "0.jpg").unlink()
    (images / "1.png").write_bytes(b"no image")
    (images / "2.webp").write_bytes(b"")
    (images / "3.jpg").write_bytes((images / "3.jpg").read_bytes()[:400])
    report = build(settings(table, tmp_path / "out"))
    expected = {"not_found": 1, "empty_file": 1, "not_an_image": 1, "image_damaged": 1}
    assert report.failed == expected == reasons(tmp_path / "out")
    assert report.inputs == 30 == report.written + 4
    rows = sidecar(tmp_path / "out" / "train")
    assert Counter(row["reason"] for row in rows) == {"": 26, **expected}
    statuses = {row["reason"]: row["status"] for row in rows}
    assert statuses["not_found"] == "failed_to_download"
    assert statuses["not_an_image"] == "failed_to_resize"
    assert sorted(row["position"] for row in rows) == list(range(30))
    assert len(samples(tmp_path / "out" / "train")) == 26


def test_a_shard_whose_inputs_all_fail_leaves_no_gap_in_the_numbers(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 20)
    build(settings(table, tmp_path / "whole", shard={"samples": 4}))
    lost = [r["position"] for r in sidecar(tmp_path / "whole" / "train") if r["url"]][4:8]  # the second shard's
    for position in lost:
        next((tmp_path / "raw" / "images").glob(f"{position}.*")).unlink()
    for name in ("out", "again"):
        report = build(settings(table, tmp_path / name, shard={"samples": 4}, max_failed=0.5))
        manifest = read_manifest(str(tmp_path / name / "train"))
        assert [shard.name for shard in manifest.shards] == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
        assert sorted(path.name for path in (tmp_path / name / "train").glob("*.tar")) == [
            s.name for s in manifest.shards
        ]
        assert (report.written, report.failed) == (16, {"not_found": 4})
        assert sorted(row["position"] for row in sidecar(tmp_path / name / "train")) == list(range(20))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "again")


def test_a_finished_build_is_only_told_again(tmp_path: Path) -> None:
    config = settings(write_pairs(tmp_path / "raw", 20), tmp_path / "out")
    first = build(config)
    before = hashes(tmp_path / "out")
    for path in (tmp_path / "raw" / "images").iterdir():
        path.unlink()
    again = build(config)
    assert again.document() == first.document()
    assert hashes(tmp_path / "out") == before


def test_a_stopped_build_goes_on_where_it_was(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 40)
    build(settings(table, tmp_path / "whole"))
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        build(settings(table, tmp_path / "out"), stop=lambda: next(asked))
    assert not list((tmp_path / "out").rglob("manifest.json"))
    report = build(settings(table, tmp_path / "out"))
    assert report.resumed_partitions == 2
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": {"size": 20}}, r"image\.size: 256 -> 20"),
        ({"seed": 3}, "seed: 0 -> 3"),
        ({"source": {"caption_column": None}}, r"source\.caption_column: 'caption' -> None"),
    ],
)
def test_a_build_goes_on_with_the_same_settings_only(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    table = write_pairs(tmp_path / "raw", 6)
    build(settings(table, tmp_path / "out"))
    before = hashes(tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        build(settings(table, tmp_path / "out", **changed))
    assert hashes(tmp_path / "out") == before


def test_a_build_goes_on_with_the_same_inputs_only(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 6)
    build(settings(table, tmp_path / "out"))
    write_pairs(tmp_path / "raw", 5)
    with pytest.raises(ConfigError, match="number of inputs: 6 -> 5"):
        build(settings(table, tmp_path / "out"))
    urls = [f"images/{i}.jpg" for i in range(6)]
    write_table(table, url=urls, caption=["changed"] * 6)
    with pytest.raises(ConfigError, match="the source's content within its first 6 inputs"):
        build(settings(table, tmp_path / "out"))


def test_settings_of_the_run_may_change(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 6)
    first = build(settings(table, tmp_path / "out"))
    again = build(settings(table, tmp_path / "out", fetch={"concurrency": 2}, max_failed=0.5, name="other"))
    assert again.fingerprint == first.fingerprint


def test_splits_by_column_have_a_folder_each(tmp_path: Path) -> None:
    splits = ["train"] * 15 + ["heldout"] * 5
    table = write_pairs(tmp_path / "raw", 20, split=splits)
    report = build(settings(table, tmp_path / "out", source={"split_column": "split"}))
    assert {name: count.samples for name, count in report.splits.items()} == {"heldout": 5, "train": 15}
    assert sorted(samples(tmp_path / "out" / "heldout")) == [f"{i:012d}" for i in range(15, 20)]


def test_equal_images_never_lie_in_two_splits(tmp_path: Path) -> None:
    images = tmp_path / "raw" / "images"
    images.mkdir(parents=True)
    for i in range(60):
        (images / f"{i}.jpg").write_bytes(encoded(i % 20))
    table = write_table(tmp_path / "raw" / "t.parquet", url=[f"images/{i}.jpg" for i in range(60)], caption=["x"] * 60)
    shares = {"train": 0.6, "heldout": 0.4}
    build(settings(table, tmp_path / "out", splits={"shares": shares}))
    by_split = {name: {row["sha256"] for row in sidecar(tmp_path / "out" / name)} for name in shares}
    assert not by_split["train"] & by_split["heldout"]
    assert len(by_split["train"] | by_split["heldout"]) == 20
    build(settings(table, tmp_path / "by_url", splits={"shares": shares, "by": "url"}))
    by_split = {name: {row["sha256"] for row in sidecar(tmp_path / "by_url" / name)} for name in shares}
    assert by_split["train"] & by_split["heldout"], "by URL this table leaks, so the test above can fail"


def test_an_image_that_changes_between_split_and_write_is_not_written(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 40)
    config = settings(table, tmp_path / "out", splits={"shares": {"train": 0.5, "heldout": 0.5}})
    with pytest.raises(Stopped):
        build(config, stop=lambda: (tmp_path / "out" / "_prep" / "scan").exists())
    (tmp_path / "raw" / "images" / "3.jpg").write_bytes(encoded(99))
    assert build(config).failed == {"changed_while_reading": 1}


def test_labels_become_class_members(tmp_path: Path) -> None:
    labels = ["cat", "dog", "1", "0", "2", "-1", "fish", None, "1.0", *["dog"] * 21]
    table = write_pairs(tmp_path / "raw", 30, label=labels)
    source = {"label_column": "label", "classes": ["cat", "dog"]}
    report = build(settings(table, tmp_path / "out", source=source))
    assert report.failed == {"label_invalid": 4}
    assert read_manifest(str(tmp_path / "out" / "train")).classes == ("cat", "dog")
    labels = {int(key): int(members["cls"]) for key, members in samples(tmp_path / "out" / "train").items()}
    assert labels == {0: 0, 1: 1, 2: 1, 3: 0, 8: 1, **dict.fromkeys(range(9, 30), 1)}


def test_annotations_follow_the_image_into_the_json(tmp_path: Path) -> None:
    boxes = [json.dumps([{"bbox": [4, 2, 20, 10], "category_id": 1}])] * 6
    table = write_pairs(tmp_path / "raw", 6, objects=boxes)
    build(settings(table, tmp_path / "out", source={"annotations_column": "objects"}, image={"size": 15}))
    for members in samples(tmp_path / "out" / "train").values():
        facts = json.loads(members["json"])
        x = facts["width"] / facts["original_width"]
        y = facts["height"] / facts["original_height"]
        expected = [4 * x, 2 * y, 20 * x, 10 * y]
        np.testing.assert_allclose(facts["annotations"][0]["bbox"], expected, atol=0.01)


def test_images_without_captions_have_no_text(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 4)
    build(settings(table, tmp_path / "out", source={"caption_column": None}))
    assert all(list(members) == ["jpg", "json"] for members in samples(tmp_path / "out" / "train").values())


def test_one_unusable_caption_costs_one_sample(tmp_path: Path) -> None:
    write_pairs(tmp_path / "raw", 6)
    lines = "".join(f"images/{i}.{('jpg', 'png', 'webp')[i % 3]},{'' if i == 2 else f'n{i}'}\n" for i in range(6))
    table = tmp_path / "raw" / "pairs.csv"
    table.write_bytes(b"url,caption\n" + lines.encode() + b"images/0.jpg,caf\xe9\n")
    report = build(settings(table, tmp_path / "out", max_failed=0.5))
    assert report.failed == {"caption_empty": 1, "caption_not_text": 1}


def test_too_many_failures_leave_no_manifest_and_can_be_allowed(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 20)
    for i in range(5, 15):
        next((tmp_path / "raw" / "images").glob(f"{i}.*")).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"10 of 20 inputs failed: 10 not_an_image \(e\.g\. 'images/") as error:
        build(settings(table, tmp_path / "out"))
    assert "max_failed" in error.value.fix
    assert not list((tmp_path / "out").rglob("manifest.json"))
    report = build(settings(table, tmp_path / "out", max_failed=0.5))
    assert (report.written, report.failed) == (10, {"not_an_image": 10})


def test_progress_ends_with_all_inputs(tmp_path: Path) -> None:
    events = []
    build(settings(write_pairs(tmp_path / "raw", 20), tmp_path / "out"), progress=events.append)
    written = [event for event in events if event.phase == "write"]
    assert [event.done for event in written] == [6, 13, 20]
    assert "20 of 20 inputs done: 20 written, 0 filtered, 0 failed" in str(written[-1])
    assert (events[-1].phase, events[-1].done, events[-1].total) == ("publish", 3, 3)


@pytest.mark.parametrize("name", ["_prep/build.json", "prep.json"])
def test_what_another_version_or_damage_left_is_told(tmp_path: Path, name: str) -> None:
    config = settings(write_pairs(tmp_path / "raw", 8), tmp_path / "out")
    build(config)
    place = tmp_path / "out" / name
    document = json.loads(place.read_text())
    for content, words in (
        (json.dumps(document | {"format_version": 1}), "of format_version 1, but this version reads only"),
        ('{"format"', "not an? (build|account)"),
    ):
        place.write_text(content)
        with pytest.raises(DataError, match=words) as error:
            build(config)
        assert name in str(error.value)
