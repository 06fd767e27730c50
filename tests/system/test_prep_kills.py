"""Twenty random kill -9 of drivers and workers, with a watcher; and a store that fails one request in twenty."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_prep.build import build
from data_prep.shards.verify import verify
from launch.s3_server import S3Server
from pipeline import storage
from pipeline.data.manifest import read_manifest
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.prep_cases import encoded, hashes, settings, sidecar
from tests.support.prep_server import document, reach_server, run_server, start_driver, upload  # noqa: F401 -- fixtures

NUM_KILLS = 20
LIMIT_S = 1500


def photos(server: S3Server, name: str, count: int, size: tuple[int, int]) -> str:
    """A table of images in the raw bucket, two of which aren't there; its URL."""
    urls = [f"images/{i}.jpg" for i in range(count)]
    for i, url in enumerate(urls):
        if i % 50 != 7:
            storage.write(f"s3://raw/{name}/{url}", encoded(i % 40, "JPEG", size[0] + i // 40, size[1]))
    upload(server, f"{name}/pairs.parquet", url=urls, caption=[f"photo {i}" for i in range(count)])
    return f"s3://raw/{name}/pairs.parquet"


class Watcher(threading.Thread):
    """Lists and reads everything in the splits' folders every 50 ms, as a careless reader would."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.seen: set[tuple[str, str]] = set()
        self.rounds = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            for entry in storage.entries(self.url):
                name = entry.url.removeprefix(self.url + "/")
                if name.endswith((".tar", ".npy", ".parquet")) and not name.startswith("_prep/"):
                    with contextlib.suppress(FileNotFoundError):
                        self.seen.add((name, hashlib.sha256(storage.read(entry.url)).hexdigest()))
            self.rounds += 1


def victims(driver: int) -> list[psutil.Process]:
    """The worker processes that are in a task."""
    processes = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "_guarded" in " ".join(process.cmdline()):
                processes.append(process)
    return processes


def end_family(driver: int) -> None:
    """Kill a driver with -9; Ray's own processes, which outlive it for a while, are helped along."""
    family = psutil.Process(driver).children(recursive=True)
    os.kill(driver, signal.SIGKILL)
    for process in psutil.wait_procs(family, timeout=5)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 300)
def test_twenty_random_kills_lose_nothing_and_show_nothing_unfinished(s3: S3Server, tmp_path: Path) -> None:
    table = photos(s3, "kills", 400, (900, 700))
    output = "s3://data-sets/kills"
    local = {k: v for k, v in document(table, "x").items() if k not in ("output", "source")}
    expected = {}
    for workers in (1, 8):
        build(settings(table, tmp_path / f"with{workers}", **local, ray={"tasks": workers}))
        expected[workers] = hashes(tmp_path / f"with{workers}")
    assert expected[1] == expected[8]

    rng = random.Random(int(os.environ.get("VITRAIL_SEED", "0")))
    watcher = Watcher(output)
    watcher.start()
    kills: list[str] = []
    deadline = time.monotonic() + LIMIT_S
    attempt = 0
    while True:
        attempt += 1
        # Many deaths strike the same few tasks here, so they may be run again more often than usual.
        on_ray = document(table, output, ray={"tasks": 2, "task_retries": 30})
        driver = start_driver(tmp_path / f"attempt{attempt}", on_ray)
        while driver.poll() is None and len(kills) < NUM_KILLS:
            time.sleep(rng.uniform(0.2, 1.5))
            assert time.monotonic() < deadline, f"not done in time; killed so far: {kills}"
            busy = victims(driver.pid)
            if busy and rng.random() < 0.75:
                with contextlib.suppress(psutil.Error):
                    rng.choice(busy).kill()
                    kills.append("worker")
            elif driver.poll() is None and (busy or rng.random() < 0.01):
                end_family(driver.pid)
                kills.append("driver")
        driver.communicate(timeout=max(1, deadline - time.monotonic()))  # reads what Ray says of the dead, too
        if driver.returncode == 0:
            break
    watcher.done.set()
    watcher.join()
    assert len(kills) == NUM_KILLS, f"the build was done after {kills}"
    assert {"driver", "worker"} <= set(kills)

    rows = sidecar(s3.folder / "data-sets" / "kills" / "train")
    assert sorted(row["position"] for row in rows) == list(range(400))
    stored = hashes(s3.folder / "data-sets" / "kills")
    assert stored == expected[1]
    final = {(name, sha) for name, sha in stored.items() if not name.endswith(".json")}
    assert watcher.rounds > 20
    assert watcher.seen <= final, f"seen on the way: {watcher.seen - final}"
    assert verify(output).problems == ()
    shards = {shard.name: shard.sha256 for shard in read_manifest(f"{output}/train").shards}
    assert {name.removeprefix("train/"): sha for name, sha in watcher.seen if name.endswith(".tar")}.items() <= (
        shards.items()
    )


@pytest.fixture(name="through")
def put_proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server, for this process and its children."""
    with FaultProxy(s3.endpoint, seed=7) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_store_that_fails_one_request_in_twenty_loses_nothing(
    s3: S3Server, through: FaultProxy, tmp_path: Path, workers: int
) -> None:
    name = f"faults{workers}"
    table = photos(s3, name, 80, (64, 48))
    options: dict[str, Any] = {"shard": {"samples": 12}, "dedup": {"drop": "exact"}, "image": {"size": 32}}
    build(settings(table, tmp_path / "calm", **options))
    through.faults = (
        Fault("busy", 0.025),
        Fault("reset", 0.025),
        Fault("lost_reply", 0.025, methods="PUT"),
        Fault("delay", 0.02, seconds=0.1),
    )
    report = build(settings(table, f"s3://data-sets/{name}", **options, ray={"tasks": workers}))
    assert through.injected.total() >= 10
    assert {"busy", "reset"} <= set(through.injected)
    assert hashes(s3.folder / "data-sets" / name) == hashes(tmp_path / "calm")
    assert report.inputs == 80 == report.written + sum(report.filtered.values()) + sum(report.failed.values())
    assert report.failed == {"not_found": 2}
    through.faults = ()
    assert verify(f"s3://data-sets/{name}").problems == ()
