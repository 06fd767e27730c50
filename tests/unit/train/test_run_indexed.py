"""Training straight from tars that were only indexed: SA-1B's with stage sam, img2dataset's with mae and flip."""

from __future__ import annotations

import itertools
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.indexing.index import IndexOptions, index_tars
from pipeline.data.images.transforms import ImageExample, TrainImage
from pipeline.data.instances import decode_masks
from pipeline.data.loader import Cursor, Loader
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.run_dir import RunDir
from pipeline.stages.base import DataFacts
from tests.support import flip_cases, run_cases, sam_batches, train_cases
from tests.support.loaders import loader_of, swept
from tests.support.process_group import ProcessGroup
from tests.support.tar_sets import pair_members, sa1b_members, write_tar
from tests.unit.data.conftest import numbered, write_data_set


@pytest.fixture(scope="module")
def sa1b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images with two objects each, in tars as Meta's downloads have them."""
    folder = tmp_path_factory.mktemp("sa1b")
    write_tar(folder / "tars" / "sa_000000.tar", sa1b_members(0, 14), tarfile.GNU_FORMAT, folder="./")
    write_tar(folder / "tars" / "sa_000020.tar", sa1b_members(14, 10), tarfile.GNU_FORMAT, folder="./")
    index_tars(IndexOptions(str(folder / "tars"), str(folder / "index")))
    return folder


