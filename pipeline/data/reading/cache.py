"""Ranges of remote objects kept on a local disk, up to a size limit, shared by all processes of a machine.

Objects are kept in pieces of a mebibyte, so runs that are cut elsewhere in another epoch find what an earlier one
brought. Every piece carries a digest: one that a crash or a bad disk damaged is fetched again, never used. When the
limit is reached the pieces that were used longest ago go. A cache that can't be written (a full disk) is done without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PIECE_BYTES = 2**20
_DIGEST_BYTES = 16
_KEPT_SHARE = 0.9  # of the limit, after making room
_ABANDONED_S = 3600.0  # half-written files that old are of writers that died
_TOUCH_S = 60.0  # a piece's last use is known to about this

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RangeCache:
    """A folder of pieces.

    Args:
        folder: a local path; made where it doesn't exist.
        limit_bytes: what the pieces may take up together.
    """

    folder: str
    limit_bytes: int

    def read(self, name: str, start: int, stop: int, size_bytes: int, fetch: Callable[[int, int], bytes]) -> memoryview:
        """Bytes [start, stop) of an object, from the cache where it has them.

        Args:
            name: of the object's content, so that a changed object has another one.
            size_bytes: of the object.
            fetch: reads bytes [start, stop) of the object from where it lies; may return fewer where it ends early.
        """
        first, last = start // PIECE_BYTES, (stop - 1) // PIECE_BYTES
        pieces = {number: self._load(name, number) for number in range(first, last + 1)}
        for run_first, run_last in _runs([number for number, data in pieces.items() if data is None]):
            begin, end = run_first * PIECE_BYTES, min((run_last + 1) * PIECE_BYTES, size_bytes)
            data = memoryview(fetch(begin, end))
            fresh = {n: bytes(data[n * PIECE_BYTES - begin :][:PIECE_BYTES]) for n in range(run_first, run_last + 1)}
            pieces |= fresh
            self._store(name, {n: piece for n, piece in fresh.items() if len(piece) == _piece_size(n, size_bytes)})
        joined = bytearray()
        for number, piece in pieces.items():
            joined += piece or b""
            if len(piece or b"") < _piece_size(number, size_bytes):
                break  # the object ends earlier than it should
        return memoryview(joined)[start - first * PIECE_BYTES : stop - first * PIECE_BYTES]

    def _load(self, name: str, number: int) -> bytes | None:
        path = self._path(name, number)
        try:
            content = path.read_bytes()
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _TOUCH_S:
                    os.utime(path)
        except OSError:
            return None
        data, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if _digest(data) != digest:
            logger.warning("%s is damaged; fetching it again", path)
            path.unlink(missing_ok=True)
            return None
        return data

    def _store(self, name: str, pieces: dict[int, bytes]) -> None:
        needed = sum(len(data) + _DIGEST_BYTES for data in pieces.values())
        if not pieces or needed > self.limit_bytes:
            return
        contents = {self._path(name, number): data + _digest(data) for number, data in pieces.items()}
        partials: dict[Path, Path] = {}
        try:
            partials = self._reserve({path: len(content) for path, content in contents.items()})
            for path, partial in partials.items():
                with partial.open("r+b") as file:  # not truncated: it keeps the room it was given
                    file.write(contents[path])
                os.replace(partial, path)
        except OSError as error:
            for partial in partials.values():
                partial.unlink(missing_ok=True)
            logger.warning("can't write the cache at %s (%s); doing without", self.folder, error.strerror or error)

    def _reserve(self, sizes: dict[Path, int]) -> dict[Path, Path]:
        """Make room where the limit asks for it, and files of the final sizes under names of their own.

        Files rather than a number alone: another process that counts afresh meanwhile sees what is about to be written.
        """
        needed = sum(sizes.values())
        partials = {}
        with self._total() as (read, write):
            total = read() + needed
            if total > self.limit_bytes:
                total = self._make_room(int(self.limit_bytes * _KEPT_SHARE) - needed) + needed
            for path, size in sizes.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                partials[path] = path.parent / f".{secrets.token_hex(8)}"
                with partials[path].open("wb") as file:
                    file.truncate(size)
            write(total)
        return partials

    @contextlib.contextmanager
    def _total(self) -> Iterator[tuple[Callable[[], int], Callable[[int], None]]]:
        """The number of bytes kept, locked: an upper bound, exact after `_make_room`."""
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "total", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)

            def read() -> int:
                text = os.pread(descriptor, 32, 0).strip()
                return int(text) if text.isdigit() else self.limit_bytes + 1  # unknown: count

            def write(total: int) -> None:
                os.pwrite(descriptor, f"{total:<31}\n".encode(), 0)

            yield read, write
        finally:
            os.close(descriptor)

    def _make_room(self, allowed: int) -> int:
        """Delete the pieces used longest ago until the rest takes at most `allowed` bytes; what it takes."""
        cached, total = [], 0
        for path in Path(self.folder).glob("??/*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                if not path.name.startswith("."):
                    cached.append((facts.st_mtime, facts.st_size, path))
                elif time.time() - facts.st_mtime > _ABANDONED_S:
                    path.unlink()
                    continue
                total += facts.st_size
        for _, size, path in sorted(cached, key=lambda item: item[0]):
            if total <= max(allowed, 0):
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _path(self, name: str, number: int) -> Path:
        key = hashlib.blake2b(f"{name} {number}".encode(), digest_size=16).hexdigest()
        return Path(self.folder) / key[:2] / key[2:]


def _piece_size(number: int, size_bytes: int) -> int:
    return min(PIECE_BYTES, size_bytes - number * PIECE_BYTES)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, last)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
