"""Chains of real builds: what is finished is skipped, what changed is refused, what fails stops what builds on it."""

from __future__ import annotations

import csv
import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from PIL import Image

from launch.chain.graph import load_chain
from launch.chain.records import ChainStepResult, exit_code
from launch.chain.runner import ChainRunner, only_one
from launch.progress import StepProgress
from launch.stopping import StopRequest
from launch.workers.attempts import JobFailedError
from pipeline.data.manifest import read_manifest
from pipeline.errors import ConfigError, DataError, ResourceError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Eight images and a table of them."""
    rows = []
    for number in range(8):
        Image.new("RGB", (24, 16), (30 * number, 80, 200)).save(tmp_path / f"{number}.png")
        rows.append({"url": f"{number}.png", "caption": f"picture {number}"})
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["url", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def build(url: Path | str, **settings: Any) -> dict[str, Any]:
    document = {"source": {"url": str(url)}, "splits": {"by": "url"}, "ray": {"tasks": 0}, **settings}
    return {"kind": "prep", "config": document}


class Runner:
    """Runs a chain file again and again, as the command would."""

    def __init__(self, folder: Path, steps: dict[str, Any]) -> None:
        self.folder = folder
        self.path = folder / "chain.yaml"
        self.path.write_text(yaml.safe_dump({"steps": steps}))
        self.said: list[str] = []
        self.stop = StopRequest()

    def line(self, text: str) -> None:
        self.said.append(text)

    def progress(self, name: str, progress: StepProgress) -> None:
        pass

    def end(self, name: str) -> None:
        pass

    def run(self, *overrides: str, redo: tuple[str, ...] = ()) -> dict[str, ChainStepResult]:
        chain = load_chain(str(self.path), overrides, work=str(self.folder / "work"))
        with self.stop.on_signals():
            return ChainRunner(chain, stop=self.stop, display=self).run(redo)

    def states(self, *overrides: str, redo: tuple[str, ...] = ()) -> dict[str, str]:
        return {name: result.state for name, result in self.run(*overrides, redo=redo).items()}


def two_builds(table: Path) -> dict[str, Any]:
    return {"first": build(table), "second": {**build(table, seed=1), "after": ["first"]}}


def test_steps_run_in_order_and_are_skipped_once_finished(table: Path, tmp_path: Path) -> None:
    runner = Runner(tmp_path, two_builds(table))
    results = runner.run()
    assert [r.state for r in results.values()] == ["done", "done"]
    assert exit_code(results) == 0
    assert read_manifest(results["first"].output + "/train").num_samples == 8
    started = [line.partition(":")[0] for line in runner.said if "starting" in line]
    assert started == ["first", "second"]
    again = runner.run()
    assert [r.state for r in again.values()] == ["skipped", "skipped"]
    assert exit_code(again) == 0
    assert again["first"].summary == json.loads(json.dumps(results["first"].summary))


def test_a_step_that_changed_since_is_refused_until_it_is_done_over(table: Path, tmp_path: Path) -> None:
    runner = Runner(tmp_path, two_builds(table))
    runner.run()
    manifest = tmp_path / "work/store/data/first/train/manifest.json"
    before = manifest.stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"'first' was finished with another configuration.*--redo first"):
        runner.run("steps.first.set.shard.samples=5")
    assert manifest.stat().st_mtime_ns == before
    assert runner.states("steps.first.set.shard.samples=5", redo=("first",)) == {"first": "done", "second": "done"}
    assert len(read_manifest(str(manifest.parent)).shards) == 2


def test_a_step_that_failed_before_it_wrote_anything_may_be_mended(table: Path, tmp_path: Path) -> None:
    runner = Runner(tmp_path, two_builds(table))
    wrong = str(tmp_path / "paris.csv")
    assert runner.states(f"steps.first.set.source.url={wrong}") == {"first": "failed", "second": "not started"}
    assert runner.states() == {"first": "done", "second": "done"}


def test_doing_over_an_unknown_step_is_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no step 'frist'.*first, second"):
        Runner(tmp_path, two_builds(table)).run(redo=("frist",))


def test_an_error_stops_what_builds_on_it_and_keeps_its_message(table: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("url,caption\n")
    runner = Runner(
        tmp_path,
        {"good": build(table), "bad": {**build(empty), "after": ["good"]}, "out": {**build(table), "after": ["bad"]}},
    )
    results = runner.run()
    assert [r.state for r in results.values()] == ["done", "failed", "not started"]
    assert isinstance(results["bad"].error, DataError)
    assert str(empty) in str(results["bad"].error)
    assert exit_code(results) == 2
    empty.write_text(table.read_text())
    assert runner.states() == {"good": "skipped", "bad": "done", "out": "done"}


def test_a_killed_process_fails_its_step_and_the_next_run_goes_on(table: Path, tmp_path: Path) -> None:
    runner = Runner(tmp_path, {"first": build(table)})
    killer = threading.Thread(target=_kill_child)
    killer.start()
    results = runner.run()
    killer.join()
    assert results["first"].state == "failed"
    assert isinstance(results["first"].error, JobFailedError)
    assert "SIGKILL" in str(results["first"].error)
    assert exit_code(results) == 1
    assert runner.states() == {"first": "done"}


def test_a_stop_request_ends_with_75_and_the_next_run_goes_on(table: Path, tmp_path: Path) -> None:
    runner = Runner(tmp_path, two_builds(table))
    asker = threading.Thread(target=lambda: (_wait_for_child(), runner.stop.request()))
    asker.start()
    results = runner.run()
    asker.join()
    assert results["second"].state == "not started"
    assert exit_code(results) == 75
    runner.stop = StopRequest()
    assert set(runner.states().values()) <= {"done", "skipped"}


def test_two_commands_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(ResourceError, match="another command"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


def _wait_for_child() -> psutil.Process:
    for _ in range(1000):
        for child in psutil.Process().children():
            try:
                if "launch.chain.child" in child.cmdline():
                    return child
            except psutil.Error:
                continue
        time.sleep(0.01)
    raise AssertionError("no child process was started")


def _kill_child() -> None:
    _wait_for_child().kill()
