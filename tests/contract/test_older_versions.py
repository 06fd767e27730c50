"""What version 0.1.0 left behind is read: data sets, checkpoints, exported weights, chains and configurations.

`tests/fixtures/v0_1` holds a small sample of each, made by that version's own commands. Everything here goes through
the command line, as its user would.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import runpy
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from numpy.testing import assert_allclose
from PIL import Image

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "v0_1"
PLANS: dict[str, dict[str, Any]] = json.loads((FIXTURE / "expected" / "plans.json").read_text())
DATA_SETS = {"shards/pairs": 10, "shards/coco": 4, "tars": 8, "study/store/data/pairs": 16}
RUNS = {
    "runs/two_ranks": 4,
    "study/runs/mae": 4,
    "study/runs/flip-seed0": 4,
    "study/runs/classify": 4,
    "study/runs/probe": 4,
    "study/runs/vitdet": 4,
    "study/runs/sam": 4,
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old version's folder, with this process in it."""
    folder = tmp_path / "project"
    with tarfile.open(FIXTURE / "project.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    settings = folder / "tars" / "_index" / "settings.json"
    settings.write_text(settings.read_text().replace("PROJECT", str(folder)))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VITRAIL_COMMAND", "")  # the command sets it for its workers
    return folder


def vitrail(*arguments: str, ends_with: int = 0) -> dict[str, Any]:
    """What the command answers; it runs in this process, since starting one takes longer than most verbs do."""
    before, printed = sys.argv, io.StringIO()
    sys.argv = ["vitrail", *arguments, "--json"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
            runpy.run_module("launch", run_name="__main__")
    finally:
        sys.argv = before
    assert ended.value.code == ends_with, printed.getvalue()
    answer: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])
    return answer


