"""Training over two nodes of a Ray that was there before, reached by its address."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.tiny_chain import REPOSITORY, Command, mae_config, prep_config, wait_for, write_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class RayNodes:
    """A head and a second node, each offering one core, started from a folder of their own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._folder = folder
        port = self.address.partition(":")[2]
        self.processes = [self._start("head", "--head", "--port", port, "--include-dashboard", "false")]
        wait_for(lambda: _answers(port), "the head node")
        self.processes.append(self._start("second", "--address", self.address))
        wait_for(lambda: "Ray runtime started" in (folder / "second.log").read_text(), "the second node")

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        common = ["--num-cpus", "1", "--object-store-memory", "100000000", "--disable-usage-stats", "--block"]
        with (self._folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [str(Path(sys.executable).parent / "ray"), "start", *arguments, *common],
                cwd=self._folder,
                env={**os.environ, **self.environment, "PYTHONPATH": str(REPOSITORY)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    ray = RayNodes(tmp_path_factory.mktemp("ray"))
    yield ray
    ray.stop()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    table = write_table(folder / "images")
    (folder / "prep.yaml").write_text(yaml.safe_dump(prep_config(table, output="data")))
    code, _ = Command("prep", "prep.yaml", cwd=folder).finish()
    assert code == 0
    config = {"name": "two", **mae_config(6)}
    config["data"] = {**config["data"], "train": "data/train", "evaluate": {"heldout": "data/heldout"}}
    (folder / "mae.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_two_nodes_train_together_in_the_drivers_folder(nodes: RayNodes, place: Path) -> None:
    several = ["--machines", "2", "--ranks", "1"]
    command = Command(
        "train", "mae.yaml", *several, "--ray", nodes.address, "--json", cwd=place, environment=nodes.environment
    )
    code, answer = command.finish()
    assert code == 0, command.said
    assert answer["step"] == 6
    assert yaml.safe_load((place / "runs/two/resolved.yaml").read_text())["world_size"] == 2

    alone = Command("train", "mae.yaml", "name=alone", "--no-ray", "--ranks", "2", "--json", cwd=place)
    code, calm = alone.finish()
    assert code == 0, alone.said
    assert calm["weights_sha256"] == answer["weights_sha256"]


def test_more_nodes_than_there_are_is_refused_with_the_shortfall(nodes: RayNodes, place: Path) -> None:
    command = Command(
        "train",
        "mae.yaml",
        "name=three",
        "--machines",
        "3",
        "--ray",
        nodes.address,
        cwd=place,
        environment=nodes.environment,
    )
    code, _ = command.finish()
    assert code == 2
    assert "missing 3 machines, of which there are 2" in command.said
    assert "Traceback" not in command.said


def test_an_address_without_a_ray_is_said_to_be_so(place: Path) -> None:
    command = Command("train", "mae.yaml", "name=lost", "--ray", "127.0.0.1:9", cwd=place)
    refused(command, "Ray at 127.0.0.1:9")


def test_a_ray_with_another_token_is_said_to_refuse(nodes: RayNodes, place: Path) -> None:
    environment = {**nodes.environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = Command("train", "mae.yaml", "name=lost", "--ray", nodes.address, cwd=place, environment=environment)
    refused(command, f"Ray at {nodes.address}", "RAY_AUTH_MODE")


def refused(command: Command, *words: str) -> None:
    try:
        code, _ = command.finish(timeout_s=100)
    finally:
        command.kill_everything()
    assert code == 2, command.said
    assert "Traceback" not in command.said
    for word in words:
        assert word in command.said


def _answers(port: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0
