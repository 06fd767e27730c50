"""Encoded images to pixels: limits read from the header before anything is decoded, and scaled JPEG decoding.

Legend: H W pixels, RGB uint8 in rows.

Nothing here looks at EXIF orientation: preparation applies it, and shards hold upright images.
"""

from __future__ import annotations

import io
import math
import threading
from typing import NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from pipeline.data.images import turbojpeg

MAX_PIXELS = 89_478_485  # Pillow's own bound, above which it suspects a decompression bomb

# The scales, in eighths, at which decoding a JPEG is cheaper than at full size. Those from 5/8 to 7/8 exist too, but
# have no vector code: on photos of 640 x 480 they took 1.05 to 1.35 times as long as full size.
_JPEG_EIGHTHS = (1, 2, 3, 4)
_JPEG_END = b"\xff\xd9"

Encoded = bytes | memoryview
"""Bytes of an encoded image; a view where they are part of what was read."""


class UnreadableSample(Exception):  # noqa: N818 -- a state of the data; its slot is kept with weight 0
    """A sample that can't be used, with the reason in `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ImageHeader(NamedTuple):
    """Format and size of an encoded image, from its first bytes."""

    format: str  # "jpeg", "png", "webp", ...
    width: int
    height: int
    colours: str = ""  # of a JPEG: how its pixels are coded

    @property
    def scalable(self) -> bool:
        """Whether it is a JPEG that decodes at any eighth of its size; others' pixels Pillow converts, or decodes."""
        return self.format == "jpeg" and self.colours not in ("CMYK", "YCCK")


class PixelRectangle(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of pixels."""

    top: int
    left: int
    bottom: int
    right: int


def read_header(data: Encoded, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Format and size of an encoded image, without decoding it.

    Raises:
        UnreadableSample: no image, an empty one, or one of more than `max_pixels`.
    """
    if data[:2] == b"\xff\xd8":
        header = _jpeg_header(data)
    else:
        header = _open(data)[1]
    if header.width < 1 or header.height < 1:
        raise UnreadableSample(f"an image of {header.width}x{header.height} pixels")
    if header.width * header.height > max_pixels:
        raise UnreadableSample(f"{header.width}x{header.height} pixels are over the limit of {max_pixels}")
    return header


def decode(
    data: Encoded,
    min_size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    *,
    header: ImageHeader | None = None,
    part: PixelRectangle | None = None,
    scratch: bool = False,
) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels of an encoded image.

    Args:
        data: JPEG, PNG, WebP or another format Pillow reads. Of an animation the first frame is taken; transparency is
            laid over white; 16-bit grey keeps its upper 8 bits.
        min_size: (height, width) that suffices. A JPEG is then decoded at its smallest scale of k/8 that isn't below
            it, so the result may be smaller than the image.
        max_pixels: limit on the whole image, read from the header before decoding.
        header: what `read_header` said, where it was asked already.
        part: of the pixels, to return nothing else. Of a JPEG no more than it takes is decoded, where the library
            allows it (`pipeline.data.images.turbojpeg`); damage below the part is then not seen.
        scratch: the pixels may lie in memory of this thread's that its next call with `scratch` writes over.

    Raises:
        UnreadableSample: no image, a truncated or damaged one, or one over the limit.
    """
    header = header or read_header(data, max_pixels)
    if header.scalable:
        buffer = scratch_memory("decoded", 3 * header.height * header.width) if scratch else None
        return _decode_jpeg(data, header, min_size, part, buffer)
    image, _ = _open(data)
    try:
        if header.format == "jpeg" and min_size is not None:
            image.draft(None, (min(min_size[1], header.width), min(min_size[0], header.height)))
        return _cut(np.asarray(_rgb(image)), part)
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise UnreadableSample(f"damaged {header.format} ({error})") from error


def _decode_jpeg(
    data: Encoded,
    header: ImageHeader,
    min_size: tuple[int, int] | None,
    part: PixelRectangle | None,
    buffer: UInt8[np.ndarray, " bytes"] | None,
) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels, in `buffer` where there is one.

    A file that doesn't end as it should is decoded whole, so that a truncated one is found whatever the part.
    """
    height, width = min_size or (0, 0)
    try:
        if part is not None and data[-2:] == _JPEG_END:
            cut_pixels = turbojpeg.decode_part(data, _eighths(header, height, width), part, buffer)
            if cut_pixels is not None:
                return cut_pixels
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, buffer=buffer)
    except (ValueError, MemoryError) as error:
        raise UnreadableSample(f"damaged jpeg ({error})") from error
    return _cut(pixels, part)


def _eighths(header: ImageHeader, height: int, width: int) -> int:
    """The scale at which simplejpeg decodes: of the smallest size with at least `height` and `width` the largest scale,
    as several may give a tiny image the same size; without either, full size.
    """
    if height <= 0 and width <= 0:
        return 8
    sizes = [scaled_size((header.height, header.width), eighths / 8) for eighths in range(1, 9)]
    chosen = next((size for size in sizes if size[0] >= height and size[1] >= width), sizes[-1])
    return max(eighths for eighths, size in enumerate(sizes, 1) if size == chosen)


def _cut(pixels: UInt8[np.ndarray, "H W 3"], part: PixelRectangle | None) -> UInt8[np.ndarray, "h w 3"]:
    return pixels if part is None else pixels[part.top : part.bottom, part.left : part.right]


_memory = threading.local()


def scratch_memory(purpose: str, size: int) -> UInt8[np.ndarray, " bytes"]:
    """At least `size` bytes of this thread's own, the same at each call for a purpose: fresh memory for every image
    costs a fifth of the decoding, in page faults.
    """
    buffer: UInt8[np.ndarray, " bytes"] | None = getattr(_memory, purpose, None)
    if buffer is None or buffer.size < size:
        buffer = np.empty(size, np.uint8)
        setattr(_memory, purpose, buffer)
    return buffer


def scale_for_crop(crop: tuple[float, float], target: tuple[int, int]) -> float:
    """The smallest useful JPEG scale at which a crop (h, w) still has at least the pixels of `target` (h, w)."""
    needed = max(target[0] / crop[0], target[1] / crop[1])
    return next((eighths / 8 for eighths in _JPEG_EIGHTHS if eighths / 8 >= needed), 1.0)


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) of a JPEG of `size` decoded at `scale`; decoders round up."""
    return math.ceil(size[0] * scale), math.ceil(size[1] * scale)


def _jpeg_header(data: Encoded) -> ImageHeader:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise UnreadableSample(f"damaged jpeg ({error})") from error
    return ImageHeader("jpeg", width, height, colours)


def _open(data: Encoded) -> tuple[Image.Image, ImageHeader]:
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise UnreadableSample(f"over any sensible size ({error})") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadableSample("bytes that are no image" if data else "an empty file") from error
    return image, ImageHeader((image.format or "unknown").lower(), image.width, image.height)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "I":
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        white = Image.new("RGBA", above.size, "white")
        return Image.alpha_composite(white, above).convert("RGB")
    return image.convert("RGB")
