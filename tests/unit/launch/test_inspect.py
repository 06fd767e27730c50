"""What `vitrail runs` and `vitrail show RUN` tell: where runs stand, and which of their checkpoints are valid."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.inspect import describe, list_runs
from pipeline.run_dir import RunDir
from pipeline.train.checkpoints.commits import find_commits
from pipeline.train.checkpoints.restore import read_weights
from tests.support import run_cases, train_cases
from tests.support.process_group import ProcessGroup
from tests.support.weight_verbs import convert_weights
from tests.unit.train.conftest import one

__all__ = ["one"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, one: ProcessGroup) -> Path:
    """A run that was stopped at step 5 with checkpoints of steps 4 and 5, and one that was refused."""
    folder = tmp_path_factory.mktemp("looked-at")
    train_cases.write_data(folder)
    assert one.run(run_cases.run, train_cases.document(folder, "halfway"), 5)[0][0] == "stopped"
    refused = train_cases.document(folder, "refused", init_from=str(folder / "nowhere"))
    assert one.run(run_cases.run, refused)[0][0] == "CheckpointError"
    return folder / "runs"


def test_runs_tell_state_checkpoint_and_reason(runs: Path) -> None:
    documents, lines = list_runs(str(runs))
    halfway, refused = documents
    assert (halfway["name"], halfway["state"], halfway["resumable_step"]) == ("halfway", "stopped", 5)
    assert halfway["message"] == "asked to stop"
    assert (refused["state"], refused["resumable_step"]) == ("failed", None)
    text = "\n".join(lines)
    assert "saved at 5" in text
    assert "no checkpoint" in text
    assert "nowhere" in text


def test_a_run_tells_its_attempts_and_valid_checkpoints(runs: Path) -> None:
    document, lines = describe(str(runs / "halfway"))
    assert [one["step"] for one in document["checkpoints"]["valid"]] == [5, 4]
    assert [one["resumed_step"] for one in document["checkpoints"]["attempts"]] == [0]
    assert any("step 5: 80 samples" in line and "would be resumed" in line for line in lines)


def test_damage_that_only_reading_shows_is_found_with_verify(runs: Path) -> None:
    newest = Path(find_commits(str(runs / "halfway" / "checkpoints")).commits[0].url)
    file = newest / "rank-00000.safetensors"
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[-3] ^= 4
    file.write_bytes(changed)
    try:
        assert [o["step"] for o in describe(str(runs / "halfway"))[0]["checkpoints"]["valid"]] == [5, 4]
        document, lines = describe(str(runs / "halfway"), verify=True)
        assert [o["step"] for o in document["checkpoints"]["valid"]] == [4]
        assert any(line.startswith("unusable") and "step 5" in line and "altered" in line for line in lines)
        assert CliRunner().invoke(app, ["show", "--help"]).output.count("--verify") >= 1
    finally:
        file.write_bytes(whole)


def test_a_run_that_has_gone_silent_is_not_said_to_be_running(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "lost"))
    run.write_status(state="running", step=3)
    assert list_runs(str(tmp_path))[0][0]["state"] == "running"
    path = tmp_path / "lost" / "status.json"
    path.write_text(path.read_text().replace(f'"updated": {int(time.time()) // 1000}', '"updated": 1'))
    assert list_runs(str(tmp_path))[0][0]["state"] == "silent"


def test_any_checkpoint_exports_by_its_folder_alone(runs: Path, tmp_path: Path) -> None:
    for commit in find_commits(str(runs / "halfway" / "checkpoints")).commits:
        target = str(tmp_path / f"{commit.step}.safetensors")
        document, _ = convert_weights(commit.url, target, None, "vitrail", [])
        assert document["stage"] == "mae"
        assert document["weights"] == f"weights at step {commit.step}"
        exported, expected = read_weights(target), read_weights(commit.url)
        assert exported.keys() == expected.keys()
        assert all((exported[name] == expected[name]).all() for name in expected)
