"""The watchdog's deadlines, and what it takes for lateness."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.train.config import WatchdogConfig
from pipeline.train.watchdog import Watchdog


class Trap:
    """Collects what the watchdog says."""

    def __init__(self, **limits: float) -> None:
        self.said: list[str] = []
        self.fired = threading.Event()
        limits_s = {"start_s": 60.0, "step_s": 60.0, "evaluate_s": 60.0, "save_s": 60.0, **limits}
        self.dog = Watchdog(WatchdogConfig(**limits_s), self.hear)

    def hear(self, message: str) -> None:
        self.said.append(message)
        self.fired.set()


@pytest.fixture
def traps() -> Iterator[list[Trap]]:
    made: list[Trap] = []
    yield made
    for trap in made:
        trap.dog.close()


@pytest.mark.parametrize("phase", ["start", "step", "evaluate", "save"])
def test_each_phase_has_a_deadline_of_its_own(traps: list[Trap], phase: str, capfd: pytest.CaptureFixture[str]) -> None:
    traps.append(Trap(**{f"{phase}_s": 0.2}))
    if phase != "start":
        traps[0].dog.enter(phase)  # type: ignore[arg-type]
    assert traps[0].fired.wait(10)
    assert traps[0].said == [f"{phase} took more than its 0.2 s (watchdog.{phase}_s)"]
    assert "test_each_phase_has_a_deadline_of_its_own" in capfd.readouterr().err, "the stacks"


def test_a_phase_that_ends_in_time_is_left_alone(traps: list[Trap]) -> None:
    traps.append(Trap(step_s=0.8))
    for _ in range(12):
        traps[0].dog.enter("step")
        time.sleep(0.1)
    assert traps[0].said == []


def test_a_background_save_that_hangs_is_found_while_steps_go_on(traps: list[Trap]) -> None:
    traps.append(Trap(save_s=0.3))
    began = time.monotonic()
    traps[0].dog.saving_since = lambda: began
    while not traps[0].fired.wait(0.05):
        traps[0].dog.enter("step")
        assert time.monotonic() < began + 10
    assert "background save" in traps[0].said[0]


PROGRAM = """
import sys, time
from pipeline.train.config import WatchdogConfig
from pipeline.train.watchdog import Watchdog
limits = WatchdogConfig(start_s=9, step_s=0.8, evaluate_s=9, save_s=9)
dog = Watchdog(limits, lambda message: print(message, flush=True))
dog.enter("step")
print("ready", flush=True)
for _ in range(100):
    sys.stdin.readline()
    dog.enter("step")
    print("alive", flush=True)
"""


def test_a_process_that_was_stopped_is_not_late_when_it_goes_on() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.3)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "alive\n"
    finally:
        process.kill()
        process.wait()
