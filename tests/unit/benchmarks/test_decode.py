"""What the decoding benchmark compares is the same pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import decode
from benchmarks.harness import UnequalWork


def test_generated_photos_do_where_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VITRAIL_SHARED", str(tmp_path))
    monkeypatch.setattr(decode, "NUM_GENERATED", 3)
    photos, source = decode.load_photos()
    assert source == "generated smooth fields"
    assert len({bytes(photo) for photo in photos}) == 3
    assert decode.generated(1) == photos[1]
    assert decode.with_pillow(photos[0]).shape == (480, 640, 3)


def test_ours_and_pillow_decode_to_the_same_pixels() -> None:
    from pipeline.data.images.decode import decode as ours

    photos = [decode.generated(seed) for seed in range(3)]
    assert decode.same_pixels(decode.each(ours, photos), decode.each(decode.with_pillow, photos))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([np.zeros((4, 5, 3), np.uint8)], r"\(4, 4, 3\) against \(4, 5, 3\)"),
        ([np.full((4, 4, 3), 9, np.uint8)], "differs by 9.0 grey levels"),
        ([], "1 photos decoded against 0"),
    ],
)
def test_other_pixels_are_refused(other: list[decode.Pixels], words: str) -> None:
    with pytest.raises(UnequalWork, match=words):
        decode.same_pixels([np.zeros((4, 4, 3), np.uint8)], other)
