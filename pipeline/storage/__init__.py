"""The one door to files: local paths and `s3://` URLs alike, through fsspec.

Only whole objects are written, so a reader sees all of an object or nothing of it; nothing here hands out an open
file for writing (on S3, leaving a `with` block on an exception would publish what was written so far).

Credentials come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, a profile or
an instance role), never from a configuration file.

Every function raises `FileNotFoundError` for a missing object and `pipeline.errors.StorageError` for a missing
bucket, refused credentials, an unreachable endpoint or a full disk. Answers that may pass (503, resets, time-outs) are
retried with growing, jittered waits first; `StorageUnavailable` is what remains when they don't.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator

from pipeline.storage.local import LocalFiles
from pipeline.storage.retries import retrying
from pipeline.storage.s3 import client
from pipeline.storage.store import Data, Entry, StorageUnavailable, Store

__all__ = [
    "Data",
    "Entry",
    "StorageUnavailable",
    "abort_uploads",
    "create",
    "delete",
    "entries",
    "exists",
    "is_remote",
    "join",
    "move",
    "probe_conditional_writes",
    "read",
    "read_range",
    "retrying",
    "size_bytes",
    "write",
]

_files = LocalFiles()


def join(base: str, *parts: str) -> str:
    """`base` with `parts` below it; empty parts are skipped, a part is never taken as absolute."""
    below = "/".join(part.strip("/") for part in parts if part.strip("/"))
    if not base or not below:
        return base or below
    return f"{base.rstrip('/')}/{below}"


def is_remote(url: str) -> bool:
    """Whether `url` names an object in S3 rather than a local file."""
    return url.startswith("s3://")


def read(url: str) -> bytes:
    """The whole object."""
    return _store(url).read(url)


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of the object; fewer where it ends before `stop`."""
    if not 0 <= start <= stop:
        raise ValueError(f"not a byte range: [{start}, {stop})")
    return _store(url).read_range(url, start, stop) if stop > start else b""


def write(url: str, data: Data) -> None:
    """Put `data` at `url`, replacing what was there at once; folders on the way are made."""
    _store(url).write(url, data)


def create(url: str, data: Data) -> bool:
    """Put `data` at `url` unless an object is there already; returns whether this call's data stand there now.

    Of several writers one wins, with its whole content visible at once, where the store enforces conditional writes
    (`probe_conditional_writes` tells); elsewhere the check and the write are two requests. A reply that is lost looks
    like a conflict: then the object is read back, so writers that race must write different bytes.
    """
    return _store(url).create(url, data)


def exists(url: str) -> bool:
    """Whether there is an object (for local paths: a file, not a folder)."""
    return _store(url).size_bytes(url) is not None


def size_bytes(url: str) -> int:
    """Size of the object."""
    size = _store(url).size_bytes(url)
    if size is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    return size


def entries(url: str) -> Iterator[Entry]:
    """Every object below folder `url`, at any depth, in byte order of the names; none where there is no such folder.

    Raises:
        StorageError: the folder can't be read, or a link in it leads nowhere: nothing is skipped silently.
    """
    return _store(url).entries(url)


def delete(url: str) -> None:
    """Remove the object; no error when it isn't there."""
    _store(url).delete(url)


def move(source: str, target: str) -> None:
    """Rename an object within its store, replacing what is at `target`: whole at every moment, no bytes pass through.

    On S3 this is a copy on the server, then a removal; a process that ends in between leaves both.
    """
    if is_remote(source) != is_remote(target):
        raise ValueError(f"{source} and {target} lie in different stores")
    _store(source).move(source, target)


def abort_uploads(url: str) -> int:
    """Abort unfinished multipart uploads below folder `url`; returns how many there were.

    A process that is killed leaves its parts behind, which no listing shows and which cost space all the same. Uploads
    under way end with an error, so this is for a place that nobody else writes to. Always 0 on a disk.
    """
    return _store(url).abort_uploads(url)


def probe_conditional_writes(url: str) -> bool:
    """Whether the store below folder `url` really refuses a create-only write onto something that exists.

    Some S3 servers accept `If-None-Match` and overwrite all the same. Leaves nothing behind.
    """
    probe = join(url, f".probe-{secrets.token_hex(8)}")
    store = _store(probe)
    try:
        store.write(probe, b"first")
        return not store.create_conditionally(probe, b"second") and store.read(probe) == b"first"
    finally:
        store.delete(probe)


def _store(url: str) -> Store:
    return client() if is_remote(url) else _files
