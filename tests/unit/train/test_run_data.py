"""Whole small runs on several data sets: mixed, cropped repeatedly, with withdrawn samples, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configs
from pipeline.data.manifest import Manifest, Shard
from pipeline.data.mixture import Source
from pipeline.data.takedown import Takedown
from pipeline.errors import ConfigError
from pipeline.run_dir import RunDir
from pipeline.train.config import DataConfig, TrainConfig
from pipeline.train.data import RunData, same_data
from tests import train_cases
from tests.process_group import ProcessGroup
from tests.unit.data.conftest import numbered, write_data_set
from tests.unit.train import run_cases


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
        ({"data.workers": 20}, "1 ranks x 20 workers need 20 images a step, a global batch has 8 of 2 crops each"),
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


def test_sources_with_other_labels_are_refused(folder: Path, one: ProcessGroup) -> None:
    import dataclasses

    from pipeline import storage
    from pipeline.data.manifest import MANIFEST_NAME, manifest_bytes

    other = write_data_set(str(folder / "other"), numbered([30]))
    renamed = dataclasses.replace(other, classes=("one", "two"))
    storage.write(storage.join(other.url, MANIFEST_NAME), manifest_bytes(renamed))
    sources = [{"url": str(folder / "train")}, {"url": str(folder / "other")}]
    outcome = one.run(run_cases.run, mixed(folder, "labels", **{"data.train": sources}))[0]
    assert outcome[0] == "ConfigError"
    assert "2 classes, not 7 classes" in outcome[1]


def test_of_many_shards_a_checkpoint_knows_every_one() -> None:
    def identity(changed: int | None, num_sources: int = 1) -> Any:
        shards = tuple(
            Shard(f"{i}.tar", 2, 9, "other" if i == changed else f"{i}", f"{i}.index.npy", "") for i in range(1200)
        )
        source = Source(Manifest("somewhere", shards, 2400, ""), 1, None)
        config = configs.validate(DataConfig, {"train": "somewhere", "global_batch": 16}, where="test")
        return RunData(config, (source,) * num_sources, {}, Takedown()).identity()

    for num_sources in (1, 2):
        assert same_data(identity(None, num_sources), identity(None, num_sources))
        assert not same_data(identity(None, num_sources), identity(1100, num_sources)), "beyond those it names"
    assert not same_data(identity(None), identity(None, 2))
    before = {key: value for key, value in identity(None).items() if key != "all_shards"}
    assert same_data(before, identity(None)), "a checkpoint from before there was a digest"
    assert not same_data(before, identity(3))
