"""A worker killed in mid-run: the same command goes on, and ends with the same bits."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from pipeline.run_dir import RunDir
from pipeline.train.checkpoints.commits import find_commits
from pipeline.train.checkpoints.restore import read_weights, weights_digest
from tests.support import train_cases

TIMEOUT_S = 240


def output(folder: Path, name: str) -> str:
    return (folder / f"{name}.rank0.log").read_text()


def wait_for_commit(run: RunDir, step: int) -> None:
    """Until a checkpoint at or past `step` is committed, and a later step is logged."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        commits = find_commits(run.checkpoints_url).commits
        if commits and commits[0].step >= step and run.metrics()[-1]["step"] > commits[0].step:
            return
        time.sleep(0.02)
    raise TimeoutError


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_kill_of_a_worker_leaves_no_trace_in_the_weights(tmp_path: Path, precision: str) -> None:
    train_cases.write_data(tmp_path)
    changes = {"engine.precision": precision, "length_samples": 640, "log_every_samples": 16}

    straight = train_cases.document(tmp_path, "straight", **changes)
    assert train_cases.wait(train_cases.start_workers(straight, tmp_path, 2)) == [0, 0], output(tmp_path, "straight")

    killed = train_cases.document(tmp_path, "killed", **changes)
    run = RunDir(f"{killed['runs']}/killed")
    processes = train_cases.start_workers(killed, tmp_path, 2)
    try:
        wait_for_commit(run, 8)
        processes[1].send_signal(signal.SIGKILL)
        assert processes[1].wait(TIMEOUT_S) == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert run.status()["state"] != "done", "the kill came too late to mean anything"
    newest = find_commits(run.checkpoints_url).commits[0].step

    assert train_cases.wait(train_cases.start_workers(killed, tmp_path, 2)) == [0, 0], output(tmp_path, "killed")
    status = run.status()
    assert status["state"] == "done"
    assert status["attempt"] == 2
    assert status["resumed_from"] == f"checkpoint at step {newest} of attempt 1"
    assert status["resumed_from"] in output(tmp_path, "killed")
    expected = RunDir(f"{straight['runs']}/straight")
    assert status["weights_sha256"] == expected.status()["weights_sha256"]
    assert status["weights_sha256"] == weights_digest(read_weights(run.url))

    steps = [line["step"] for line in run.metrics() if line["kind"] == "train"]
    assert steps == list(range(1, 41)), "every step is told once"
    assert [line["loss"] for line in run.metrics() if line["kind"] == "train"] == [
        line["loss"] for line in expected.metrics() if line["kind"] == "train"
    ]
    assert run.evaluations().keys() == {40}
    assert run.evaluations() == expected.evaluations()
