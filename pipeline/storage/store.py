"""The operations of every kind of storage; `pipeline.storage` documents what they mean to callers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from pipeline.errors import StorageError

Data: TypeAlias = bytes | memoryview


class StorageUnavailable(StorageError):  # noqa: N818 -- a state of the place, not a mistake
    """The store didn't answer, or said that it is busy, until the retries ran out: trying later may help."""


class Entry(NamedTuple):
    """One listed object: its full path or URL, and its size."""

    url: str
    size_bytes: int
    stamp: str = ""  # another one after the content was replaced: the file's time of modification, or the ETag


@runtime_checkable
class Store(Protocol):
    """One kind of storage. Errors are those that `pipeline.storage` promises."""

    def read(self, url: str) -> bytes: ...

    def read_range(self, url: str, start: int, stop: int) -> bytes: ...

    def write(self, url: str, data: Data) -> None: ...

    def create(self, url: str, data: Data) -> bool: ...

    def create_conditionally(self, url: str, data: Data) -> bool:
        """Like `create`, but by the store's conditional writes alone, without looking first."""
        ...

    def size_bytes(self, url: str) -> int | None:
        """Size of the object, None where there is none."""
        ...

    def entries(self, url: str) -> Iterator[Entry]: ...

    def delete(self, url: str) -> None: ...

    def move(self, source: str, target: str) -> None: ...

    def abort_uploads(self, url: str) -> int: ...
