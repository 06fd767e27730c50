"""Parts of JPEGs: bit by bit what decoding the whole has there, with TurboJPEG's library or without."""

from __future__ import annotations

import io
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.images.decode import PixelRectangle, UnreadableSample, decode, turbojpeg
from pipeline.data.images.transforms import TrainImage

ELSEWHERE = not (sys.platform == "linux" and platform.machine() == "x86_64")
needs_library = pytest.mark.skipif(ELSEWHERE, reason="the library is installed on x86-64 Linux only")


@pytest.fixture(autouse=True)
def look_again() -> Iterator[None]:
    turbojpeg.find.cache_clear()
    yield
    turbojpeg.find.cache_clear()


def photo(height: int, width: int, colours: str = "444", *, progressive: bool = False, seed: int = 0) -> bytes:
    """A smooth random image as a JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    if colours == "Gray" or not progressive:
        pixels = np.asarray(image.convert("L"))[:, :, None] if colours == "Gray" else np.asarray(image)
        space = "GRAY" if colours == "Gray" else "RGB"
        encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 85, space, colours)
        return encoded
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, progressive=True, subsampling=("444", "422", "420").index(colours))
    return buffer.getvalue()


@st.composite
def cases(draw: st.DrawFn) -> tuple[bytes, int, tuple[int, int], PixelRectangle]:
    """A JPEG, a scale in eighths, the size at that scale, and a part of it."""
    height, width = draw(st.integers(9, 90)), draw(st.integers(9, 90))  # each scale gives another size
    colours = draw(st.sampled_from(["444", "422", "420", "440", "411", "Gray"]))
    progressive = colours in ("444", "422", "420") and draw(st.booleans())
    eighths = draw(st.sampled_from([1, 2, 3, 4, 8]))
    h, w = -(-height * eighths // 8), -(-width * eighths // 8)
    top, left = draw(st.integers(0, h - 1)), draw(st.integers(0, w - 1))
    part = PixelRectangle(top, left, draw(st.integers(top + 1, h)), draw(st.integers(left + 1, w)))
    return photo(height, width, colours, progressive=progressive, seed=height), eighths, (h, w), part


@needs_library
@given(case=cases())
@settings(deadline=None, max_examples=150)
def test_a_part_is_what_the_whole_has_there(case: tuple[bytes, int, tuple[int, int], PixelRectangle]) -> None:
    data, eighths, size, part = case
    buffer = np.empty(3 * size[0] * size[1], np.uint8)
    pixels = turbojpeg.decode_part(memoryview(data), eighths, part, buffer)
    min_height, min_width = size if eighths < 8 else (0, 0)
    whole = simplejpeg.decode_jpeg(data, "RGB", min_height=min_height, min_width=min_width)
    assert whole.shape[:2] == size
    assert pixels is not None
    assert np.array_equal(pixels, whole[part.top : part.bottom, part.left : part.right])


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 2), (8, 8), (3, 40)])
@pytest.mark.parametrize("eighths", [1, 3, 4, 8])
def test_parts_of_tiny_images(size: tuple[int, int], eighths: int) -> None:
    data = photo(*size, "420")
    height, width = (-(-side * eighths // 8) for side in size)
    whole = decode(data, (height, width))
    part = decode(data, (height, width), part=PixelRectangle(0, width // 2, height, width))
    assert np.array_equal(part, whole[:, width // 2 :])


@needs_library
def test_crops_are_the_same_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [photo(120 + 31 * i, 500 - 43 * i, colours) for i, colours in enumerate(["444", "422", "420", "Gray"] * 2)]
    train = TrainImage((32, 32), (0.05, 1.0))
    assert turbojpeg.find() is not None
    with_library = [train.several(data, [seed, seed + 1]) for seed, data in enumerate(images)]
    monkeypatch.setenv("VITRAIL_TURBOJPEG", "")
    turbojpeg.find.cache_clear()
    assert turbojpeg.find() is None
    without = [train.several(data, [seed, seed + 1]) for seed, data in enumerate(images)]
    for one, other in zip(with_library, without, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_threads_decode_side_by_side() -> None:
    images = [photo(200, 200, seed=seed) for seed in range(16)]
    part = PixelRectangle(30, 20, 120, 170)
    expected = [decode(data, part=part) for data in images]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(4):
            for one, other in zip(threads.map(lambda data: decode(data, part=part), images), expected, strict=True):
                assert np.array_equal(one, other)


def test_truncation_is_found_whatever_the_part() -> None:
    data = photo(200, 200)
    for kept in (len(data) - 1, len(data) - 2, len(data) * 3 // 4, len(data) // 2):
        with pytest.raises(UnreadableSample, match="damaged jpeg"):
            decode(data[:kept], part=PixelRectangle(0, 0, 8, 8))


def test_damage_above_or_within_a_part_is_found() -> None:
    data = bytearray(photo(200, 200))
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff\xd9" * 32
    with pytest.raises(UnreadableSample, match="damaged jpeg"):
        decode(bytes(data), part=PixelRectangle(180, 0, 200, 200))


@given(
    at=st.floats(0, 1),
    value=st.integers(0, 255),
    part=st.sampled_from([PixelRectangle(0, 0, 9, 9), PixelRectangle(40, 30, 64, 47)]),
)
@settings(deadline=None, max_examples=150)
def test_any_damage_is_an_unreadable_sample_at_worst(at: float, value: int, part: PixelRectangle) -> None:
    data = bytearray(photo(64, 48, "420"))
    data[int(at * (len(data) - 1))] = value
    try:
        pixels = decode(bytes(data), part=part)
    except UnreadableSample:
        return
    assert pixels.ndim == 3


def test_a_file_named_that_is_no_library_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VITRAIL_TURBOJPEG", simplejpeg.__file__)
    assert turbojpeg.find() is None
    assert "no TurboJPEG 3" in caplog.text
    assert decode(photo(40, 40), part=PixelRectangle(8, 8, 16, 16)).shape == (8, 8, 3)
