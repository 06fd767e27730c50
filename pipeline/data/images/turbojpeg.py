"""Parts of JPEGs through TurboJPEG's own interface, which no Python binding offers: rows above a part are only
entropy-decoded, columns beside it as well, rows below it not at all.

TurboJPEG 3 is looked for in this order: the file that `VITRAIL_TURBOJPEG` names (empty: none at all), the system's
libturbojpeg, and pylibjxl, whose extension module exports it. Without any, `find` says so and JPEGs are decoded whole.

Source: libjpeg-turbo, turbojpeg.h (TurboJPEG 3 API); the numbers below are its TJINIT, TJPARAM, TJSAMP and TJPF.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import math
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

_DECOMPRESS, _RGB = 1, 0
_SUBSAMPLING, _WIDTH, _HEIGHT = 4, 5, 6  # parameters
_BLOCK_WIDTHS = (8, 16, 16, 8, 8, 32, 8)  # pixels of an MCU by subsampling: 444, 422, 420, grey, 440, 411, 441
# Enlarging chroma looks two pixels beside its own, which a part's first and last columns don't have.
_MARGIN = 2

logger = logging.getLogger(__name__)


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class _Factor(ctypes.Structure):
    _fields_ = [("num", ctypes.c_int), ("denom", ctypes.c_int)]


class TurboJPEG:
    """The shared library's functions.

    Raises:
        OSError: it can't be loaded.
        AttributeError: it isn't TurboJPEG 3.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        handle, data = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]
        self.start = _function(library, "tj3Init", handle, ctypes.c_int)
        self.destroy = _function(library, "tj3Destroy", None, handle)
        self.read_header = _function(library, "tj3DecompressHeader", ctypes.c_int, handle, *data)
        self.get = _function(library, "tj3Get", ctypes.c_int, handle, ctypes.c_int)
        self.set_scale = _function(library, "tj3SetScalingFactor", ctypes.c_int, handle, _Factor)
        self.set_region = _function(library, "tj3SetCroppingRegion", ctypes.c_int, handle, _Region)
        self.decompress = _function(
            library, "tj3Decompress8", ctypes.c_int, handle, *data, ctypes.c_void_p, ctypes.c_int, ctypes.c_int
        )
        self.error = _function(library, "tj3GetErrorStr", ctypes.c_char_p, handle)
        self.path = path


class _Decoder:
    """A decoder of one thread's own."""

    def __init__(self, library: TurboJPEG) -> None:
        self.library = library
        self.handle = library.start(_DECOMPRESS)
        if not self.handle:
            raise MemoryError("no memory for a JPEG decoder")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.destroy(self.handle)

    def check(self, code: int) -> None:
        """Raise what the library says; warnings, of damaged data, are errors too."""
        if code:
            raise ValueError(self.library.error(self.handle).decode("utf-8", "replace"))


_decoders = threading.local()


@functools.cache
def find() -> TurboJPEG | None:
    """TurboJPEG 3, or None where there is none."""
    named = os.environ.get("VITRAIL_TURBOJPEG")
    for path in _candidates() if named is None else [named] * bool(named):
        try:
            return TurboJPEG(path)
        except (OSError, AttributeError) as error:
            if named is not None:
                logger.warning("VITRAIL_TURBOJPEG: %s is no TurboJPEG 3 (%s); JPEGs are decoded whole", path, error)
    return None


def decode_part(
    data: bytes | memoryview,
    eighths: int,
    part: tuple[int, int, int, int],
    buffer: UInt8[np.ndarray, " bytes"] | None = None,
) -> UInt8[np.ndarray, "h w 3"] | None:
    """Part (top, left, bottom, right) of the pixels, RGB, of a JPEG decoded at a scale of `eighths`: what decoding the
    whole at that scale would have there, bit by bit. None where the library, or this file's way of keeping colours,
    allows no parts.

    Args:
        data: of a JPEG whose header was looked at already.
        eighths: numerator of the scale, 1 to 8.
        part: in pixels at that scale, within the image.
        buffer: where the pixels come to lie, as large as the whole at that scale; by default in fresh memory.

    Raises:
        ValueError: damaged data, down to the part's last row; what lies below isn't looked at.
    """
    library = find()
    if library is None:
        return None
    decoder = getattr(_decoders, "decoder", None)
    if decoder is None or decoder.library is not library:
        decoder = _decoders.decoder = _Decoder(library)
    handle, check = decoder.handle, decoder.check
    source = np.frombuffer(data, np.uint8)
    check(library.set_region(handle, _Region(0, 0, 0, 0)))
    check(library.read_header(handle, source.ctypes.data, source.size))
    divisor = math.gcd(eighths, 8)  # it knows its factors in lowest terms only
    check(library.set_scale(handle, _Factor(eighths // divisor, 8 // divisor)))
    width, height = (-(-library.get(handle, name) * eighths // 8) for name in (_WIDTH, _HEIGHT))
    subsampling = library.get(handle, _SUBSAMPLING)
    if not 0 <= subsampling < len(_BLOCK_WIDTHS):
        return None
    block = -(-_BLOCK_WIDTHS[subsampling] * eighths // 8)
    top, left, bottom, right = part
    x = max(left - _MARGIN, 0) // block * block
    w, h = min(right + _MARGIN, width) - x, bottom - top
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(f"part {part} of {height}x{width} pixels")
    buffer = np.empty(h * w * 3, np.uint8) if buffer is None else buffer
    if buffer.size < h * w * 3:
        raise ValueError(f"{h}x{w} pixels into {buffer.size} bytes")
    check(library.set_region(handle, _Region(x, top, w, h)))
    check(library.decompress(handle, source.ctypes.data, source.size, buffer.ctypes.data, 0, _RGB))
    return buffer[: h * w * 3].reshape(h, w, 3)[:, left - x : right - x]


def _candidates() -> list[str]:
    """Names to try: loading fails at once, while `ctypes.util.find_library` would ask a compiler."""
    prefix = Path(sys.prefix) / "lib"  # conda's
    if sys.platform == "darwin":
        folders = (prefix, Path("/opt/homebrew/lib"), Path("/usr/local/lib"))
        paths = [str(folder / "libturbojpeg.dylib") for folder in folders]
    else:
        paths = [str(prefix / "libturbojpeg.so.0"), "libturbojpeg.so.0"]
    if (package := importlib.util.find_spec("pylibjxl")) and package.origin:
        paths += sorted(str(path) for path in Path(package.origin).parent.glob("_pylibjxl.*.so"))
    return paths


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function
