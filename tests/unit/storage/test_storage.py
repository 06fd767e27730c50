"""The one door to files: the same behaviour on disk and on S3, and messages that tell what is wrong."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from launch.s3_server import S3Server
from pipeline import storage
from pipeline.errors import StorageError
from pipeline.storage import local, retries, s3


def test_what_was_written_is_read_back(folder: str) -> None:
    url = storage.join(folder, "deep/down", "object.bin")
    storage.write(url, b"0123456789")
    assert storage.read(url) == b"0123456789"
    assert storage.size_bytes(url) == 10
    assert storage.exists(url)
    storage.write(url, b"new")
    assert storage.read(url) == b"new"


@pytest.mark.parametrize(("start", "stop", "expected"), [(0, 4, b"0123"), (3, 5, b"34"), (8, 20, b"89"), (5, 5, b"")])
def test_ranges_are_half_open_and_end_with_the_object(folder: str, start: int, stop: int, expected: bytes) -> None:
    url = storage.join(folder, "ten")
    storage.write(url, b"0123456789")
    assert storage.read_range(url, start, stop) == expected
    assert storage.read_range(url, 10, 12) == b""


def test_empty_objects(folder: str) -> None:
    url = storage.join(folder, "empty")
    storage.write(url, b"")
    assert storage.read(url) == b""
    assert storage.read_range(url, 0, 3) == b""
    assert storage.size_bytes(url) == 0


def test_a_missing_object_is_file_not_found(folder: str) -> None:
    url = storage.join(folder, "nothing")
    assert not storage.exists(url)
    for call in (storage.read, storage.size_bytes, lambda u: storage.read_range(u, 0, 4)):
        with pytest.raises(FileNotFoundError, match="nothing"):
            call(url)
    storage.delete(url)


def test_listing_is_sorted_deep_and_never_stale(folder: str) -> None:
    top = storage.join(folder, "run")
    for name in ("b/2", "b.x", "a", "B"):
        storage.write(storage.join(top, name), name.encode())
    storage.write(storage.join(folder, "run2/a"), b"a neighbour with the same beginning")

    def names() -> list[str]:
        return [entry.url.removeprefix(top + "/") for entry in storage.entries(top)]

    assert names() == ["B", "a", "b.x", "b/2"]
    assert [entry.size_bytes for entry in storage.entries(top)] == [1, 1, 3, 3]
    storage.delete(storage.join(top, "a"))
    storage.write(storage.join(top, "c"), b"")
    assert names() == ["B", "b.x", "b/2", "c"]
    assert list(storage.entries(storage.join(folder, "no-such-folder"))) == []


def test_create_never_replaces(folder: str) -> None:
    url = storage.join(folder, "claim")
    assert storage.create(url, b"first")
    assert not storage.create(url, b"second")
    assert storage.read(url) == b"first"


@pytest.mark.parametrize("kind", ["tmp_path", "moto_bucket"])
def test_of_many_creators_one_wins(kind: str, request: pytest.FixtureRequest) -> None:
    url = storage.join(str(request.getfixturevalue(kind)), "claim")
    start = threading.Barrier(12)

    def claim(i: int) -> bool:
        start.wait()
        return storage.create(url, f"writer {i}".encode() * 1000)

    with ThreadPoolExecutor(12) as pool:
        won = list(pool.map(claim, range(12)))
    assert won.count(True) == 1
    assert storage.read(url) == f"writer {won.index(True)}".encode() * 1000


def test_the_probe_tells_stores_apart(tmp_path: Path, bucket: str) -> None:
    assert storage.probe_conditional_writes(str(tmp_path))
    assert not storage.probe_conditional_writes(bucket)
    assert list(storage.entries(bucket)) == []


def test_the_probe_trusts_a_store_that_enforces(moto_bucket: str) -> None:
    assert storage.probe_conditional_writes(moto_bucket)
    assert list(storage.entries(moto_bucket)) == []


def test_large_objects_go_up_in_parts_and_come_back_whole(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_SIZE_BYTES", 5 * 2**20)
    data = os.urandom(1024) * (12 * 1024)
    url = storage.join(bucket, "large")
    storage.write(url, data)
    assert storage.read(url) == data


def test_a_link_that_leads_nowhere_is_no_missing_object_but_an_error(tmp_path: Path) -> None:
    storage.write(str(tmp_path / "real"), b"x")
    (tmp_path / "good.tar").symlink_to(tmp_path / "real")
    assert [entry.size_bytes for entry in storage.entries(str(tmp_path))] == [1, 1]
    (tmp_path / "lost.tar").symlink_to(tmp_path / "unmounted" / "lost.tar")
    with pytest.raises(StorageError, match=r"lost\.tar: a link to what isn't there"):
        list(storage.entries(str(tmp_path)))


def test_listings_longer_than_a_page(moto_bucket: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: storage.write(f"{moto_bucket}/{i:04d}", b""), range(1005)))
    assert [entry.url for entry in storage.entries(moto_bucket)] == [f"{moto_bucket}/{i:04d}" for i in range(1005)]


CALLS = {
    "read": storage.read,
    "read_range": lambda url: storage.read_range(url, 0, 4),
    "write": lambda url: storage.write(url, b"x"),
    "create": lambda url: storage.create(url, b"x"),
    "exists": storage.exists,
    "size_bytes": storage.size_bytes,
    "entries": lambda url: list(storage.entries(url)),
    "delete": storage.delete,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("server", ["bucket", "moto_bucket"])
def test_a_missing_bucket_is_named(call, server: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(server)
    with pytest.raises(StorageError, match=r"no bucket 'bucket-nowhere'.*Fix: create it") as caught:
        call("s3://bucket-nowhere/some/key")
    assert caught.value.where.startswith("s3://bucket-nowhere")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_wrong_credentials_are_named(call, bucket: str, rclone: S3Server, credentials) -> None:
    url = storage.join(bucket, "object")
    storage.write(url, b"x")
    credentials(rclone.endpoint, rclone.access_key, "not-the-secret")
    with pytest.raises(StorageError, match=r"refused the credentials.*AWS_SECRET_ACCESS_KEY") as caught:
        call(url)
    assert "not-the-secret" not in str(caught.value)


def test_no_credentials_at_all(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match=r"no usable credentials.*Fix: set AWS_ACCESS_KEY_ID"):
        storage.read(storage.join(bucket, "object"))


def test_an_unreachable_server_is_unavailable(credentials) -> None:
    credentials("http://127.0.0.1:9")
    with pytest.raises(storage.StorageUnavailable, match=r"http://127.0.0.1:9 can't be reached"):
        storage.read("s3://bucket-one/object")


class Flaky(BaseHTTPRequestHandler):
    """Answers as an overloaded or broken S3 server would, then as it should."""

    protocol_version = "HTTP/1.1"
    faults: ClassVar[list[str]] = []
    objects: ClassVar[dict[str, bytes]] = {}

    def answer(self, status: int, body: bytes, claimed: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if claimed is None else claimed))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = status >= 500 or claimed is not None

    def fault(self) -> bool:
        fault = self.faults.pop(0) if self.faults else None
        if fault == "busy":
            self.answer(503, b"<Error><Code>SlowDown</Code><Message>less</Message></Error>")
        elif fault == "reset":
            self.close_connection = True
        elif fault == "short":
            self.answer(200, b"12345", claimed=10)
        elif fault == "broken refusal":
            self.answer(503, b"<Error><Code>Slow", claimed=60)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # a reset
        return fault is not None

    def do_GET(self) -> None:
        if not self.fault():
            self.answer(200, self.objects.get(self.path, b"1234567890"))

    def do_HEAD(self) -> None:
        if self.path in self.objects:
            self.answer(200, self.objects[self.path])
        else:
            self.answer(404 if "?" not in self.path and self.path.count("/") > 1 else 200, b"")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("If-None-Match") == "*" and self.path in self.objects:
            return self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        if self.faults and self.faults[0] == "lost reply":
            self.faults.pop(0)
            self.objects[self.path] = body
            self.close_connection = True
        elif not self.fault():
            self.objects[self.path] = body
            self.answer(200, b"")
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def flaky(credentials):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    credentials(f"http://127.0.0.1:{server.server_address[1]}")
    Flaky.faults.clear()
    Flaky.objects.clear()
    yield Flaky
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("fault", ["busy", "reset", "short", "broken refusal"])
def test_faults_that_pass_are_retried(flaky: type[Flaky], fault: str) -> None:
    flaky.faults[:] = [fault]
    assert storage.read("s3://bucket-one/object") == b"1234567890"
    assert not flaky.faults


def test_a_server_that_ignores_byte_ranges_is_named(flaky: type[Flaky]) -> None:
    with pytest.raises(StorageError, match="ignores byte ranges"):
        storage.read_range("s3://bucket-one/object", 3, 6)


def test_faults_that_stay_are_unavailable(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    flaky.faults[:] = ["short", "broken refusal"] * 50
    with pytest.raises(storage.StorageUnavailable):
        storage.read("s3://bucket-one/object")
    assert len(flaky.faults) < 100


def test_a_lost_reply_doesnt_lose_the_claim(flaky: type[Flaky]) -> None:
    """The first PUT arrives but its reply doesn't; the second is refused because of the first."""
    flaky.faults[:] = ["lost reply"]
    assert storage.create("s3://bucket-one/claim", b"mine")
    assert flaky.objects == {"/bucket-one/claim": b"mine"}
    assert not storage.create("s3://bucket-one/claim", b"mine")


