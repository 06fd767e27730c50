"""The run directory, on disk and in S3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.run_dir import RunDir, command_line

CONFIG: dict[str, Any] = {"name": "a", "optim": {"lr": 0.1, "betas": [0.9, 0.95]}, "data": {"loader_workers": 1}}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(str(tmp_path / "runs" / "a"))


def line(attempt: int, step: int, kind: str = "train", **values: Any) -> dict[str, Any]:
    return {"kind": kind, "attempt": attempt, "step": step, **values}


def test_prepare_leaves_what_a_reader_needs(run: RunDir) -> None:
    run.prepare(CONFIG, {"num_steps": 3}, ["vitrail", "train", "a.yaml"])
    assert run.config() == CONFIG
    assert run.resolved() == {"num_steps": 3}
    assert Path(run.at("command.txt")).read_text() == "vitrail train a.yaml\n"
    assert run.environment()["python"]


def test_environment_tells_no_secrets(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    run.prepare(CONFIG)
    assert "hush" not in "".join(path.read_text() for path in Path(run.url).iterdir())


def test_status_merges(run: RunDir) -> None:
    assert run.status() == {}
    run.write_status(state="running", step=1)
    run.write_status(step=2)
    status = run.status()
    assert (status["state"], status["step"]) == ("running", 2)
    assert status["updated"] > 0


def test_steps_that_were_gone_through_again_are_told_once(run: RunDir) -> None:
    run.append_metrics([line(1, 0, "attempt", resumed_step=0)] + [line(1, s, loss=1.0) for s in range(1, 8)])
    run.append_metrics([line(1, 4, "evaluate")])
    run.append_metrics([line(2, 4, "attempt", resumed_step=4)] + [line(2, s, loss=2.0) for s in range(5, 7)])
    run.append_metrics([line(3, 5, "attempt", resumed_step=5)] + [line(3, s, loss=3.0) for s in range(6, 9)])
    train = [(m["step"], m["loss"]) for m in run.metrics() if m["kind"] == "train"]
    assert train == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 3.0), (7, 3.0), (8, 3.0)]
    assert [m["step"] for m in run.metrics() if m["kind"] == "evaluate"] == [4]


def test_a_torn_line_spoils_only_itself(run: RunDir) -> None:
    run.append_metrics([line(1, 1)])
    with Path(run.at("metrics.jsonl")).open("ab") as file:
        file.write(b'{"kind":"train","att')
    run.append_metrics([line(1, 2)])
    assert [m["step"] for m in run.metrics()] == [1, 2]


def test_evaluations_and_pictures_come_back(run: RunDir) -> None:
    run.write_evaluation(7, {"heldout/top1": 0.5}, {"classes": ["a"]})
    assert run.evaluations() == {7: {"figures": {"heldout/top1": 0.5}, "details": {"classes": ["a"]}}}
    run.write_pictures(7, [("Sample 3: A cat!", [("original", b"png-1"), ("masked", b"png-2")])])
    ((step, table),) = run.pictures().items()
    assert (step, table[0]["title"]) == (7, "Sample 3: A cat!")
    assert [Path(panel["file"]).read_bytes() for panel in table[0]["panels"]] == [b"png-1", b"png-2"]
    assert "00-sample-3-a-cat/1-masked.png" in table[0]["panels"][1]["file"]


def test_the_command_is_the_one_that_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_COMMAND", "vitrail train a.yaml 'name=a b'")
    assert command_line() == ["vitrail", "train", "a.yaml", "name=a b"]
    monkeypatch.delenv("VITRAIL_COMMAND")
    monkeypatch.setattr("sys.argv", ["/somewhere/worker.py", "a.yaml"])
    assert command_line() == ["worker.py", "a.yaml"]
