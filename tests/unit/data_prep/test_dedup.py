"""Duplicates over the whole data set, kept out of each other's splits and out of evaluation sets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.build import build
from data_prep.config import DedupConfig
from data_prep.duplicates.dedup import VERDICTS, Signatures, decide
from data_prep.duplicates.signatures import near_any, near_pairs, perceptual_hash
from pipeline.errors import Stopped
from tests.support.prep_cases import hashes, reasons, settings, sidecar, write_table

NONE = Signatures(np.zeros((0, 2), np.uint64), np.zeros(0, np.uint64), np.zeros(0, bool))


def picture(seed: int, size: int = 96) -> Image.Image:
    """An image with structure of several sizes, as photos have: its hash tells it from others."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def near(seed: int) -> bytes:
    """The same picture, smaller and compressed harder."""
    return jpeg(picture(seed).resize((80, 80)), 70)


def planted(folder: Path) -> tuple[Path, dict[int, int]]:
    """200 pictures, 20 of which come again as they are and 20 as near copies; copy -> original."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    copies = {}
    files = [jpeg(picture(i)) for i in range(200)]
    for i in range(20):
        copies[200 + i] = i
        files.append(files[i])
    for i in range(20, 40):
        copies[200 + i] = i
        files.append(near(i))
    for i, data in enumerate(files):
        (folder / "images" / f"{i}.jpg").write_bytes(data)
    urls = [f"images/{i}.jpg" for i in range(len(files))]
    return write_table(folder / "t.parquet", url=urls, caption=["x"] * len(files)), copies


def written(output: Path) -> set[int]:
    return {row["position"] for split in output.iterdir() if split.is_dir() and split.name != "_prep"
            for row in sidecar(split) if not row["reason"]}  # fmt: skip


@pytest.fixture(scope="module", name="planted")
def plant_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, int]]:
    return planted(tmp_path_factory.mktemp("planted"))


def test_the_hash_is_the_one_imagehash_computes() -> None:
    """Against ImageHash's definition, written out: 32 x 32 grey by Lanczos, scipy's DCT, median of the low 8 x 8."""
    from scipy.fft import dct

    for seed in range(8):
        grey = np.asarray(picture(seed).convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
        low = dct(dct(grey, axis=0), axis=1)[:8, :8]
        bits = (low > np.median(low)).ravel()
        assert perceptual_hash(np.asarray(picture(seed))) == int("".join("01"[int(bit)] for bit in bits), 2)


def test_copies_of_photos_have_near_hashes_and_other_photos_have_not(photos: Path) -> None:
    """Measured on 100 photos: copies differ in at most 4 of 64 bits, different photos in 16 and more."""
    images = [Image.open(path).convert("RGB") for path in sorted((photos.parent / "images").glob("*.jpg"))[:40]]
    ours = [perceptual_hash(np.asarray(image)) for image in images]
    for image, code in zip(images, ours, strict=True):
        small = image.resize((image.width * 128 // min(image.size), image.height * 128 // min(image.size)))
        copy = Image.open(io.BytesIO(jpeg(small, 50)))
        assert (code ^ perceptual_hash(np.asarray(copy))).bit_count() <= 4
    assert min((a ^ b).bit_count() for i, a in enumerate(ours) for b in ours[:i]) > 12


@hypothesis_settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 6), st.integers(2, 300))
def test_all_near_pairs_are_found(seed: int, most: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    hashes_found = rng.integers(0, 2**64, count, dtype=np.uint64)
    for i in range(1, count, 3):  # near ones
        flips = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, rng.integers(1, 9)).astype(np.uint64))
        hashes_found[i] = hashes_found[rng.integers(0, count)] ^ flips
    expected = {
        (i, j) for j in range(count) for i in range(j) if int(hashes_found[i] ^ hashes_found[j]).bit_count() <= most
    }
    pairs = {(min(a, b), max(a, b)) for i, j in near_pairs(hashes_found, most)
             for a, b in zip(i.tolist(), j.tolist(), strict=True)}  # fmt: skip
    assert pairs == expected
    half = count // 2
    seen = near_any(hashes_found[half:], hashes_found[:half], most)
    for i, other in enumerate(seen.tolist()):
        mine = [j for j in range(half) if int(hashes_found[half + i] ^ hashes_found[j]).bit_count() <= most]
        assert (other in mine) if mine else other == -1


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(0, 3), st.integers(1, 59))
def test_what_stays_is_apart_what_goes_is_near_and_appending_changes_nothing(
    values: list[int], most: int, cut: int
) -> None:
    code = np.array([0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023], dtype=np.uint64)
    hashed = np.array([code[v % 11] ^ (np.uint64(v // 11) << np.uint64(40)) for v in values], dtype=np.uint64)
    digests = np.stack([np.array(values, dtype=np.uint64)] * 2, axis=1)
    usable = np.array([v % 7 != 3 for v in values])
    options = DedupConfig(drop="near", near_distance=most)
    decisions = decide(Signatures(digests, hashed, usable), NONE, options, {"train": 1.0}, 0)
    stays = np.flatnonzero(usable & (decisions.verdicts == 0))
    for i in stays:
        assert all(int(hashed[i] ^ hashed[j]).bit_count() > most for j in stays if j != i)
    for i in np.flatnonzero(decisions.verdicts):
        by = decisions.others[i]
        assert by in stays
        assert by < i
        assert int(hashed[i] ^ hashed[by]).bit_count() <= most
    fewer = decide(Signatures(digests[:cut], hashed[:cut], usable[:cut]), NONE, options, {"train": 1.0}, 0)
    np.testing.assert_array_equal(fewer.verdicts, decisions.verdicts[:cut])


@pytest.mark.parametrize("drop", ["exact", "near"])
def test_of_planted_duplicates_across_partitions_one_each_stays(
    planted: tuple[Path, dict[int, int]], tmp_path: Path, drop: Any
) -> None:
    table, copies = planted
    report = build(settings(table, tmp_path / "out", dedup={"drop": drop}, shard={"samples": 20}))
    if drop == "exact":
        assert report.filtered == {"duplicate": 20}
        assert written(tmp_path / "out") == set(range(240)) - {200 + i for i in range(20)}
    else:
        assert report.filtered == {"duplicate": 20, "near_duplicate": 20}
        assert written(tmp_path / "out") == set(range(200))
    assert report.inputs == 240 == report.written + sum(report.filtered.values())
    messages = {row["position"]: row["error_message"] for row in sidecar(tmp_path / "out" / "train") if row["reason"]}
    assert all(f"input {copies[position]}" in message for position, message in messages.items())


def test_duplicates_are_found_the_same_way_after_a_stop(planted: tuple[Path, dict[int, int]], tmp_path: Path) -> None:
    table, _ = planted
    options: dict[str, Any] = {"dedup": {"drop": "near"}, "shard": {"samples": 20}}
    build(settings(table, tmp_path / "whole", **options))
    asked = iter([False, False, False, True])
    with pytest.raises(Stopped):
        build(settings(table, tmp_path / "out", **options), stop=lambda: next(asked))
    build(settings(table, tmp_path / "out", **options))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_copy_that_is_appended_later_goes(planted: tuple[Path, dict[int, int]], tmp_path: Path) -> None:
    table, _ = planted
    urls = [str(table.parent / "images" / f"{i}.jpg") for i in range(240)]
    short = write_table(tmp_path / "t.parquet", url=urls[:210], caption=["x"] * 210)
    options: dict[str, Any] = {
        "dedup": {"drop": "near"}, "shard": {"samples": 20}, "source": {"allow": [str(table.parent)]}
    }  # fmt: skip
    build(settings(short, tmp_path / "out", **options))
    before = {n: h for n, h in hashes(tmp_path / "out").items() if n.endswith(".tar")}
    short = write_table(tmp_path / "t.parquet", url=[*urls, urls[7]], caption=["x"] * 241)
    report = build(settings(short, tmp_path / "out", **options))
    assert report.filtered == {"duplicate": 21, "near_duplicate": 20}
    after = hashes(tmp_path / "out")
    assert {name: after[name] for name in before} == before


def test_an_original_that_cannot_be_used_leaves_its_copy(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for i in range(6):
        (tmp_path / "raw" / f"{i}.jpg").write_bytes(jpeg(picture(i % 3)))
    captions = ["", "b", "c", "d", "e", "f"]
    table = write_table(tmp_path / "raw" / "t.parquet", url=[f"{i}.jpg" for i in range(6)], caption=captions)
    report = build(settings(table, tmp_path / "out", dedup={"drop": "exact"}, max_failed=0.5))
    assert (report.failed, report.filtered) == ({"caption_empty": 1}, {"duplicate": 2})
    assert written(tmp_path / "out") == {1, 2, 3}


def test_alike_images_share_a_split(planted: tuple[Path, dict[int, int]], tmp_path: Path) -> None:
    table, copies = planted
    shares = {"train": 0.5, "heldout": 0.5}
    options: dict[str, Any] = {"splits": {"shares": shares}, "shard": {"samples": 20}}
    build(settings(table, tmp_path / "out", dedup={"near_splits": True}, **options))
    build(settings(table, tmp_path / "exact", **options))

    def apart(output: Path) -> int:
        split = {row["position"]: name for name in shares for row in sidecar(output / name)}
        return sum(split[copy] != split[original] for copy, original in copies.items())

    assert apart(tmp_path / "out") == 0
    assert apart(tmp_path / "exact") > 3, "by digest alone this set leaks, so the test above can fail"


def test_planted_evaluation_images_are_gone(planted: tuple[Path, dict[int, int]], tmp_path: Path) -> None:
    table, _ = planted
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for i in (5, 60, 61):
        (folder / f"{i}.jpg").write_bytes(near(i))
    options: dict[str, Any] = {"shard": {"samples": 40}}
    report = build(settings(table, tmp_path / "out", dedup={"evaluation": [str(folder)]}, **options))
    assert report.filtered == {"in_evaluation_set": 4}  # 5 has a copy
    assert written(tmp_path / "out") == set(range(240)) - {5, 60, 61, 205}
    # A data set of ours, which holds the images at another size.
    small = write_table(table.parent / "e.parquet", url=[f"images/{i}.jpg" for i in (5, 60, 61)], caption=["x"] * 3)
    build(settings(small, tmp_path / "set", image={"size": 64}))
    evaluation = {"evaluation": [str(tmp_path / "set" / "train")]}
    build(settings(table, tmp_path / "again", dedup=evaluation, **options))
    assert reasons(tmp_path / "again") == {"in_evaluation_set": 4}


def test_verdicts_are_reasons() -> None:
    from data_prep.account import REASONS

    assert set(VERDICTS[1:]) <= set(REASONS)
