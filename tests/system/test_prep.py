"""Builds on a real Ray from and to a real S3 server, killed with -9 in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_prep.build import build
from data_prep.shards.verify import verify
from launch.s3_server import S3Server
from pipeline import storage
from pipeline.errors import ConfigError, StorageError, UserError
from tests.support.prep_cases import encoded, hashes, settings, sidecar, write_pairs
from tests.support.prep_server import SHARD, document, reach_server, run_server, start_driver, upload  # noqa: F401 -- fixtures

NUM_IMAGES = 40


def raw_photos(server: S3Server, name: str) -> str:
    """Images large enough that a shard takes a while, and their table, put through the server; the table's URL."""
    for i in range(NUM_IMAGES):
        storage.write(f"s3://raw/{name}/images/{i}.jpg", encoded(i, "JPEG", 1000, 800))
    # One input fails, so that accounts are compared as well.
    urls = [f"images/{i}.jpg" if i != 7 else "images/gone.jpg" for i in range(NUM_IMAGES)]
    upload(server, f"{name}/pairs.parquet", url=urls, caption=[f"photo {i}" for i in range(NUM_IMAGES)])
    return f"s3://raw/{name}/pairs.parquet"


def wait_for_markers(output: Path, count: int, driver: subprocess.Popen[str]) -> list[Path]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        markers = [p for p in (output / "_prep" / "partitions").rglob("*.json")] if output.exists() else []
        if len(markers) >= count:
            return markers
        assert driver.poll() is None, "the build ended before it could be disturbed"
        time.sleep(0.02)
    raise AssertionError("no partition was committed in time")


def test_killed_driver_and_killed_worker_change_nothing(s3: S3Server, tmp_path: Path) -> None:
    table = raw_photos(s3, "killed")
    output = s3.folder / "data-sets" / "killed"
    undisturbed = tmp_path / "undisturbed"
    build(
        settings(table, undisturbed, **{k: v for k, v in document(table, "x").items() if k not in ("output", "source")})
    )

    on_ray = document(table, "s3://data-sets/killed", ray={"tasks": 2})
    driver = start_driver(tmp_path / "first", on_ray)
    wait_for_markers(output, 2, driver)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    for process in psutil.wait_procs(family, timeout=5)[1]:  # Ray's own agents outlive their driver for a while
        process.kill()
    committed = len(list((output / "_prep" / "partitions").rglob("*.json")))
    assert committed < NUM_IMAGES // SHARD
    assert not list(output.rglob("manifest.json"))
    assert not (output / "prep.json").exists()

    driver = start_driver(tmp_path / "second", on_ray)
    wait_for_markers(output, committed + 2, driver)
    victims = [p for p in psutil.Process(driver.pid).children(recursive=True) if "_guarded" in " ".join(p.cmdline())]
    assert victims, "no task was running"
    os.kill(victims[0].pid, signal.SIGKILL)
    said, _ = driver.communicate(timeout=200)
    assert driver.returncode == 0
    # Ray reports the dead worker on stdout, before the driver's own line.
    assert said.splitlines()[-1].split() == [str(committed), str(NUM_IMAGES), str(NUM_IMAGES - 1)]

    assert hashes(output) == hashes(undisturbed)
    assert verify("s3://data-sets/killed").problems == ()
    assert sorted(row["position"] for row in sidecar(output / "train")) == list(range(NUM_IMAGES))


def test_one_worker_and_several_make_the_same_bytes(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "raw", 30)
    for workers in (0, 2):
        build(settings(table, tmp_path / f"out{workers}", ray={"tasks": workers}))
    assert hashes(tmp_path / "out0") == hashes(tmp_path / "out2")


def test_a_users_mistake_in_a_task_comes_back_as_it_is(tmp_path: Path) -> None:
    from data_prep import partitions
    from data_prep.config import RayConfig

    with pytest.raises(StorageError, match="storage of kind 'ftp' isn't known"):
        list(partitions.run(storage.read, ["ftp://host/file"], RayConfig(tasks=1)))


