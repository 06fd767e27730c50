"""Training whose data, checkpoints and run directory lie in S3, on a real server that checks signatures."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.s3_server import S3Server, find_rclone
from pipeline import storage
from pipeline.run_dir import RunDir
from pipeline.train.checkpoints import commits
from pipeline.train.checkpoints.restore import damage_of, read_weights
from tests.support import run_cases, train_cases
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.process_group import ProcessGroup
from tests.unit.data.conftest import numbered, write_data_set


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if find_rclone() is None:
        pytest.skip("rclone has no wheel for this machine")
    with pytest.MonkeyPatch.context() as patch, S3Server(tmp_path_factory.mktemp("s3")) as server:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.bucket("training-bucket")
        yield "s3://training-bucket"


def test_a_run_in_s3_stops_resumes_and_ends_like_one_on_disk(bucket: str, tmp_path: Path) -> None:
    train_cases.write_data(tmp_path)
    write_data_set(f"{bucket}/train", numbered([40, 24]))
    write_data_set(f"{bucket}/heldout", numbered([10]))
    group = ProcessGroup(2)  # started now: it inherits the server's credentials
    try:
        local = group.run(run_cases.run, train_cases.document(tmp_path, "local"))[0]
        places = {"data.train": f"{bucket}/train", "data.evaluate": {"heldout": f"{bucket}/heldout"}}
        document = train_cases.document(tmp_path, "remote", runs=f"{bucket}/runs", **places)
        assert group.run(run_cases.run_until, document, 6)[0][0] == "stopped"
        remote = group.run(run_cases.run, document)[0]
    finally:
        group.close()
    assert remote == local
    run = RunDir(f"{bucket}/runs/remote")
    assert run.status()["resumed_from"] == "checkpoint at step 6 of attempt 1"
    assert [m["step"] for m in run.metrics() if m["kind"] == "train"] == list(range(1, 21))
    assert run.evaluations()[20]["figures"].keys() == {"heldout/reconstruction_mse"}
    names = [entry.url.removeprefix(run.url) for entry in storage.entries(run.url)]
    assert any(name.startswith("/metrics/000002-") for name in names)
    assert any(name.startswith("/tensorboard/events") for name in names)
    assert read_weights(run.url).keys() == read_weights(str(tmp_path / "runs" / "local")).keys()
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    assert not any(secret in storage.read(run.at(name)) for name in names)


FAULTS = [
    Fault("busy", 0.08),
    Fault("reset", 0.08),
    Fault("lost_reply", 0.05, methods="PUT|POST"),
    Fault("truncate", 0.05, methods="GET"),
    Fault("delay", 0.1, seconds=0.2),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_never_stops_for_an_upload_and_every_commit_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints and run directory lie behind a proxy that delays, resets, loses replies and answers 503."""
    train_cases.write_data(tmp_path)
    with S3Server(tmp_path / "s3") as server, FaultProxy(server.endpoint, FAULTS, seed=4) as proxy:
        server.bucket("faulty-bucket")
        for name, value in {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        group = ProcessGroup(2)
        try:
            changes = {"checkpoint.every_samples": 16, "checkpoint.keep_last": 6, "length_samples": 16 * 24}
            local = group.run(run_cases.run, train_cases.document(tmp_path, "local", **changes))[0]
            document = train_cases.document(tmp_path, "faulty", runs="s3://faulty-bucket/runs", **changes)
            assert group.run(run_cases.run_until, document, 12)[0][0] == "stopped"
            remote = group.run(run_cases.run, document)[0]
        finally:
            group.close()
        injected = dict(proxy.injected)
        proxy.faults = ()
        assert remote == local
        assert all(injected.get(fault.kind, 0) > 3 for fault in FAULTS), injected
        run = RunDir("s3://faulty-bucket/runs/faulty")
        found = commits.find_commits(run.checkpoints_url)
        assert len(found.commits) >= 4
        for commit in found.commits:
            assert damage_of(commit) == "", commit.url


def test_of_attempts_that_begin_at_once_each_number_has_one(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this server, which ignores If-None-Match, the weaker way is taken."""
    url = f"{bucket}/races"
    assert not storage.probe_conditional_writes(url)
    found: list[commits.Attempt | None] = []
    threads = [
        threading.Thread(target=lambda: found.append(commits.begin_attempt(url, 0, enforced=False))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [attempt for attempt in found if attempt is not None]
    assert len({attempt.number for attempt in winners}) == len(winners) >= 1
    assert commits.read_attempts(url) == sorted(winners)