def test_a_failed_upload_leaves_what_was_there(tmp_path: Path) -> None:
    """The process is killed by its file-size limit half-way through the file."""
    target = tmp_path / "object"
    target.write_bytes(b"old")
    program = (
        "import resource, signal, sys; from pipeline import storage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "storage.write(sys.argv[1], bytes(100_000))"
    )
    result = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True)
    assert "StorageError" in result.stderr
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


def test_a_file_where_a_folder_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="mend the path"):
        storage.write(str(tmp_path / "file" / "below"), b"x")
    with pytest.raises(StorageError, match="mend the path"):
        storage.read(str(tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_full(path, mode):
        return open("/dev/full", "wb")

    monkeypatch.setattr(local, "open", open_full, raising=False)
    with pytest.raises(StorageError, match=r"no space left on device.*free space"):
        storage.write(str(tmp_path / "object"), bytes(10_000))


def test_unknown_kinds_of_storage_are_refused() -> None:
    with pytest.raises(StorageError, match="'gs' isn't known"):
        storage.read("gs://bucket/object")
    with pytest.raises(StorageError, match="names no object"):
        storage.write("s3://bucket-one", b"x")


def test_a_forked_child_reads_too(bucket: str) -> None:
    url = storage.join(bucket, "object")
    storage.write(url, b"parent's")
    program = (
        "import os, sys; from pipeline import storage\n"
        'assert storage.read(sys.argv[1]) == b"parent\'s"\n'
        "child = os.fork()\n"
        "if child == 0:\n"
        '    os._exit(0 if storage.read(sys.argv[1]) == b"parent\'s" else 1)\n'
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, url], check=True, timeout=60)


def test_importing_is_light() -> None:
    program = "import sys, pipeline.storage; sys.exit(any(m in sys.modules for m in ('s3fs', 'fsspec', 'torch')))"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_join() -> None:
    assert storage.join("s3://bucket/", "/a/", "b") == "s3://bucket/a/b"
    assert storage.join("/", "a") == "/a"
    assert storage.join("a", "", "b/c") == "a/b/c"
    assert storage.join("a/") == "a/"
    assert storage.join("", "a") == "a"
