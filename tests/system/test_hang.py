"""A rank that hangs, or fails alone: the others are ended within a deadline, the stacks are there, the run goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.stopping import StopRequest
from launch.workers.attempts import JobFailedError, TrainResult, run_training
from launch.workers.group import LocalWorkerGroup
from launch.workers.placement import RankPlacement
from pipeline.run_dir import RunDir
from pipeline.train.checkpoints.commits import find_commits
from tests.support import train_cases
from tests.support.tiny_chain import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WATCHDOG = {"step_s": 4.0}


def job(document: dict[str, Any], disturb: Callable[[], None] | None = None) -> tuple[TrainResult, list[str]]:
    """Run a configuration on two local ranks, the way `vitrail train --no-ray` does; `disturb` runs beside it."""
    import threading

    lines: list[str] = []
    beside = threading.Thread(target=disturb or (lambda: None))
    beside.start()
    try:
        result = run_training(
            document,
            where="test.yaml",
            run_url=f"{document['runs']}/{document['name']}",
            allocate=lambda _: LocalWorkerGroup(RankPlacement(machines=1, ranks_per_machine=2)),
            stop=StopRequest(),
            on_line=lambda rank, line: lines.append(f"[{rank}] {line}"),
        )
    finally:
        beside.join()
    return result, lines


def rank(number: int) -> psutil.Process | None:
    for process in psutil.Process().children(recursive=True):
        try:
            if "launch.worker" in process.cmdline() and process.environ().get("RANK") == str(number):
                return process
        except psutil.Error:
            continue
    return None


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    train_cases.write_data(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(train_cases.REPOSITORY))
    return tmp_path


def test_a_stopped_rank_is_found_its_stack_shown_and_the_run_goes_on(place: Path) -> None:
    calm, _ = job(train_cases.document(place, "calm", length_samples=640, watchdog=WATCHDOG))
    document = train_cases.document(place, "hung", length_samples=640, watchdog=WATCHDOG)
    run = RunDir(f"{document['runs']}/hung")

    def stop_rank_1() -> None:
        wait_for(lambda: find_commits(run.checkpoints_url).commits, "a checkpoint")
        process = rank(1)
        assert process is not None
        process.send_signal(signal.SIGSTOP)

    result, lines = job(document, stop_rank_1)
    text = "\n".join(lines)
    assert result.status == "done", text
    assert result.attempts == 2
    assert "found the run hanging: step took more than its 4 s" in text
    assert "[1] rank 1 (process" in text
    assert "had been stopped" in text
    for number in (0, 1):
        stacks = [line for line in lines if line.startswith(f"[{number}]") and "File " in line]
        assert any("run_loop" in line for line in stacks), f"rank {number}'s stack isn't there"
    assert result.weights_sha256 == calm.weights_sha256


FAULT = """
import os
if os.environ.get("RANK") == "1":
    import pipeline.data.loader as loader
    steps = loader.Loader.steps
    def failing(self, start):
        for number, step in enumerate(steps(self, start)):
            if number == 3:
                raise RuntimeError("a fault of this rank alone")
            yield step
    loader.Loader.steps = failing
"""


def test_an_error_on_one_rank_alone_ends_its_peers_and_stops_after_fruitless_attempts(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "fault").mkdir()
    (place / "fault" / "sitecustomize.py").write_text(FAULT)
    monkeypatch.setenv("PYTHONPATH", f"{place / 'fault'}:{train_cases.REPOSITORY}")
    document = train_cases.document(place, "alone", **{"checkpoint.every_samples": None})
    with pytest.raises(
        JobFailedError, match=r"3 attempts in a row got no further than step \d; rank 1 ended with code 1"
    ):
        job(document)
    assert rank(0) is None
    assert rank(1) is None
