"""Sources other than tables: folders, class folders, other people's tars, COCO, SA-1B."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from pycocotools import mask as coco_mask

from data_prep.build import build
from data_prep.config import PrepConfig
from pipeline.config import validate
from pipeline.data.manifest import read_manifest
from pipeline.errors import DataError
from tests.support.prep_cases import encoded, samples, sidecar


def built(output: Path, source: dict[str, Any], **more: Any) -> dict[str, dict[str, bytes]]:
    document = {"output": str(output), "source": source, "shard": {"samples": 8}, "ray": {"tasks": 0}, **more}
    build(validate(PrepConfig, document, where="test"))
    return samples(output / "train")


def write_tar(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1700000000.5  # as webdataset's writer gives it, which makes PAX headers
            tar.addfile(info, io.BytesIO(data))


def test_images_in_folders_take_the_texts_beside_them(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for i in range(12):
        (raw / f"part{i % 2}").mkdir(parents=True, exist_ok=True)
        (raw / f"part{i % 2}" / f"{i}.a.JPG").write_bytes(encoded(i))
        (raw / f"part{i % 2}" / f"{i}.a.txt").write_text(f"caption of {i}\n")
    (raw / "part0" / "readme.md").write_text("not an image")
    result = built(tmp_path / "out", {"type": "folder", "url": str(raw)})
    assert sorted(m["txt"] for m in result.values()) == sorted(f"caption of {i}".encode() for i in range(12))
    (raw / "part0" / "0.a.txt").unlink()
    again = built(tmp_path / "again", {"type": "folder", "url": str(raw)})
    assert len(again) == 11
    assert [row["reason"] for row in sidecar(tmp_path / "again" / "train") if row["reason"]] == ["caption_empty"]


def test_captions_in_json_beside_the_image_may_be_several(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for i in range(3):
        (tmp_path / "raw" / f"{i}.png").write_bytes(encoded(i, "PNG"))
        (tmp_path / "raw" / f"{i}.json").write_text(json.dumps({"text": [f"one {i}", "", f"two {i}"]}))
    source = {"type": "folder", "url": str(tmp_path / "raw"), "captions": "json", "caption_field": "text"}
    for i, members in enumerate(dict(sorted(built(tmp_path / "out", source).items())).values()):
        assert members["txt"] == f"one {i}".encode()
        assert json.loads(members["json"])["captions"] == [f"one {i}", f"two {i}"]


def test_class_folders_label_by_name(tmp_path: Path) -> None:
    for i in range(12):
        folder = tmp_path / "raw" / ("n02", "n01", "n10")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpeg").write_bytes(encoded(i))
    result = built(tmp_path / "out", {"type": "class_folders", "url": str(tmp_path / "raw")})
    assert read_manifest(str(tmp_path / "out" / "train")).classes == ("n01", "n02", "n10")
    for members in result.values():
        folder = Path(json.loads(members["json"])["url"]).parent.name
        assert int(members["cls"]) == ["n01", "n02", "n10"].index(folder)


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_img2datasets_tars_are_sharded_anew(tmp_path: Path, kind: int) -> None:
    """Its layout: {shard}{row}.jpg/txt/json, tables and statistics beside the tars."""
    images = {}
    for shard in range(2):
        members = {}
        for i in range(10):
            key = f"{shard:05d}{i:04d}"
            images[key] = encoded(shard * 10 + i)
            facts = {"caption": f"c {key}", "url": f"http://x/{key}", "key": key, "status": "success", "uid": f"u{key}"}
            members |= {f"{key}.jpg": images[key], f"{key}.txt": f"c {key}".encode()}
            members[f"{key}.json"] = json.dumps(facts).encode()
        write_tar(tmp_path / "raw" / f"{shard:05d}.tar", members, kind)
        (tmp_path / "raw" / f"{shard:05d}_stats.json").write_text("{}")
        pa.parquet.write_table(pa.table({"key": list(images)}), tmp_path / "raw" / f"{shard:05d}.parquet")
    source = {"type": "tars", "url": str(tmp_path / "raw"), "keep_fields": ["uid"]}
    result = built(tmp_path / "out", source, image={"format": "keep"})
    assert sorted(m["txt"].decode() for m in result.values()) == sorted(f"c {key}" for key in images)
    for members in result.values():
        key = members["txt"].decode().removeprefix("c ")
        assert members["jpg"] == images[key], "an image that needs no change passes byte for byte"
        assert json.loads(members["json"])["uid"] == f"u{key}"


def test_datacomps_metadata_and_its_shards_are_read(tmp_path: Path) -> None:
    """DataComp's tables name `url, text, uid` and carry scores; its shards hold keys of eight digits and uids."""
    (tmp_path / "raw" / "images").mkdir(parents=True)
    for i in range(8):
        (tmp_path / "raw" / "images" / f"{i}.jpg").write_bytes(encoded(i))
    table = pa.table(
        {
            "uid": [f"{i:032x}" for i in range(8)],
            "url": [f"images/{i}.jpg" for i in range(8)],
            "text": [f"t{i}" for i in range(8)],
            "clip_l14_similarity_score": [0.1 * i for i in range(8)],
            "face_bboxes": [[[0.1, 0.2, 0.3, 0.4]]] * 8,
        }
    )
    pa.parquet.write_table(table, tmp_path / "raw" / "00.parquet")
    keep = ["uid", "clip_l14_similarity_score", "face_bboxes"]
    source = {"type": "table", "url": str(tmp_path / "raw" / "00.parquet"), "caption_column": "text"}
    result = built(tmp_path / "out", source | {"keep_columns": keep})
    for key, members in result.items():
        facts = json.loads(members["json"])
        assert facts["uid"] == f"{int(key):032x}"
        assert facts["face_bboxes"] == [[0.1, 0.2, 0.3, 0.4]]
    assert json.loads(sidecar(tmp_path / "out" / "train")[0]["extra"]).keys() == set(keep)
    members = {}
    for i in range(5):
        members |= {f"{i:08d}.jpg": encoded(i), f"{i:08d}.json": json.dumps({"uid": f"{i:032x}"}).encode()}
        members |= {f"{i:08d}.txt": f"t{i}".encode()}
    write_tar(tmp_path / "shards" / "00000000.tar", members)
    assert len(built(tmp_path / "again", {"type": "tars", "url": str(tmp_path / "shards")})) == 5


