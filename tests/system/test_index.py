"""`vitrail index` as a command: killed in the middle, on S3, on what the real img2dataset has written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_prep.indexing.index import IndexOptions, index_tars
from data_prep.shards.verify import verify
from launch.s3_server import S3Server, find_rclone
from pipeline import storage
from pipeline.data.instances import Fitted, InstanceExample
from pipeline.data.manifest import manifest_bytes, read_manifest
from tests.support.loaders import swept
from tests.support.prep_cases import encoded, write_table
from tests.support.tar_sets import pair_members, sa1b_members, write_tar
from tests.support.web_server import serving
from tests.unit.data_prep.test_indexing import ours, theirs

ROOT = Path(__file__).resolve().parents[2]
NUM_TARS = 600


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "index", *arguments, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_index_goes_on_and_ends_as_if_nothing_had_been(tmp_path: Path, number: int) -> None:
    source, whole, parts = (tmp_path / name for name in ("tars", "whole", "parts"))
    first = write_tar(source / "00000.tar", pair_members(0, 2))
    for i in range(1, NUM_TARS):
        shutil.copy(first, source / f"{i:05d}.tar")
    index_tars(IndexOptions(str(source), str(whole)))
    process = start(str(source), "--to", str(parts), "--workers", "2")
    journal = parts / "_index" / "journal"
    while not any(journal.glob("*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 75)
    assert not (parts / "manifest.json").exists()
    done = sum(len(json.loads(chunk.read_text())["tars"]) for chunk in journal.glob("*.json"))
    assert 0 < done < NUM_TARS
    result = index_tars(IndexOptions(str(source), str(parts)))
    assert result.num_read == NUM_TARS - done
    found_files = files_of(parts)  # with what was half-written at the kill, which no listing shows
    left = [found_files.pop(name) for name in list(found_files) if name.endswith(".partial")]
    assert found_files == files_of(whole)
    assert len(left) <= 2


def test_tars_on_s3_are_indexed_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_rclone() is None:
        pytest.skip("rclone has no wheel for this machine")
    write_tar(tmp_path / "local" / "sa_0.tar", sa1b_members(0, 5), folder="./")
    write_tar(tmp_path / "local" / "sub" / "sa_1.tar", sa1b_members(5, 4))
    local = index_tars(IndexOptions(str(tmp_path / "local"), str(tmp_path / "to"))).manifest
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.bucket("raw")
        server.bucket("mine")
        for tar in sorted((tmp_path / "local").rglob("*.tar")):
            storage.write(f"s3://raw/sa/{tar.relative_to(tmp_path / 'local')}", tar.read_bytes())
        process = start("s3://raw/sa", "--to", "s3://mine/sa")
        output, said = process.communicate()
        assert process.returncode == 0, said
        assert json.loads(output.splitlines()[-1])["num_read"] == 2
        again = index_tars(IndexOptions("s3://raw/sa", "s3://mine/sa"))
        assert (again.already, again.num_read) == (True, 0)
        manifest = read_manifest("s3://mine/sa")
        assert manifest.shards == local.shards
        assert manifest.shards_url == "s3://raw/sa"
        assert [entry.url for entry in storage.entries("s3://raw/sa")] == [
            "s3://raw/sa/sa_0.tar",
            "s3://raw/sa/sub/sa_1.tar",
        ]
        assert ours(manifest) == theirs(tmp_path / "local")
        assert verify("s3://mine/sa").problems == ()
        transform = InstanceExample(Fitted((32, 32)))
        batches = [next(swept(each, transform, rank=0, world_size=1, batch=9)) for each in (manifest, local)]
        assert [batch.weight.sum() for batch in batches] == [9, 9]
        assert torch.equal(batches[0].images, batches[1].images)
        data = bytearray(storage.read("s3://raw/sa/sa_0.tar"))
        data[1100] ^= 1
        storage.write("s3://raw/sa/sa_0.tar", bytes(data))
        assert index_tars(IndexOptions("s3://raw/sa", "s3://mine/sa")).changed == ("sa_0.tar",), "told by its ETag"
        assert index_tars(IndexOptions("s3://raw/sa")).manifest.shards_url is None
        assert len(manifest_bytes(read_manifest("s3://raw/sa"))) > 0


@pytest.mark.slow
def test_what_the_real_img2dataset_writes_is_indexed(tmp_path: Path) -> None:
    """It has an environment of its own, which `python -m benchmarks --only prep` makes."""
    program = ROOT / "build" / "img2dataset" / "bin" / "img2dataset"
    if not program.exists():
        pytest.skip("no img2dataset: run `python -m benchmarks --only prep` once")
    pages = {f"/{i}.jpg": encoded(i) for i in range(40)}
    with serving(pages) as server:
        urls = [f"{server.url}/{i}.jpg" for i in range(40)] + [f"{server.url}/none.jpg"]
        write_table(tmp_path / "pairs.parquet", url=urls, caption=[f"photo {i}" for i in range(41)])
        command = [
            *(str(program), f"--url_list={tmp_path / 'pairs.parquet'}", "--input_format=parquet", "--url_col=url"),
            *("--caption_col=caption", f"--output_folder={tmp_path / 'out'}", "--output_format=webdataset"),
            *("--processes_count=1", "--thread_count=8", "--number_sample_per_shard=15", "--resize_mode=no"),
            *("--compute_hash=sha256", "--enable_wandb=False", "--skip_reencode=True", "--retries=0"),
        ]
        environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    process = start(str(tmp_path / "out"))
    output, said = process.communicate()
    assert process.returncode == 0, said
    answer = json.loads(output.splitlines()[-1])
    assert (answer["num_samples"], answer["num_shards"]) == (40, 3)
    assert answer["members"] == {"jpg": 40, "json": 40, "txt": 40}
    assert (answer["unread"], answer["without_image"]) == ({}, 0)
    manifest = read_manifest(str(tmp_path / "out"))
    result = ours(manifest)
    assert result == theirs(tmp_path / "out")
    for _, members in result:
        number = int(members["txt"].decode().removeprefix("photo "))
        assert members["jpg"] == pages[f"/{number}.jpg"]
    assert verify(str(tmp_path / "out")).problems == ()
