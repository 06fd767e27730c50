"""The run directory, on disk and in S3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
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


def test_a_run_that_never_began_may_be_corrected(run: RunDir) -> None:
    run.prepare(CONFIG)
    run.write_status(state="failed")
    run.prepare({**CONFIG, "seed": 1})
    assert run.config() == {**CONFIG, "seed": 1}


def test_changed_keys_are_named_and_free_ones_are_not(run: RunDir) -> None:
    run.prepare(CONFIG)
    run.write_status(attempt=1)
    changed = {"name": "a", "optim": {"lr": 0.2, "betas": (0.9, 0.95)}, "data": {"loader_workers": 4}, "seed": 1}
    with pytest.raises(ConfigError) as caught:
        run.prepare(changed)
    message = str(caught.value)
    assert "optim.lr: 0.1 -> 0.2" in message
    assert "seed: unset -> 1" in message
    assert "betas" not in message
    assert "workers" not in message
    assert run.config() == CONFIG, "nothing was written"
    run.prepare({**CONFIG, "data": {"loader_workers": 4}})


@pytest.mark.parametrize("key", ["block", "lanes", "window", "global_batch", "crops_per_image", "train"])
def test_what_fixes_the_order_of_samples_stays(run: RunDir, key: str) -> None:
    run.prepare({"name": "a", "data": {key: 1}})
    run.write_status(attempt=1)
    with pytest.raises(ConfigError, match=f"data.{key}: 1 -> 2"):
        run.prepare({"name": "a", "data": {key: 2}})


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


def test_a_key_that_came_with_a_newer_version_is_no_change(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    run.prepare(CONFIG)
    run.write_status(attempt=1)
    with pytest.raises(ConfigError, match="newer: unset -> 3"):
        run.prepare({**CONFIG, "newer": 3})
    run.prepare({**CONFIG, "newer": 3}, complete=lambda earlier: {"newer": 3, **earlier})
