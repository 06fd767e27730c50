"""A real S3 server for builds, and drivers of builds in processes of their own, which tests kill."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.s3_server import S3Server, find_rclone
from pipeline import storage
from tests.support.prep_cases import write_table

SHARD = 4
DRIVER = """
import sys
from data_prep.build import build
from data_prep.config import PrepConfig
from pipeline.config import load, validate

report = build(validate(PrepConfig, load(sys.argv[1]), where=sys.argv[1]))
print(report.resumed_partitions, report.inputs, report.written)
"""


@pytest.fixture(scope="module", name="server")
def run_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if find_rclone() is None:
        pytest.skip("no rclone binary for this machine")
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("raw")
        server.bucket("data-sets")
        yield server


@pytest.fixture(name="s3")
def reach_server(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def document(table: str, output: str, **more: Any) -> dict[str, Any]:
    """Settings as YAML holds them; WebP from large JPEGs is slow enough to be interrupted."""
    return {
        "output": output,
        "source": {"url": table},
        "shard": {"samples": SHARD},
        "image": {"resize": "no", "format": "webp"},
        **more,
    }


def start_driver(folder: Path, settings_document: dict[str, Any]) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "prep.yaml").write_text(yaml.safe_dump(settings_document))
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder / "prep.yaml")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )


def upload(server: S3Server, key: str, **columns: list[Any]) -> None:
    """Put a table into the raw bucket through the server, which then knows of it at once."""
    path = write_table(server.folder / "table.parquet", **columns)
    storage.write(f"s3://raw/{key}", path.read_bytes())
