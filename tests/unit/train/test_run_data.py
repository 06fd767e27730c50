"""Whole small runs on several data sets: mixed, cropped repeatedly, with withdrawn samples, resumed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_prep.build import build as prepare
from data_prep.indexing.index import IndexOptions, index_tars
from pipeline import config as configs
from pipeline.classes import check_initial
from pipeline.convert.weights import build
from pipeline.data.manifest import Manifest, Shard
from pipeline.data.order.mixture import TrainingSource
from pipeline.data.reading.takedown import Takedown
from pipeline.errors import ConfigError
from pipeline.inference.evaluating import KnnOptions
from pipeline.inference.loading import run_weights
from pipeline.run_dir import RunDir
from pipeline.train.checkpoints.restore import read_weights
from pipeline.train.config import DataConfig, TrainConfig
from pipeline.train.data import RunData, same_data
from tests.support import flip_cases, run_cases, sam_batches, train_cases
from tests.support.prep_cases import settings, write_pairs
from tests.support.process_group import ProcessGroup
from tests.support.tar_sets import sa1b_members, write_tar
from tests.support.weight_verbs import convert_weights, evaluate, predict
from tests.unit.data.conftest import numbered, write_data_set

MODEL = {"width": 16, "depth": 2, "heads": 2, "image_size": 16, "patch_size": 8}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets as `vitrail prep` makes them: labels of different classes, with an object in each image, and none."""
    folder = tmp_path_factory.mktemp("kinds")
    lists = {"animals": ("cat", "dog"), "plants": ("oak", "fern", "moss"), "swapped": ("dog", "cat"), "captions": ()}
    for name, classes in lists.items():
        columns: dict[str, Any] = {}
        source: dict[str, Any] = {}
        if classes:
            labels = [i % len(classes) for i in range(24)]
            mask = [[4, 2, 30, 2, 30, 24, 4, 24]]
            objects = [{"bbox": [4, 2, 26, 22], "segmentation": mask, "category_id": label} for label in labels]
            columns = {"label": labels, "objects": [json.dumps([item]) for item in objects]}
            source = {"label_column": "label", "annotations_column": "objects", "classes": classes}
        prepare(settings(write_pairs(folder / "raw" / name, 24, **columns), folder / name, source=source))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mixed")
    train_cases.write_data(made)
    write_data_set(str(made / "more"), numbered([30]))
    return made