def parts(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a chain consists of; 0.1.0 called it nodes."""
    found: dict[str, dict[str, Any]] = answer["steps" if "steps" in answer else "nodes"]
    return found


def states(answer: dict[str, Any]) -> dict[str, str]:
    return {name: one["state"] for name, one in parts(answer).items()}


def hashes(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file, but locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_data_sets_are_valid_to_the_sample(project: Path) -> None:
    for url, num_samples in DATA_SETS.items():
        found = vitrail("verify", url)
        assert (found["samples"], found["problems"]) == (num_samples, []), url
        assert vitrail("show", url)["splits"], url


def test_a_finished_build_is_left_as_it_is_and_can_be_appended_to(project: Path) -> None:
    shards = project / "shards" / "pairs"
    before = hashes(shards)
    again = vitrail("prep", "pairs.yaml")
    assert (again["inputs"], again["written"]) == (10, 10)
    assert {name: found for name, found in hashes(shards).items() if name in before and "/attempts/" not in name} == {
        name: found for name, found in before.items() if "/attempts/" not in name
    }
    Image.new("RGB", (40, 36), (10, 200, 30)).save(project / "images" / "10.png")
    with (project / "pairs.csv").open("a") as table:
        table.write("images/10.png,picture 10,0,CC0\n")
    assert vitrail("prep", "pairs.yaml")["written"] == 11
    after = hashes(shards)
    tars = {name: found for name, found in before.items() if name.endswith(".tar")}
    assert tars.items() < {name: found for name, found in after.items() if name.endswith(".tar")}.items()
    assert vitrail("verify", "shards/pairs")["problems"] == []


def test_indexed_tars_are_known_when_indexed_again(project: Path) -> None:
    before = (project / "tars" / "manifest.json").read_bytes()
    vitrail("index", "tars", "--classes", "names.json")
    assert (project / "tars" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(("run", "step"), RUNS.items())
def test_a_run_is_shown_measured_and_used(project: Path, run: str, step: int) -> None:
    shown = vitrail("show", run, "--verify")
    assert shown["status"]["state"] == "done"
    assert shown["checkpoints"]["valid"][0]["step"] == step
    assert shown["checkpoints"]["skipped"] == []
    measured = vitrail("eval", run)["figures"]
    assert measured.keys() <= shown["figures"].keys()
    # Other processors sum in another order; of four samples, no figure moves by less than a hundredth otherwise.
    assert measured == pytest.approx({name: shown["figures"][name] for name in measured}, rel=1e-3, abs=1e-3)
    asked = ["--ask", "texts=[a cat, a dog]"] if "flip" in run else []
    vitrail("predict", run, "images/0.png", "--out", "seen", *asked)
    assert "error" not in json.loads((project / "seen" / "predictions.json").read_text())["images"][0]


def test_runs_are_listed_and_reported_on(project: Path) -> None:
    assert {one["name"]: one["state"] for one in vitrail("runs", "runs")["runs"]} == {
        "two_ranks": "done",
        "unfinished": "stopped",
    }
    page = Path(vitrail("report", *RUNS, "--out", "page")["report"]).read_text()
    assert "heldout/top1" in page or "top-1" in page.lower()


@pytest.mark.parametrize(
    ("run", "which", "file"), [("study/runs/flip-seed0", "auto", "flip"), ("runs/two_ranks", "ema", "mae")]
)
def test_exported_weights_are_those_of_the_run_and_can_be_measured(
    project: Path, run: str, which: str, file: str
) -> None:
    old = f"weights/{file}.safetensors"
    vitrail("convert", run, "new.safetensors", "--to", "vitrail", "--weights", which)
    of_run, of_file = (safetensors.numpy.load_file(name) for name in ("new.safetensors", old))
    assert of_run.keys() == of_file.keys()
    for name, tensor in of_file.items():
        assert_allclose(of_run[name], tensor, rtol=0, atol=0, err_msg=name)
    data = "study/store/data/pairs"
    assert (
        vitrail("eval", old, f"x={data}/heldout", "--train", f"{data}/train")["figures"]
        == vitrail("eval", run, f"x={data}/heldout", "--train", f"{data}/train", "--weights", which)["figures"]
    )


def test_an_unfinished_run_of_two_ranks_goes_on_with_one_to_the_weights_it_would_have_had(project: Path) -> None:
    """It mixes two sets, keeps a moving average, and leaves out a sample; all of that is in what it resumes from."""
    begun = vitrail("show", "runs/unfinished")["checkpoints"]["valid"][0]["step"]
    assert 0 < begun < 12
    result = vitrail("train", "unfinished.yaml", "--no-ray")
    assert (result["status"], result["step"], result["samples"]) == ("done", 12, 48)
    attempts = vitrail("show", "runs/unfinished")["checkpoints"]["attempts"]
    assert attempts[-1]["resumed_step"] == begun
    vitrail("convert", "runs/unfinished", "new.safetensors", "--to", "vitrail", "--weights", "raw")
    reached = safetensors.numpy.load_file("new.safetensors")
    expected = safetensors.numpy.load_file(FIXTURE / "expected" / "unfinished.safetensors")
    assert reached.keys() == expected.keys()
    for name, tensor in expected.items():
        # To the bit on the processor that made the fixture. Others sum in another order, which AdamW, dividing by the
        # gradient's size, passes on to weights whose gradient is near zero; a step moves a weight by 1e-3 at most.
        assert_allclose(reached[name], tensor, rtol=1e-3, atol=2e-4, err_msg=name)


def test_a_finished_chain_has_nothing_left_to_do(project: Path) -> None:
    before = hashes(project)
    assert set(states(vitrail("plan", "study.yaml", "--work", "study")).values()) == {"finished"}
    results = vitrail("run", "study.yaml", "--work", "study")
    assert set(states(results).values()) == {"skipped"}
    assert list(parts(results)) == [
        "scenes",
        "pairs",
        "mae",
        "flip-seed0",
        "classify",
        "probe",
        "vitdet",
        "sam",
        "report",
    ]
    assert parts(results)["classify"]["summary"]["figures"].keys() >= {"heldout/top1"}
    after = hashes(project)
    assert {name: after.get(name) for name in before} == before


def test_a_changed_node_of_a_finished_chain_is_refused(project: Path) -> None:
    text = (project / "study.yaml").read_text()
    assert "mask_channels: 4" in text
    (project / "study.yaml").write_text(text.replace("mask_channels: 4", "mask_channels: 8"))
    refused = vitrail("run", "study.yaml", "--work", "study", ends_with=2)
    assert "'sam'" in refused["error"]["what"]


def test_a_chain_that_lacked_data_goes_on_once_they_are_there(project: Path) -> None:
    shutil.copy(project / "pairs.csv", project / "more.csv")
    assert states(vitrail("run", "later.yaml")) == {"here": "skipped", "missing": "done"}


@pytest.mark.slow
def test_a_chain_stopped_while_it_trained_goes_on_from_the_checkpoint(project: Path) -> None:
    before = vitrail("show", "stopped/runs/mae")["checkpoints"]["valid"][0]["step"]
    assert states(vitrail("run", "stopped.yaml")) == {"pairs": "skipped", "mae": "done", "report": "done"}
    after = vitrail("show", "stopped/runs/mae")["checkpoints"]
    assert after["valid"][0]["step"] == 500
    assert after["attempts"][-1]["resumed_step"] == before > 0


@pytest.mark.slow
def test_a_new_run_starts_from_an_old_ones_weights_or_state(project: Path) -> None:
    common = ["train", "mae.yaml", "data.train=study/store/data/pairs/train", "--no-ray"]
    for name, given in {
        "from_run": ["init_from=study/runs/flip-seed0"],
        "from_file": ["init_from=weights/flip.safetensors"],
        "longer": ["resume_from=study/runs/mae", "length_samples=32"],
    }.items():
        assert vitrail(*common, f"name={name}", *given)["status"] == "done"
        assert given[0].partition("=")[0] in vitrail("show", f"runs/{name}")["status"]["resumed_from"]


@pytest.mark.parametrize("file", PLANS)
def test_a_configuration_comes_to_the_same(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FIXTURE / "configs_0.1.0", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRAIL_COMMAND", "")
    expected = PLANS[file]
    found = vitrail("plan", f"configs/{file}", *expected["given"])
    assert found["kind"] == expected["kind"]
    if found["kind"] == "chain":
        told = {name: [one["kind"], *one["after"]] for name, one in parts(found).items()}
        assert told == expected["told"]
    else:
        assert {key: found[key] for key in expected["told"]} == expected["told"]
