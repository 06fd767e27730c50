"""Every image of the golden set comes out right, or is refused with its reason."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.account import Refused
from data_prep.build import build
from data_prep.config import ImageConfig
from data_prep.samples.images import convert, thumbnail
from tests.support.golden_images import BOMB_SIDE, Golden, bomb, golden_set
from tests.support.prep_cases import samples, settings, sidecar, write_table

GOLDEN = {golden.name: golden for golden in golden_set() if golden.name != "bomb.png"}


def difference(image: Image.Image, expected: Image.Image) -> float:
    """Mean absolute difference in grey levels."""
    assert image.size == expected.size
    return float(np.abs(np.asarray(image.convert("RGB"), float) - np.asarray(expected.convert("RGB"), float)).mean())


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("form", ["png", "jpg", "keep"])
def test_it_comes_out_right_or_is_refused_with_its_reason(name: str, form: Any) -> None:
    golden = GOLDEN[name]
    options = ImageConfig(resize="no", format=form, quality=98)
    if isinstance(golden.expected, str):
        with pytest.raises(Refused) as refused:
            convert(golden.data, options)
        assert refused.value.reason == golden.expected
        with pytest.raises(Refused):
            thumbnail(golden.data, options)
        return
    stored = Image.open(io.BytesIO(convert(golden.data, options).data))
    assert stored.mode in ("RGB", "L")
    assert getattr(stored, "n_frames", 1) == 1
    assert stored.getexif().get(0x0112, 1) == 1
    # Lossy codecs move smooth pixels by two grey levels at most, dithered ones by more; a wrong turn or inverted inks
    # move them by tens.
    tolerance = 8 if name in ("palette.png", "animated.gif", "1-bit.png") else 3
    assert difference(stored, golden.expected) < tolerance
    assert difference(Image.fromarray(thumbnail(golden.data, options)), golden.expected) < tolerance


def test_the_whole_set_through_a_build(tmp_path: Path) -> None:
    goldens: list[Golden] = list(GOLDEN.values())
    for golden in goldens:
        (tmp_path / golden.name).write_bytes(golden.data)
    table = write_table(tmp_path / "t.parquet", url=[g.name for g in goldens], caption=["x"] * len(goldens))
    build(settings(table, tmp_path / "out", image={"resize": "no", "format": "png"}, max_failed=1.0))
    shards = samples(tmp_path / "out" / "train")
    rows = {row["position"]: row for row in sidecar(tmp_path / "out" / "train")}
    for position, golden in enumerate(goldens):
        if isinstance(golden.expected, str):
            assert rows[position]["reason"] == golden.expected, golden.name
        else:
            image = Image.open(io.BytesIO(shards[f"{position:012d}"]["png"]))
            assert difference(image, golden.expected) < 2, golden.name


def test_a_bomb_is_refused_without_growing(tmp_path: Path) -> None:
    """A sound PNG of 30,000 x 30,000 pixels, which decoded would take 2.7 GB, in a process of its own."""
    data = bomb()
    assert data[16:24] == BOMB_SIDE.to_bytes(4, "big") * 2
    (tmp_path / "bomb.png").write_bytes(data)
    program = f"""
import resource
from data_prep.account import Refused
from data_prep.config import ImageConfig
from data_prep.samples.images import convert, thumbnail
from PIL import Image
data = open({str(tmp_path / "bomb.png")!r}, "rb").read()
Image.init()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for function in (convert, thumbnail):
    try:
        function(data, ImageConfig())
    except Refused as refused:
        assert refused.reason == "image_too_large", refused
    else:
        raise AssertionError("it was taken")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        cwd=Path(__file__).resolve().parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 100 * 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


@pytest.mark.parametrize(
    ("options", "size", "stored"),
    [
        ({"resize": "keep_ratio_largest", "size": 100}, (300, 200), (100, 67)),
        ({"resize": "keep_ratio_largest", "size": 400}, (300, 200), (300, 200)),
        ({"resize": "border", "size": 100}, (300, 200), (100, 100)),
        ({"resize": "border", "size": 400}, (300, 200), (400, 400)),
        ({"resize": "border", "size": 400, "only_if_bigger": False}, (300, 200), (400, 400)),
    ],
)
def test_the_longer_side_decides_where_it_is_asked_to(options: Any, size: tuple[int, int], stored: Any) -> None:
    image = Image.new("RGB", size, "red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    result = convert(buffer.getvalue(), ImageConfig(format="png", **options))
    opened = Image.open(io.BytesIO(result.data)).convert("RGB")
    assert opened.size == stored == (result.geometry.width, result.geometry.height)
    pixels = np.asarray(opened)
    if options["resize"] == "border":
        assert tuple(pixels[0, stored[0] // 2]) == (255, 255, 255)
        assert tuple(pixels[stored[1] // 2, stored[0] // 2]) == (255, 0, 0)
        red = (pixels == (255, 0, 0)).all(-1)
        top, bottom = np.flatnonzero(red.any(1))[[0, -1]]
        assert abs(top - (stored[1] - 1 - bottom)) <= 1, "the image isn't in the middle"