def mixed(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    sources = [
        {"url": str(folder / "train"), "weight": 0.75, "subset": 0.5},
        {"url": str(folder / "more"), "weight": 0.25},
    ]
    settings = {"data.train": sources, "data.crops_per_image": 2, "length_samples": 128}
    return train_cases.document(folder, name, **(settings | changes))


def test_a_mixture_trains_and_goes_on_exactly_where_it_was_stopped(
    folder: Path, one: ProcessGroup, two: ProcessGroup
) -> None:
    whole = two.run(run_cases.run, mixed(folder, "whole"))[0]
    assert whole[:3] == ("done", 8, 128)
    assert two.run(run_cases.run, mixed(folder, "parts"), 5, 0)[0][0] == "stopped"
    assert two.run(run_cases.run, mixed(folder, "parts"))[0] == whole
    assert one.run(run_cases.run, mixed(folder, "alone"))[0][:3] == ("done", 8, 128)
    losses = [
        [line["loss"] for line in RunDir(str(folder / "runs" / name)).metrics() if line["kind"] == "train"]
        for name in ("whole", "alone")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3), "the same batches on one rank"


def test_a_takedown_list_may_come_in_the_middle_of_a_run(folder: Path, one: ProcessGroup) -> None:
    document = mixed(folder, "withdrawn")
    assert one.run(run_cases.run, document, 4, 0)[0][0] == "stopped"
    before = RunDir(str(folder / "runs" / "withdrawn")).metrics()
    assert all(line["num_absent"] == 0 for line in before if line["kind"] == "train")
    (folder / "takedown.txt").write_text("# on request\n" + "".join(f"{i:06d}\n" for i in range(64)))
    document["data"]["takedown"] = str(folder / "takedown.txt")
    assert one.run(run_cases.run, document)[0][:3] == ("done", 8, 128)
    after = [line for line in RunDir(str(folder / "runs" / "withdrawn")).metrics() if line["kind"] == "train"]
    assert after[-1]["num_absent"] == 16, "all of them"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.loader_workers": 20},
            "1 ranks x 20 loader workers need 20 images a step, a global batch has 8 of 2 crops each",
        ),
        ({"data.crops_per_image": 3}, "3 crops of each image don't divide"),
        ({"data.takedown": "/nowhere.txt"}, "no such takedown list"),
    ],
)
def test_what_cant_work_is_said_at_start(folder: Path, one: ProcessGroup, changes: dict, message: str) -> None:
    document = mixed(folder, "refused", **changes)
    assert message in " ".join(one.run(run_cases.run, document)[0])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"url": "a", "weight": 1.0}, {"url": "b"}], "a weight, or none"),
        ([{"url": "a", "weight": 1.0, "repeat": 2}], "weight or repeat, not both"),
        ([{"url": "a", "subset": 1.5}], "at most 1.0"),
        ([], "train names no data set"),
    ],
)
def test_sources_that_contradict_are_refused(folder: Path, sources: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.validate(TrainConfig, mixed(folder, "refused", **{"data.train": sources}), where="test")


def of_kinds(kinds: Path, name: str, train: list[str], evaluate: list[str], **changes: Any) -> dict[str, Any]:
    """A short run on some of the data sets of `kinds`."""
    settings = {
        "data.train": [{"url": str(kinds / kind / "train")} for kind in train],
        "data.evaluate": {kind: str(kinds / kind / "train") for kind in evaluate},
        "length_samples": 64,
        "checkpoint.every_samples": 32,
    }
    return train_cases.document(kinds, name, **(settings | changes))


def evaluated(kinds: Path, name: str) -> dict[str, float]:
    lines = RunDir(str(kinds / "runs" / name)).metrics()
    figures: dict[str, float] = next(line["figures"] for line in lines if line["kind"] == "evaluate")
    return figures


def test_reconstruction_mixes_and_measures_sets_of_any_classes_and_resumes_exactly(
    kinds: Path, one: ProcessGroup, two: ProcessGroup
) -> None:
    names = ["animals", "plants", "captions"]
    whole = two.run(run_cases.run, of_kinds(kinds, "whole", names, names))[0]
    assert whole[:3] == ("done", 4, 64)
    figures = evaluated(kinds, "whole")
    assert set(figures) == {f"{name}/reconstruction_mse" for name in names}
    again, _ = evaluate(str(kinds / "runs" / "whole"), [], lambda _: None)
    assert again["figures"] == pytest.approx(figures, rel=1e-4), "`vitrail eval` accepts what the run did"
    with pytest.raises(ConfigError, match="needs the train set"):
        evaluate(str(kinds / "runs" / "whole"), [], lambda _: None, knn=KnnOptions())
    assert two.run(run_cases.run, of_kinds(kinds, "parts", names, names), 2, 0)[0][0] == "stopped"
    assert two.run(run_cases.run, of_kinds(kinds, "parts", names, names))[0] == whole
    start = {"stage": "classify", "options": {"model": MODEL}, "init_from": str(kinds / "runs" / "whole")}
    tuned = one.run(run_cases.run, of_kinds(kinds, "tuned", ["plants"], ["plants", "captions"], **start))[0]
    assert tuned[0] == "done", "weights of a mixture start a stage that learns classes"
    assert "plants/top1" in evaluated(kinds, "tuned")


def test_segment_anything_mixes_instances_of_any_categories_and_of_none(kinds: Path, one: ProcessGroup) -> None:
    """As SA-1B, which has no categories, beside COCO, which has 80."""
    write_tar(kinds / "tars" / "sa_000000.tar", sa1b_members(0, 14))
    index_tars(IndexOptions(str(kinds / "tars"), str(kinds / "sa1b" / "train")))
    options = {"model": sam_batches.MODEL, "sam": sam_batches.SAM, "clicks": 1, "repeats": 1, "max_objects": 2}
    changes = {"stage": "sam", "options": options, "engine.zero_stage": 0, "length_samples": 32}
    names = ["animals", "sa1b", "plants"]
    whole = one.run(run_cases.run, of_kinds(kinds, "sam", names, names, **changes))[0]
    assert whole[:3] == ("done", 2, 32)
    lines = RunDir(str(kinds / "runs" / "sam")).metrics()
    assert all(line["num_absent"] == 0 and line["focal"] > 0 for line in lines if line["kind"] == "train")
    figures = evaluated(kinds, "sam")
    assert [figures[f"{name}/num_objects"] for name in names] == [24, 28, 24]
    assert one.run(run_cases.run, of_kinds(kinds, "sam_parts", names, names, **changes), 1)[0][0] == "stopped"
    assert one.run(run_cases.run, of_kinds(kinds, "sam_parts", names, names, **changes))[0] == whole


def test_zero_shot_goes_by_each_sets_own_classes(kinds: Path, one: ProcessGroup) -> None:
    options = flip_cases.OPTIONS | {"text_mask_ratio": 0.0}
    changes = {"stage": "flip", "options": options, "engine.zero_stage": 0, "length_samples": 16}
    names = ["animals", "plants", "captions"]
    outcome = one.run(run_cases.run, of_kinds(kinds, "flip", ["captions", "animals"], names, **changes))[0]
    assert outcome[0] == "done"
    figures = evaluated(kinds, "flip")
    assert {name for name in names if f"{name}/zeroshot_top1" in figures} == {"animals", "plants"}
    assert all(f"{name}/retrieval_i2t_r1" in figures for name in names)
    written = next(Path(kinds / "runs" / "flip").rglob("evaluations/step-*.json"))
    details = json.loads(written.read_text())["details"]
    assert details["animals/classes"] == ["cat", "dog"]
    assert details["plants/classes"] == ["oak", "fern", "moss"]
    assert [len(row) for row in details["plants/zeroshot_confusion"]] == [3, 3, 3]


KNN = {"evaluate": ["reconstruction", "knn"], "decoder": {"width": 16, "depth": 1, "heads": 2}}


@pytest.mark.parametrize(
    ("stage", "options", "train", "evaluate", "message"),
    [
        ("classify", {}, ["animals", "plants"], [], "3 classes, not 2 classes; and stage 'classify' learns classes"),
        ("probe", {}, ["animals", "captions"], [], "none, not 2 classes; and stage 'probe' learns classes"),
        ("classify", {}, ["animals"], ["plants"], r"data.evaluate.plants: .*: 3 classes, not 2 classes"),
        ("classify", {}, ["animals"], ["swapped"], r"class 0 is 'dog', not 'cat'"),
        ("mae", KNN, ["animals", "plants"], [], r"stage 'mae' compares labels .* leave it out of options.evaluate"),
        ("mae", KNN, ["animals"], ["plants"], r"data.evaluate.plants: .* stage 'mae' compares labels"),
    ],
)
def test_labels_of_other_classes_are_refused_where_they_would_be_mixed_up(
    kinds: Path, one: ProcessGroup, stage: str, options: dict, train: list, evaluate: list, message: str
) -> None:
    document = of_kinds(kinds, "refused", train, evaluate, stage=stage, options={"model": MODEL, **options})
    outcome = one.run(run_cases.run, document)[0]
    assert outcome[0] == "ConfigError"
    assert re.search(message, " ".join(outcome[1:]))


HEADS: dict[str, dict[str, Any]] = {
    "classify": {"model": MODEL},
    "segment": {"model": MODEL | {"cls_token": False, "final_norm": False}},
}


def learner(kinds: Path, folder: Path, name: str, stage: str = "classify", **changes: Any) -> dict[str, Any]:
    """A short run on `folder`/data, made of the animals."""
    if not (folder / "data").exists():
        shutil.copytree(kinds / "animals" / "train", folder / "data")
    settings = {"stage": stage, "options": HEADS[stage], "engine.zero_stage": 0, "runs": str(folder / "runs")}
    settings |= {"data.train": str(folder / "data"), "length_samples": 64, "checkpoint.every_samples": 16}
    return of_kinds(kinds, name, [], [], **(settings | changes))


def call_classes(folder: Path, *names: str) -> None:
    """Give the labels of a data set other names."""
    path = folder / "data" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": names}))


def forget_classes(checkpoints: Path) -> None:
    """Make commits what the first versions wrote: without the classes, and without a hash."""
    for path in checkpoints.rglob("commit.json"):
        commit = json.loads(path.read_text())
        del commit["sha256"], commit["info"]["classes"]
        path.write_text(json.dumps(commit | {"format_version": 1}))


@pytest.mark.parametrize("stage", HEADS)
def test_a_run_still_names_its_classes_when_its_data_are_gone(
    kinds: Path, one: ProcessGroup, tmp_path: Path, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    document = learner(kinds, tmp_path, "run", stage, length_samples=16)
    assert one.run(run_cases.run, document)[0][0] == "done"
    (tmp_path / "data").rename(tmp_path / "moved")
    run, photo, lines = str(tmp_path / "runs" / "run"), tmp_path / "photo.png", list[str]()
    Image.new("RGB", (20, 30), (90, 60, 30)).save(photo)
    convert_weights(run, str(tmp_path / "own.safetensors"), None, "vitrail", [])
    alone = tmp_path / "alone"  # one checkpoint as it is handed to somebody
    shutil.copytree(next(Path(run).rglob("commit.json")).parent, alone)
    for source in (run, str(alone), str(tmp_path / "own.safetensors")):
        answer, _, _ = predict(source, [str(photo)], str(tmp_path / "out"), lines.append)
        assert answer["classes"] == ["cat", "dog"], source
        measured, _ = evaluate(source, [f"set={kinds / 'animals' / 'train'}"], lines.append)
        assert any(name.startswith("set/") for name in measured["figures"])
        with pytest.raises(ConfigError, match="class 0 is 'dog', not 'cat'"):
            evaluate(source, [f"other={kinds / 'swapped' / 'train'}"], lines.append)
    assert sum("out of reach" in line for line in lines) == 2, "of the run alone"
    assert not caplog.records
    forget_classes(Path(run))
    assert run_weights(run).classes == ("0", "1")
    assert "keeps no names of classes, being of an earlier version" in caplog.records[-1].getMessage()
    (tmp_path / "moved").rename(tmp_path / "data")
    assert run_weights(run).classes == ("cat", "dog"), "an earlier version's run, as before"


def test_a_run_goes_on_only_while_each_label_means_the_same(kinds: Path, one: ProcessGroup, tmp_path: Path) -> None:
    document = learner(kinds, tmp_path, "run")
    call_classes(tmp_path, "0", "1")
    assert one.run(run_cases.run, document, 1)[0][0] == "stopped"
    call_classes(tmp_path, "cat", "dog")
    assert one.run(run_cases.run, document, 2)[0][0] == "stopped", "numbers may get names"
    attempts = list((tmp_path / "runs" / "run" / "checkpoints" / "attempts").iterdir())
    others = {
        ("dog", "cat"): "class 0 is 'dog', not 'cat'",
        ("cat", "dog", "owl"): "3 classes, not 2",
        ("0", "1"): "'0'",
    }
    for names, message in others.items():
        call_classes(tmp_path, *names)
        kind, words, fix = one.run(run_cases.run, document)[0]
        assert (kind, fix) == ("DataError", "put its list of classes back, or give the run a new name")
        assert re.search(f"data: .* aren't those this run has learnt: .*{message}", words)
        taken_over = learner(kinds, tmp_path, "other", resume_from=str(tmp_path / "runs" / "run"))
        assert one.run(run_cases.run, taken_over)[0][0] == "DataError"
    assert list((tmp_path / "runs" / "run" / "checkpoints" / "attempts").iterdir()) == attempts
    forget_classes(tmp_path / "runs" / "run")
    call_classes(tmp_path, "cat")
    assert "head.bias among them (2 in the checkpoint, 1 in the model)" in one.run(run_cases.run, document)[0][1]
    call_classes(tmp_path, "cat", "dog")
    assert one.run(run_cases.run, document)[0][:3] == ("done", 4, 64), "an earlier version's run, as before"
    call_classes(tmp_path, "dog", "cat")
    assert one.run(run_cases.run, document)[0][:3] == ("done", 4, 64), "nothing is left to learn"


def test_a_head_starts_from_another_run_only_for_the_same_classes(
    kinds: Path, one: ProcessGroup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert one.run(run_cases.run, learner(kinds, tmp_path, "first", length_samples=16))[0][0] == "done"
    run, file = str(tmp_path / "runs" / "first"), str(tmp_path / "first.safetensors")
    convert_weights(run, file, None, "vitrail", [])
    still = {"length_samples": 16, "optim.lr": 1e-30, "optim.weight_decay": 0.0, "init_prefixes": [""]}
    for name, message in (("swapped", "class 0 is 'cat', not 'dog'"), ("plants", "2 classes, not 3 classes")):
        for source in (run, file):
            other = learner(kinds, tmp_path, name, init_from=source, **still)
            other["data"]["train"] = str(kinds / name / "train")
            kind, words, fix = one.run(run_cases.run, other)[0]
            assert kind == "CheckpointError"
            assert words == f"{source}: its head.weight was learnt for other classes than the training set's: {message}"
            assert fix.endswith("begin the head anew: init_prefixes=[trunk., fc_norm.]")
    assert one.run(run_cases.run, other | {"init_prefixes": ["trunk.", "fc_norm."]})[0][0] == "done"
    assert one.run(run_cases.run, learner(kinds, tmp_path, "second", init_from=run, **still))[0][0] == "done"
    weights = [read_weights(str(tmp_path / "runs" / name))["head.weight"] for name in ("first", "second")]
    assert torch.equal(*weights)
    stage, _ = build(run_weights(run))
    for recorded, warned in ((("cat", "dog"), 0), ((), 1), (("0", "1"), 1)):
        caplog.clear()
        check_initial(stage, stage.state_dict(), recorded, ("head.",), where="RUN")
        assert len(caplog.records) == warned
        assert all("RUN doesn't say which classes it learnt" in record.getMessage() for record in caplog.records)


def test_neighbours_leave_out_a_set_without_labels(kinds: Path, one: ProcessGroup) -> None:
    options = {"model": MODEL, "mask_ratio": 0.5, **KNN}
    document = of_kinds(kinds, "neighbours", ["animals"], ["animals", "captions"], options=options, length_samples=16)
    assert one.run(run_cases.run, document)[0][0] == "done"
    assert set(evaluated(kinds, "neighbours")) == {
        "animals/knn_top1", "animals/reconstruction_mse", "captions/reconstruction_mse",
    }  # fmt: skip


def test_of_many_shards_a_checkpoint_knows_every_one() -> None:
    def identity(changed: int | None, num_sources: int = 1) -> Any:
        shards = tuple(
            Shard(f"{i}.tar", 2, 9, "other" if i == changed else f"{i}", f"{i}.index.npy", "") for i in range(1200)
        )
        source = TrainingSource(Manifest("somewhere", shards, 2400, ""), 1, None)
        config = configs.validate(DataConfig, {"train": "somewhere", "global_batch": 16}, where="test")
        return RunData(config, (source,) * num_sources, {}, Takedown()).identity()

    for num_sources in (1, 2):
        assert same_data(identity(None, num_sources), identity(None, num_sources))
        assert not same_data(identity(None, num_sources), identity(1100, num_sources)), "beyond those it names"
    assert not same_data(identity(None), identity(None, 2))
    before = {key: value for key, value in identity(None).items() if key != "all_shards"}
    assert same_data(before, identity(None)), "a checkpoint from before there was a digest"
    assert not same_data(before, identity(3))
