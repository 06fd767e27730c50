"""Images that people give: files, folders, globs, s3:// and http(s):// URLs, encoded bytes, and pixels."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipeline import storage
from pipeline.data.images.decode import UnreadableSample, read_header
from pipeline.errors import DataError, StorageError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_BYTES = 100 * 2**20
TIMEOUT_S = 30.0
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_WEB = ("http://", "https://")
_WILDCARD = re.compile(r"[*?\[]")

ImageInput = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
"""A path or URL, an encoded file, or pixels: uint8 [H,W,3] in arrays, uint8 [3,H,W] in tensors."""


def find_images(places: Sequence[str]) -> list[str]:
    """The images that paths and URLs lead to, each once, in the order given; folders and globs are sorted by name.

    Raises:
        DataError: one of them leads to no image.
        StorageError: a place can't be listed.
    """
    images: dict[str, None] = {}
    for place in places:
        urls = _images_at(place)
        if not urls:
            raise DataError(
                "no image there",
                where=place,
                fix=f"give an image, a glob, a URL, or a folder with {', '.join(ENDINGS[:4])} and the like",
            )
        images.update(dict.fromkeys(urls))
    return list(images)


def list_images(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """One image or several as a list, with `find_images` for each path and URL.

    Raises:
        DataError, StorageError: see `find_images`.
    """
    single = isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor)
    several = cast("Sequence[ImageInput]", [images] if single else images)
    listed: list[ImageInput] = []
    for image in several:
        listed += find_images([str(image)]) if isinstance(image, str | os.PathLike) else [image]
    return listed


def image_names(images: Sequence[ImageInput]) -> list[str]:
    """Paths and URLs as they are; images that come as pixels are called by their places, from 0."""
    return [str(image) if isinstance(image, str | os.PathLike) else str(number) for number, image in enumerate(images)]


def image_bytes(image: ImageInput) -> bytes:
    """An image as an encoded file that lies upright; pixels become PNG, so nothing is lost.

    Raises:
        UnreadableSample: the file isn't there, too large, or no image.
        DataError: pixels of another type or shape than uint8 [H,W,3] (arrays) or [3,H,W] (tensors).
        StorageError: its place can't be reached at all.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(str(image))
    if isinstance(image, bytes):
        read_header(image)
        return _upright(image)
    if isinstance(image, Tensor):
        image = _of_tensor(image)
    elif isinstance(image, np.ndarray):
        image = _of_array(image)
    upright = ImageOps.exif_transpose(image)
    buffer = io.BytesIO()
    (upright if upright.mode in _PNG_MODES else upright.convert("RGB")).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _of_tensor(pixels: Tensor) -> Image.Image:
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        raise DataError(
            f"a tensor {tuple(pixels.shape)} of {pixels.dtype} is no image",
            where="images",
            fix="give uint8 [3,H,W] of values from 0 to 255",
        )
    return _of_array(pixels.detach().cpu().permute(1, 2, 0).numpy())


def _of_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise DataError(
            f"an array {pixels.shape} of {pixels.dtype} is no image",
            where="images",
            fix="give uint8 [H,W,3] of values from 0 to 255",
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


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


def _images_at(place: str) -> list[str]:
    if place.startswith(_WEB):
        return [place]
    wildcard = _WILDCARD.search(place)
    if storage.exists(place):
        return [place]
    if wildcard is None:
        return _only_images([entry.url for entry in storage.entries(place)])
    if not storage.is_remote(place):
        return _only_images(sorted(glob.glob(place, recursive=True)))
    folder = place[: wildcard.start()].rpartition("/")[0]
    pattern = re.compile(_pattern(place))
    return _only_images([entry.url for entry in storage.entries(folder) if pattern.fullmatch(entry.url)])


def _only_images(urls: Sequence[str]) -> list[str]:
    return [url for url in urls if url.lower().endswith(ENDINGS)]


def _pattern(wildcards: str) -> str:
    """A glob as a regular expression: `*` and `?` stay within a name, `**/` goes through any folders."""
    parts = re.split(r"(\*\*/|\*|\?|\[[^\]]*\])", wildcards)
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