def failure(config_document: dict[str, Any]) -> UserError:
    """The one message that a build with these settings ends in."""
    url, output = config_document["source"]["url"], config_document["output"]
    more = {key: value for key, value in config_document.items() if key != "output"}
    with pytest.raises(UserError) as error:
        build(settings(url, output, **more))
    return error.value


def left(server: S3Server, bucket: str) -> list[str]:
    return sorted(
        str(path.relative_to(server.folder)) for path in (server.folder / bucket).rglob("*") if path.is_file()
    )


def test_bad_input_ends_in_one_message_before_anything_is_written(s3: S3Server, monkeypatch: Any) -> None:
    table = raw_photos(s3, "bad")
    good = {"output": "s3://data-sets/bad", "source": {"url": table}}
    before = left(s3, "data-sets")

    error = failure({**good, "output": "s3://no-such-bucket/x"})
    assert isinstance(error, StorageError)
    assert "no bucket 'no-such-bucket'" in str(error)

    error = failure({**good, "source": {"url": "s3://no-such-bucket/pairs.parquet"}})
    assert "no bucket 'no-such-bucket'" in str(error)

    error = failure({**good, "source": {"url": "s3://raw/bad/pears.parquet"}})
    assert "no such table" in str(error)
    assert "did you mean s3://raw/bad/pairs.parquet" in str(error)

    error = failure({**good, "source": {"url": table, "caption_column": "text"}})
    assert "no column 'text'" in str(error)
    assert "url, caption" in error.fix

    upload(s3, "bad/empty.parquet", url=[], caption=[])
    error = failure({**good, "source": {"url": "s3://raw/bad/empty.parquet"}})
    assert "holds no rows" in str(error)

    storage.write("s3://raw/bad/noise.bin", b"these bytes are no image")
    upload(s3, "bad/noise.parquet", url=["noise.bin"] * 3, caption=["x"] * 3)
    error = failure({**good, "source": {"url": "s3://raw/bad/noise.parquet"}})
    assert "none of the first 3 inputs can be used" in str(error)
    assert "no JPEG, PNG" in str(error)

    upload(s3, "bad/foreign.parquet", url=["s3://others/a.jpg", "/etc/passwd"], caption=["x"] * 2)
    error = failure({**good, "source": {"url": "s3://raw/bad/foreign.parquet"}})
    assert "place_not_allowed" in str(error)
    assert "source.allow" in str(error)

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    error = failure(good)
    assert isinstance(error, StorageError)
    assert "refused" in str(error).lower() or "credential" in str(error).lower()
    assert left(s3, "data-sets") == before


def test_an_output_that_holds_something_else_is_left_alone(s3: S3Server) -> None:
    table = raw_photos(s3, "occupied")
    storage.write("s3://data-sets/occupied/precious.txt", b"mine")
    error = failure({"output": "s3://data-sets/occupied", "source": {"url": table}})
    assert isinstance(error, ConfigError)
    assert "precious.txt" in str(error)
    assert left(s3, "data-sets/occupied") == ["data-sets/occupied/precious.txt"]


def test_real_photos_build_and_verify(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "raw" / "pairs.csv"
    shutil.copytree(photos.parent, table.parent)
    shares = {"train": 0.8, "heldout": 0.2}
    report = build(settings(table, tmp_path / "out", splits={"shares": shares}, shard={"samples": 16}))
    assert (report.inputs, report.written, report.failed) == (100, 100, {})
    assert verify(str(tmp_path / "out")).problems == ()
    rows = [row for split in shares for row in sidecar(tmp_path / "out" / split)]
    assert all(min(row["width"], row["height"]) == 256 for row in rows if row["original_height"] > 256)
    assert json.loads(rows[0]["exif"]) is not None
