"""The tar format as far as data sets use it: USTAR, and the long names of GNU tar and PAX. Strict, and without files.

One walk serves the reader of a sample, who has its bytes, and the indexing of tars, which sees each byte once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeVar

from pipeline.data.images.decode import UnreadableSample

BLOCK_BYTES = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of several in a sample the first of these is its image
EXTENSIONS = frozenset({*IMAGE_EXTENSIONS, "txt", "json", "cls"})  # of the members that stages read
_MAX_EXTENDED_HEADER_BYTES = 2**20

Content = TypeVar("Content")
Take = Callable[[int, int], bytes | memoryview]
"""Bytes [start, stop) of what is walked. Ranges are asked for in rising order, and those in between never."""


class DamagedTar(UnreadableSample):
    """An invalid header, or an archive that ends too early; `at` is the byte where that was noticed."""

    def __init__(self, reason: str, at: int) -> None:
        super().__init__(reason)
        self.at = at


class TarEntry(NamedTuple):
    """One entry met while walking a tar."""

    kind: Literal["file", "folder", "other", "end"]  # other: links and devices; end: a block of zeros
    name: str
    header: int  # where its first header starts, extended ones included
    start: int  # of the content
    stop: int  # of the content, which is padded to whole blocks


class Member(NamedTuple):
    """A file in a tar: its name, and where its content lies."""

    name: str
    start: int
    stop: int


def tar_entries(take: Take, size_bytes: int) -> Iterator[TarEntry]:
    """Everything in a tar, or in a piece of one that starts at a header.

    Args:
        take: gives the bytes.
        size_bytes: of the tar or piece.

    Raises:
        DamagedTar: a damaged header, or a member that goes on beyond the end.
    """
    at = first = 0
    long_name = ""
    while at + BLOCK_BYTES <= size_bytes:
        header = bytes(take(at, at + BLOCK_BYTES))
        header_at, at = at, at + BLOCK_BYTES
        if not header.strip(b"\0"):
            yield TarEntry("end", "", header_at, at, at)
            first = at
            continue
        if _octal(header[148:156], "checksum", header_at) != sum(header) - sum(header[148:156]) + 8 * 0x20:
            raise DamagedTar("damaged tar header (checksum)", header_at)
        size = _octal(header[124:136], "size", header_at)
        start, stop = at, at + size
        at = stop + -size % BLOCK_BYTES
        if stop > size_bytes:
            raise DamagedTar("a tar member goes on beyond the end", header_at)
        kind = header[156:157]
        if kind in (b"L", b"x"):
            if size > _MAX_EXTENDED_HEADER_BYTES:
                raise DamagedTar("an extended tar header of over a megabyte", header_at)
            content = bytes(take(start, stop))
            long_name = _text(content.rstrip(b"\0")) if kind == b"L" else _pax_path(content, header_at)
            continue
        if kind in (b"g", b"K"):  # for all members that follow; a link's target
            continue
        name = long_name or _short_name(header)
        if kind in (b"0", b"\0", b"7"):
            yield TarEntry("file", name, first, start, stop)
        else:
            yield TarEntry("folder" if kind == b"5" else "other", name, first, start, stop)
        long_name, first = "", at
    if at < size_bytes and bytes(take(at, size_bytes)).strip(b"\0"):
        raise DamagedTar("the bytes end within a tar header", at)


def tar_members(data: memoryview) -> Iterator[Member]:
    """The regular files of a piece of a tar that starts at a header.

    Raises:
        UnreadableSample: a damaged header, or a member that goes on beyond the end.
    """
    for entry in tar_entries(lambda start, stop: data[start:stop], len(data)):
        if entry.kind == "file":
            yield Member(entry.name, entry.start, entry.stop)


def key_and_extension(name: str) -> tuple[str, str] | None:
    """WebDataset's rule: the key is a member's path up to the first dot of its base name, the rest is the extension,
    in lower case. None where there is no dot, or nothing before it: such a member belongs to no sample.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and dot else None


def first_image(members: Mapping[str, Content]) -> Content | None:
    """Of a sample's members by extension, the one that is its image; None where none is."""
    return next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)


def _octal(field: bytes, what: str, at: int) -> int:
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise DamagedTar(f"damaged tar header ({what})", at) from error


def _short_name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0", 1)[0])
    prefix = _text(header[345:500].split(b"\0", 1)[0]) if header[257:262] == b"ustar" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")  # different names stay different


def _pax_path(records: bytes, at: int) -> str:
    """The `path` record of a PAX header, "" without one; sizes beyond 8 GB, which need a record too, are refused."""
    path = ""
    while records:
        length, space, _ = records.partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(records):
            raise DamagedTar("damaged PAX header", at)
        name, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if name == b"size":
            raise DamagedTar("a PAX header that changes a member's size", at)
        if name == b"path":
            path = _text(value)
        records = records[int(length) :]
    return path
