"""Local files, written whole: to a temporary file beside the target, synced, then moved or linked into place."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.storage.store import Data, Entry

PARTIAL_SUFFIX = ".partial"  # files being written; never listed


class LocalFiles:
    """Files of this machine, or of a file system mounted on it."""

    def read(self, url: str) -> bytes:
        with _local_errors(url), open(_path(url), "rb") as file:
            return file.read()

    def read_range(self, url: str, start: int, stop: int) -> bytes:
        with _local_errors(url), open(_path(url), "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def write(self, url: str, data: Data) -> None:
        path = _path(url)
        with _local_errors(url), _whole_file(path, data) as partial:
            os.replace(partial, path)
            _sync_folder(path.parent)

    def create(self, url: str, data: Data) -> bool:
        path = _path(url)
        with _local_errors(url), _whole_file(path, data) as partial:
            try:
                os.link(partial, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                # No hard links here: claim the name, then put the content under it. A reader may see it empty once.
                try:
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                except FileExistsError:
                    return False
                os.replace(partial, path)
            _sync_folder(path.parent)
            return True

    create_conditionally = create

    def size_bytes(self, url: str) -> int | None:
        path = _path(url)
        try:
            with _local_errors(url):
                return path.stat().st_size if not path.is_dir() else None
        except FileNotFoundError:
            return None

    def entries(self, url: str) -> Iterator[Entry]:
        top = _path(url)
        paths: list[str] = []
        with _local_errors(url):
            for folder, _, names in os.walk(top, onerror=_raise_unless_missing):
                paths += [os.path.join(folder, name) for name in names if not name.endswith(PARTIAL_SUFFIX)]
        for path in sorted(paths, key=os.fsencode):
            try:
                facts = os.stat(path)
            except FileNotFoundError:
                if os.path.islink(path):
                    raise StorageError("a link to what isn't there", where=path, fix="mend or remove it") from None
                continue  # deleted since
            yield Entry(path, facts.st_size, str(facts.st_mtime_ns))

    def delete(self, url: str) -> None:
        with _local_errors(url):
            _path(url).unlink(missing_ok=True)

    def move(self, source: str, target: str) -> None:
        path = _path(target)
        with _local_errors(source):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(_path(source), path)
            _sync_folder(path.parent)

    def abort_uploads(self, url: str) -> int:
        return 0


def _path(url: str) -> Path:
    scheme, colon, rest = url.partition("://")
    if colon and scheme != "file":
        raise StorageError(f"storage of kind {scheme!r} isn't known", where=url, fix="use a path or s3://bucket/key")
    if not url:
        raise StorageError("an empty path", where="storage", fix="give a path or s3://bucket/key")
    return Path(rest if colon else url)


@contextlib.contextmanager
def _whole_file(path: Path, data: Data) -> Iterator[Path]:
    """A synced file with `data` beside `path`, to be moved or linked there; gone afterwards if it wasn't moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a new name durable; some file systems can't, and then the name is as durable as they make it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _local_errors(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free space there, or write elsewhere"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fix = "change the permissions, or use another place"
        elif error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
            fix = "a file stands where a folder is wanted, or the other way round: mend the path"
        else:
            fix = "check the path and the disk"
        raise StorageError((error.strerror or str(error)).lower(), where=url, fix=fix) from error


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error