def test_a_truncated_tar_is_no_source(tmp_path: Path) -> None:
    """As img2dataset leaves them when it is killed; reading on would lose the rest unseen."""
    write_tar(tmp_path / "raw" / "00000.tar", {f"{i}.{e}": encoded(i) for i in range(4) for e in ("jpg", "txt")})
    whole = (tmp_path / "raw" / "00000.tar").read_bytes()
    (tmp_path / "raw" / "00000.tar").write_bytes(whole[: len(whole) // 2 // 512 * 512 - 100])
    with pytest.raises(DataError, match="not a complete tar"):
        built(tmp_path / "out", {"type": "tars", "url": str(tmp_path / "raw"), "captions": "none"})


def square(image_id: int, number: int, category: int) -> dict[str, Any]:
    box = [4, 2, 20, 10]
    polygon = [4, 2, 24, 2, 24, 12, 4, 12]
    return {
        "id": number, "image_id": image_id, "category_id": category, "bbox": box, "area": 200, "iscrowd": 0,
        "segmentation": [polygon],
    }  # fmt: skip


def test_coco_instances_with_captions(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in (9, 25, 30):
        (tmp_path / "images" / f"{i:012d}.jpg").write_bytes(encoded(i))
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 48, "height": 32} for i in (25, 9, 30)]
    instances = {
        "images": images,
        "annotations": [square(9, 1, 18), square(9, 2, 3), square(25, 3, 3)],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
    }
    texts = [{"image_id": i, "id": i, "caption": f"photo {i}"} for i in (9, 25, 30)] + [
        {"image_id": 9, "id": 99, "caption": "a dog and a car"}
    ]
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": texts}))
    source = {
        "type": "coco",
        "url": str(tmp_path / "instances.json"),
        "images": str(tmp_path / "images"),
        "captions": str(tmp_path / "captions.json"),
    }
    result = built(tmp_path / "out", source)
    assert read_manifest(str(tmp_path / "out" / "train")).classes == ("car", "dog")
    facts = {f["image_id"]: f for f in (json.loads(m["json"]) for m in result.values())}
    assert sorted(facts) == [9, 25, 30]
    assert [a["category_id"] for a in facts[9]["annotations"]] == [1, 0]
    assert facts[9]["captions"] == ["photo 9", "a dog and a car"]
    assert facts[30]["annotations"] == []
    mask = facts[9]["annotations"][0]["segmentation"]
    assert coco_mask.area({"size": mask["size"], "counts": mask["counts"].encode()}) == 200


def test_sa1bs_tars_keep_their_masks_and_scores(tmp_path: Path) -> None:
    mask = np.zeros((32, 48), np.uint8, order="F")
    mask[4:20, 6:30] = 1
    rle = coco_mask.encode(mask)
    annotation = {
        "id": 77, "segmentation": {"size": [32, 48], "counts": rle["counts"].decode()}, "bbox": [6, 4, 24, 16],
        "area": 384, "predicted_iou": 0.93, "stability_score": 0.97, "crop_box": [0, 0, 48, 32],
        "point_coords": [[10, 10]],
    }  # fmt: skip
    members = {}
    for i in range(6):
        facts = {"image": {"image_id": i, "width": 48, "height": 32}, "annotations": [annotation]}
        members |= {f"./sa_{i}.jpg": encoded(i), f"./sa_{i}.json": json.dumps(facts).encode()}
    write_tar(tmp_path / "raw" / "sa_000000.tar", members, tarfile.GNU_FORMAT)
    source = {"type": "tars", "url": str(tmp_path / "raw"), "captions": "none", "annotations": True}
    result = built(tmp_path / "out", source | {"keep_fields": ["image"]}, image={"resize": "keep_ratio", "size": 16})
    assert len(result) == 6
    for members_found in result.values():
        facts = json.loads(members_found["json"])
        (moved,) = facts["annotations"]
        assert (moved["predicted_iou"], moved["stability_score"], moved["id"]) == (0.93, 0.97, 77)
        assert moved["segmentation"]["size"] == [16, 24]
        assert moved["bbox"] == [3, 2, 12, 8]


def test_several_captions_come_from_lists_or_columns(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for i in range(4):
        (tmp_path / "raw" / f"{i}.jpg").write_bytes(encoded(i))
    urls = [f"{i}.jpg" for i in range(4)]
    lists = pa.table({"url": urls, "caption": [["a", "b"], ["", "c"], [], None]})
    pa.parquet.write_table(lists, tmp_path / "raw" / "lists.parquet")
    result = built(tmp_path / "out", {"type": "table", "url": str(tmp_path / "raw" / "lists.parquet")}, max_failed=0.6)
    assert {k: m["txt"] for k, m in result.items()} == {"000000000000": b"a", "000000000001": b"c"}
    lines = [{"url": "0.jpg", "caption": ["x", "y"]}, {"url": "1.jpg", "caption": '["no", "list"]'}]
    (tmp_path / "raw" / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = built(tmp_path / "lines", {"type": "table", "url": str(tmp_path / "raw" / "t.jsonl")})
    assert {k: m["txt"] for k, m in result.items()} == {"000000000000": b"x", "000000000001": b'["no", "list"]'}
    columns = pa.table({"url": urls, "alt": ["p"] * 4, "title": ["q", None, "r", ""]})
    pa.parquet.write_table(columns, tmp_path / "raw" / "columns.parquet")
    source = {"type": "table", "url": str(tmp_path / "raw" / "columns.parquet"), "caption_column": ["title", "alt"]}
    result = dict(sorted(built(tmp_path / "two", source).items()))
    assert [m["txt"] for m in result.values()] == [b"q", b"p", b"r", b"p"]
