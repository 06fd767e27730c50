"""kill -9 of a rank and of the driver, in the middle of a stage of a real chain on Ray: nothing is lost or changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tiny_chain import (
    SIGKILL,
    SIGTERM,
    Command,
    all_gone,
    commits,
    mae_config,
    prep_config,
    wait_for,
    write_chain,
    write_table,
)

NUM_STEPS = 120


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a chain: pairs -> MAE on two ranks with ZeRO-2."""
    folder = tmp_path_factory.mktemp("kill")
    table = write_table(folder / "images")
    steps = {
        "pairs": {"kind": "prep", "config": prep_config(table)},
        "mae": {"kind": "train", "workers": 2, "config": mae_config(NUM_STEPS)},
    }
    write_chain(folder, steps)
    return folder


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> str:
    """Digest of the weights that an undisturbed run ends with."""
    code, answer = Command("run", "chain.yaml", "--work", "calm", "--json", cwd=place).finish()
    assert code == 0
    return str(answer["steps"]["mae"]["summary"]["weights_sha256"])


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for command in started:
        command.kill_everything()


def test_killed_ranks_and_drivers_change_nothing(place: Path, undisturbed: str, commands: list[Command]) -> None:
    checkpoints = place / "rough" / "runs" / "mae" / "checkpoints"

    def start() -> Command:
        commands.append(Command("run", "chain.yaml", "--work", "rough", "--json", cwd=place))
        return commands[-1]

    first = start()
    wait_for(lambda: len(commits(checkpoints)) >= 1, "a checkpoint")
    first.worker(1).send_signal(SIGKILL)
    wait_for(lambda: "attempt 2, from" in first.said, "the driver's second attempt")
    assert "rank 1 was ended by SIGKILL" in first.said
    reached = commits(checkpoints)[-1]
    wait_for(lambda: commits(checkpoints)[-1] > reached, "progress of the second attempt")
    assert commits(checkpoints)[-1] < NUM_STEPS, "the run was over before it could be disturbed"

    family = first.descendants()
    assert len([p for p in family if "launch.worker" in p.cmdline()]) >= 2
    first.process.send_signal(SIGKILL)
    first.process.wait()
    wait_for(lambda: all_gone(family), "the killed driver's children to go", timeout_s=30)

    second = start()
    code, answer = second.finish()
    assert code == 0, second.said
    assert "finished before: pairs" in second.said
    assert "mae: attempt 3, from checkpoint at step" in second.said
    assert answer["steps"]["pairs"]["state"] == "skipped"
    assert answer["steps"]["mae"]["summary"]["step"] == NUM_STEPS
    assert answer["steps"]["mae"]["summary"]["weights_sha256"] == undisturbed


def test_sigterm_saves_and_ends_with_75_and_the_same_command_goes_on(
    place: Path, undisturbed: str, commands: list[Command]
) -> None:
    checkpoints = place / "gentle" / "runs" / "mae" / "checkpoints"
    commands.append(Command("run", "chain.yaml", "--work", "gentle", "--json", cwd=place))
    wait_for(lambda: commits(checkpoints), "a checkpoint")
    commands[0].process.send_signal(SIGTERM)
    code, answer = commands[0].finish()
    assert code == 75, commands[0].said
    assert answer["steps"]["mae"]["state"] == "stopped"
    saved = commits(checkpoints)[-1]
    assert saved == answer["steps"]["mae"]["summary"]["step"] < NUM_STEPS

    commands.append(Command("run", "chain.yaml", "--work", "gentle", "--json", cwd=place))
    code, answer = commands[1].finish()
    assert code == 0, commands[1].said
    assert f"from checkpoint at step {saved}" in commands[1].said
    assert answer["steps"]["mae"]["summary"]["weights_sha256"] == undisturbed
