"""Real S3 servers: rclone (signatures are checked, conditional writes aren't) and moto (the other way round)."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.s3_server import S3Server, find_rclone

ACCESS_KEY = "storage-test-access"
SECRET_KEY = "storage-test-secret"


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An rclone S3 server with an empty bucket `bucket-one`."""
    if find_rclone() is None:
        pytest.skip("rclone has no wheel for this machine")
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("bucket-one")
        yield server


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the server doesn't listen"
            time.sleep(0.05)


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """A moto S3 server, without buckets."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Point this process's S3 at an endpoint."""

    def point(endpoint: str, access: str = ACCESS_KEY, secret: str = SECRET_KEY) -> None:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    return point


@pytest.fixture
def bucket(rclone: S3Server, credentials: Callable[..., None], request: pytest.FixtureRequest) -> str:
    """A folder of its own in rclone's bucket, credentials set."""
    credentials(rclone.endpoint, rclone.access_key, rclone.secret_key)
    return f"s3://bucket-one/{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture
def moto_bucket(moto_endpoint: str, credentials: Callable[..., None], request: pytest.FixtureRequest) -> str:
    """A folder of its own in a bucket of moto's, credentials set."""
    from s3fs import S3FileSystem

    credentials(moto_endpoint)
    fs = S3FileSystem(endpoint_url=moto_endpoint, skip_instance_cache=True)
    if not fs.exists("bucket-two"):
        fs.mkdir("bucket-two")
    return f"s3://bucket-two/{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture(params=["local", "rclone", "moto"])
def folder(request: pytest.FixtureRequest) -> str:
    """A folder on each kind of storage."""
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path"))
    return str(request.getfixturevalue("bucket" if request.param == "rclone" else "moto_bucket"))