def sam_document(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    options = {"model": sam_batches.MODEL, "sam": sam_batches.SAM, "clicks": 1, "repeats": 1, "max_objects": 2}
    settings = {
        "stage": "sam",
        "options": options,
        "data.train": str(folder / "index"),
        "data.evaluate": {"seen": str(folder / "index")},
        "data.global_batch": 8,
        "length_samples": 16,
        "engine.zero_stage": 0,
        "checkpoint.every_samples": 8,
    }
    return train_cases.document(folder, name, **(settings | changes))


def test_segment_anything_trains_and_resumes_on_raw_tars(sa1b: Path, one: ProcessGroup) -> None:
    whole = one.run(run_cases.run, sam_document(sa1b, "whole"))[0]
    assert whole[:3] == ("done", 2, 16)
    lines = RunDir(str(sa1b / "runs" / "whole")).metrics()
    train = [line for line in lines if line["kind"] == "train"]
    assert sum(line["num_absent"] for line in train) == 0
    assert all(line["focal"] > 0 and line["dice"] > 0 for line in train), "objects were there to learn from"
    figures = next(line["figures"] for line in lines if line["kind"] == "evaluate")
    assert figures["seen/num_objects"] == 48
    assert one.run(run_cases.run, sam_document(sa1b, "parts"), 1)[0][0] == "stopped"
    assert one.run(run_cases.run, sam_document(sa1b, "parts"))[0] == whole


def test_a_run_refuses_tars_that_have_changed(sa1b: Path, one: ProcessGroup, tmp_path: Path) -> None:
    shutil.copytree(sa1b / "tars", tmp_path / "tars")
    index_tars(IndexOptions(str(tmp_path / "tars"), str(tmp_path / "index")))
    assert one.run(run_cases.run, sam_document(tmp_path, "changed"), 1)[0][0] == "stopped"
    path = tmp_path / "tars" / "sa_000020.tar"
    path.write_bytes(path.read_bytes().replace(b'"predicted_iou": 0.93', b'"predicted_iou": 0.92'))
    assert index_tars(IndexOptions(str(tmp_path / "tars"), str(tmp_path / "index"))).changed == ("sa_000020.tar",)
    error, what, _ = one.run(run_cases.run, sam_document(tmp_path, "changed"))[0]
    assert error == "DataError"
    assert "isn't the one this run began with" in what


def test_objects_of_a_raw_sample_are_those_in_the_tar(sa1b: Path) -> None:
    transform = sam_batches.tiny_stage().transform(train=False)
    batch = next(swept(read_manifest(str(sa1b / "index")), transform, rank=0, world_size=1, batch=8))
    with tarfile.open(sa1b / "tars" / "sa_000000.tar") as tar:
        file = tar.extractfile("./sa_3.json")
        assert file is not None
        written = json.loads(file.read())["annotations"]
    assert batch.instances is not None
    objects = batch.instances[3]
    assert objects.boxes.tolist() == [
        [x, y, x + w, y + h] for x, y, w, h in (annotation["bbox"] for annotation in written)
    ]
    assert objects.labels.tolist() == [0, 0]
    assert decode_masks(objects.masks, (32, 48)).flatten(1).sum(1).tolist() == [320, 320]


def train_loader(manifest: Manifest, transform: Any, batch: int, block: int = 8) -> Loader:
    return loader_of(
        manifest, transform, seed=3, global_batch=batch, rank=0, world_size=1, block=block, lanes=4, window=4
    )


def test_the_same_tars_come_in_the_same_order_prepared_or_indexed(tmp_path: Path) -> None:
    prepared = write_data_set(str(tmp_path / "prepared"), numbered([40, 24]))
    (tmp_path / "tars").mkdir()
    for tar in (tmp_path / "prepared").glob("*.tar"):
        shutil.copy(tar, tmp_path / "tars")
    indexed = index_tars(IndexOptions(str(tmp_path / "tars"))).manifest
    assert [shard._replace(index_sha256="") for shard in indexed.shards] == [
        shard._replace(index_sha256="") for shard in prepared.shards
    ]
    transform = ImageExample(TrainImage((16, 16)), label=True)
    for of_prepared, of_indexed in itertools.islice(
        zip(*(train_loader(m, transform, 16).steps(Cursor(0, 16)) for m in (prepared, indexed)), strict=True), 6
    ):
        assert of_prepared.after == of_indexed.after
        for ours, theirs in zip(of_prepared.micro, of_indexed.micro, strict=True):
            assert torch.equal(ours.ids, theirs.ids)
            assert ours.images is not None
            assert theirs.images is not None
            assert torch.equal(ours.images, theirs.images)


@pytest.mark.parametrize("stage", ["mae", "flip"])
def test_pairs_as_img2dataset_leaves_them_are_trained_on(tmp_path: Path, one: ProcessGroup, stage: str) -> None:
    for i in range(2):
        write_tar(tmp_path / "train" / f"{i:05d}.tar", pair_members(100 * i, 16))
        (tmp_path / "train" / f"{i:05d}_stats.json").write_text("{}")
    index_tars(IndexOptions(str(tmp_path / "train")))
    changes: dict[str, Any] = {"data.evaluate": {}, "length_samples": 32}
    if stage == "flip":
        changes |= {"stage": "flip", "options": {**flip_cases.OPTIONS, "evaluate": []}}
    outcome = one.run(run_cases.run, train_cases.document(tmp_path, "pairs", **changes))[0]
    assert outcome[:3] == ("done", 2, 32)
    lines = [line for line in RunDir(str(tmp_path / "runs" / "pairs")).metrics() if line["kind"] == "train"]
    assert sum(line["num_absent"] for line in lines) == 0


def test_a_stage_learns_the_names_of_labels(tmp_path: Path, one: ProcessGroup) -> None:
    write_tar(tmp_path / "train" / "00000.tar", pair_members(0, 32, label=True))
    index_tars(IndexOptions(str(tmp_path / "train"), classes=("cat", "dog", "hen", "owl")))
    changes = {"stage": "classify", "data.evaluate": {}, "length_samples": 16, "options.decoder": None}
    document = train_cases.document(tmp_path, "labels", **changes)
    document["options"] = {"model": document["options"]["model"]}
    assert one.run(run_cases.run, document)[0][:3] == ("done", 1, 16)
    assert DataFacts(read_manifest(str(tmp_path / "train")).classes).classes == ("cat", "dog", "hen", "owl")
