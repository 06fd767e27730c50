"""The golden set: images as the web holds them, each with what must become of it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.support.prep_cases import encoded, pixels

BOMB_SIDE = 30_000


class Golden(NamedTuple):
    """One image file and what is right."""

    name: str
    data: bytes
    expected: Image.Image | str  # how it must look, or the reason of its refusal


def golden_set() -> Iterator[Golden]:
    """All of them."""
    scene = Image.fromarray(pixels(1, 72, 48))
    yield from orientations(scene)
    grey = scene.convert("L")
    yield Golden("cmyk.jpg", _saved(scene.convert("CMYK"), "JPEG", quality=98), scene)
    yield Golden("adobe-inverted-cmyk.jpg", _inverted_cmyk(scene), scene)
    sixteen = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    yield Golden("16-bit.png", _saved(sixteen, "PNG"), grey.convert("RGB"))
    yield Golden("16-bit.tiff", _saved(sixteen, "TIFF"), grey.convert("RGB"))
    yield Golden("16-bit-rgb.png", png_16_bit_rgb(np.asarray(scene)), scene)
    yield from transparent(scene)
    yield Golden("palette.png", _saved(scene.quantize(64), "PNG"), scene.quantize(64).convert("RGB"))
    yield Golden("grey.jpg", _saved(grey, "JPEG", quality=98), grey.convert("RGB"))
    yield Golden("1-bit.png", _saved(scene.convert("1"), "PNG"), scene.convert("1").convert("RGB"))
    yield Golden("progressive.jpg", _saved(scene, "JPEG", quality=98, progressive=True), scene)
    yield Golden("4-4-4.jpg", _saved(scene, "JPEG", quality=98, subsampling=0), scene)
    frames = [scene, scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    for kind in ("WEBP", "PNG"):
        data = _saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, lossless=True)
        yield Golden(f"animated.{kind.lower()}", data, scene)
    two = [frame.quantize(64) for frame in frames]
    data = _saved(two[0], "GIF", save_all=True, append_images=two[1:], duration=100)
    yield Golden("animated.gif", data, two[0].convert("RGB"))
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = encoded(5, kind, 200, 160)
        yield Golden(f"truncated.{kind.lower()}", whole[: len(whole) * 6 // 10], "image_damaged")
    yield Golden("zero.jpg", b"", "empty_file")
    yield Golden("page.jpg", b"<!doctype html><title>Not found</title>", "not_an_image")
    yield Golden("vector.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image")
    yield Golden("bomb.png", bomb(), "image_too_large")
    yield Golden("bomb.jpg", _jpeg_bomb(), "image_too_large")
    yield Golden("bomb.gif", _gif_bomb(), "image_too_large")
    yield Golden("floating.tiff", _saved(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "not_an_image")
    yield Golden("line.png", encoded(6, "PNG", 400, 4), "image_too_elongated")


def orientations(scene: Image.Image) -> Iterator[Golden]:
    """The scene as a camera held eight ways stores it, with the tag that says so."""
    how = Image.Transpose
    stored = {1: None, 2: how.FLIP_LEFT_RIGHT, 3: how.ROTATE_180, 4: how.FLIP_TOP_BOTTOM, 5: how.TRANSPOSE,
              6: how.ROTATE_90, 7: how.TRANSVERSE, 8: how.ROTATE_270}  # fmt: skip
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = scene if turn is None else scene.transpose(turn)
        for kind in ("JPEG", "PNG", "WEBP"):
            data = _saved(turned, kind, exif=exif, **({"quality": 98} if kind == "JPEG" else {"lossless": True}))
            yield Golden(f"orientation-{orientation}.{kind.lower()}", data, scene)


def transparent(scene: Image.Image) -> Iterator[Golden]:
    """Left half clear, in the three ways PNG has, and in WebP: white must show there."""
    white = scene.copy()
    white.paste("white", (0, 0, 36, 48))
    alpha = Image.new("L", scene.size, 255)
    alpha.paste(0, (0, 0, 36, 48))
    rgba = scene.copy()
    rgba.putalpha(alpha)
    yield Golden("alpha.png", _saved(rgba, "PNG"), white)
    yield Golden("alpha.webp", _saved(rgba, "WEBP", lossless=True), white)
    grey = scene.convert("LA")
    grey.putalpha(alpha)
    expected = scene.convert("L").convert("RGB")
    expected.paste("white", (0, 0, 36, 48))
    yield Golden("grey-alpha.png", _saved(grey, "PNG"), expected)
    keyed = Image.new("RGB", scene.size, (1, 2, 3))
    keyed.paste("blue", (36, 0, 72, 48))
    on_white = Image.new("RGB", scene.size, "white")
    on_white.paste("blue", (36, 0, 72, 48))
    yield Golden("colour-key.png", _saved(keyed, "PNG", transparency=(1, 2, 3)), on_white)


def bomb() -> bytes:
    """A whole PNG of 30,000 x 30,000 pixels: 2.7 GB decoded, a few megabytes as a file."""
    row = bytes(1 + 3 * BOMB_SIDE)
    squeezer = zlib.compressobj(1, wbits=-15)
    # After a full flush equal rows give equal bytes, so a hundred of them are compressed once.
    piece = squeezer.compress(row * 100) + squeezer.flush(zlib.Z_FULL_FLUSH)
    adler = (len(row) * BOMB_SIDE % 65521) << 16 | 1  # of zeros
    body = b"\x78\x01" + piece * (BOMB_SIDE // 100) + squeezer.flush() + struct.pack(">I", adler)
    head = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def png_16_bit_rgb(image: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads but can't write."""
    height, width, _ = image.shape
    wide = (image.astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _jpeg_bomb() -> bytes:
    """A JPEG whose header says 30,000 x 30,000."""
    data = bytearray(encoded(7, "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", BOMB_SIDE, BOMB_SIDE)
    return bytes(data)


def _gif_bomb() -> bytes:
    """A GIF whose screen is said to be 30,000 x 30,000."""
    data = encoded(7, "GIF")
    return data[:6] + struct.pack("<HH", BOMB_SIDE, BOMB_SIDE) + data[10:]


def _inverted_cmyk(scene: Image.Image) -> bytes:
    """As Photoshop writes it: inverted inks under an Adobe marker. Pillow writes plain CMYK that way itself."""
    data = _saved(scene.convert("CMYK"), "JPEG", quality=98)
    assert b"Adobe" in data
    return data


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
