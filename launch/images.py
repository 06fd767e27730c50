"""The images a command is given: files, folders, globs, s3:// and http(s):// URLs."""

from __future__ import annotations

import contextlib
import glob
import io
import re
import urllib.error
import urllib.request
from collections.abc import Sequence

from PIL import Image, ImageOps

from pipeline import storage
from pipeline.data.images.decode import UnreadableSample, read_header
from pipeline.errors import DataError, StorageError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_BYTES = 100 * 2**20
TIMEOUT_S = 30.0
_WEB = ("http://", "https://")
_WILD = re.compile(r"[*?\[]")


def find_images(given: Sequence[str]) -> list[str]:
    """The images meant by paths and URLs, each once, in the order given; folders and globs are sorted by name.

    Raises:
        DataError: one of them leads to no image.
        StorageError: a place can't be listed.
    """
    found: dict[str, None] = {}
    for one in given:
        places = _places(one)
        if not places:
            raise DataError(
                "no image there",
                where=one,
                fix=f"give an image, a glob, a URL, or a folder with {', '.join(ENDINGS[:4])} and the like",
            )
        found.update(dict.fromkeys(places))
    return list(found)


def read_image(url: str) -> bytes:
    """The bytes of an image that lies upright: one with an EXIF orientation is turned and comes as PNG.

    Raises:
        UnreadableSample: it isn't there, too large, or no image.
        StorageError: its place can't be reached at all.
    """
    try:
        data = _from_web(url) if url.startswith(_WEB) else storage.read_range(url, 0, MAX_BYTES + 1)
    except FileNotFoundError:
        raise UnreadableSample("nothing there") from None
    if len(data) > MAX_BYTES:
        raise UnreadableSample(f"more than {MAX_BYTES} bytes")
    read_header(data)
    return _upright(data)


def _places(given: str) -> list[str]:
    if given.startswith(_WEB):
        return [given]
    if not _WILD.search(given) or storage.exists(given):
        if storage.exists(given):
            return [given]
        return _images([entry.url for entry in storage.entries(given)])
    if not storage.is_remote(given):
        return _images(sorted(glob.glob(given, recursive=True)))
    before = given[: _WILD.search(given).start()]  # type: ignore[union-attr]  # it was found just above
    pattern = re.compile(_pattern(given))
    return _images([e.url for e in storage.entries(before.rpartition("/")[0]) if pattern.fullmatch(e.url)])


def _images(urls: Sequence[str]) -> list[str]:
    return [url for url in urls if url.lower().endswith(ENDINGS)]


def _pattern(wild: str) -> str:
    """A glob as a regular expression: `*` and `?` stay within a name, `**/` goes through any folders."""
    parts = re.split(r"(\*\*/|\*|\?|\[[^\]]*\])", wild)
    meant = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(meant.get(p, p if p.startswith("[") and p.endswith("]") else re.escape(p)) for p in parts)


def _from_web(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "vitrail"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            data: bytes = reply.read(MAX_BYTES + 1)
            return data
    except urllib.error.HTTPError as error:
        raise UnreadableSample(f"the server says {error.code} {error.reason}") from error
    except (OSError, ValueError) as error:
        raise StorageError(
            f"no answer ({getattr(error, 'reason', error)})", where=url, fix="check the URL and the network"
        ) from error


def _upright(data: bytes) -> bytes:
    with contextlib.suppress(Exception):  # damaged EXIF is as good as none; decoding judges the rest
        image = Image.open(io.BytesIO(data))
        if image.getexif().get(274, 1) not in (0, 1):
            turned = ImageOps.exif_transpose(image)
            buffer = io.BytesIO()
            turned.save(buffer, "PNG")
            return buffer.getvalue()
    return data
