"""Other projects' loaders read our shards as they are."""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from uv import find_uv_bin

from data_prep.build import build
from tests.support.prep_cases import samples, settings, write_pairs


def shrink(image: Any) -> np.ndarray:
    """What stands for open_clip's image preprocessing: one size for all."""
    return np.asarray(image.convert("RGB").resize((32, 32)))


@pytest.fixture(scope="module", name="built")
def build_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readers")
    labels = list(range(24))
    table = write_pairs(folder / "raw", 24, label=labels)
    build(settings(table, folder / "out", source={"label_column": "label"}))
    return folder / "out" / "train"


def test_plain_webdataset_reads_every_sample(built: Path) -> None:
    import webdataset

    shards = [str(path) for path in sorted(built.glob("*.tar"))]
    rows = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    expected = samples(built)
    assert [sample["__key__"] for sample in rows] == list(expected)
    for sample in rows:
        members = expected[sample["__key__"]]
        assert sample["txt"] == members["txt"].decode()
        assert sample["json"] == json.loads(members["json"])
        assert sample["cls"] == int(sample["__key__"])
        assert sample["jpg"].dtype == np.uint8
        assert sample["jpg"].shape == (sample["json"]["height"], sample["json"]["width"], 3)


def test_open_clips_own_loader_reads_every_sample(built: Path) -> None:
    data = pytest.importorskip("open_clip_train.data", exc_type=ImportError)
    assert data.get_dataset_size(f"{built}/{{00000..00002}}.tar") == (24, 3)
    arguments = argparse.Namespace(
        train_data=None,
        val_data=f"{built}/{{00000..00002}}.tar",
        dataset_resampled=False,
        val_num_samples=None,
        train_num_samples=None,
        train_data_upsampling_factors=None,
        batch_size=4,
        workers=1,
        world_size=1,
        seed=0,
    )
    seen: list[tuple[str, Any]] = []
    loader = data.get_wds_dataset(arguments, shrink, is_train=False, tokenizer=lambda text: [text]).dataloader
    for images, texts in loader:
        seen += zip(texts, images, strict=True)
    assert sorted(text for text, _ in seen) == sorted(f"a picture of {i}" for i in range(24))
    assert all(np.asarray(image).ndim == 3 for _, image in seen)


def test_open_clips_training_loader_reads_every_sample(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pytest.importorskip("open_clip_train.data", exc_type=ImportError)
    # webdataset 1.0 marks the ends of archives, which open_clip's reader, written for 0.2.86, doesn't know.
    monkeypatch.setattr(data, "tar_file_expander", functools.partial(data.tar_file_expander, eof_value=None))
    arguments = argparse.Namespace(
        train_data=f"{built}/{{00000..00002}}.tar",
        val_data=None,
        dataset_resampled=False,
        train_num_samples=None,  # taken from sizes.json
        train_data_upsampling_factors=None,
        batch_size=4,
        workers=1,
        world_size=1,
        seed=0,
    )
    loaded = data.get_wds_dataset(arguments, shrink, is_train=True, tokenizer=lambda text: [text]).dataloader
    assert loaded.num_samples == 24
    texts = [text for _, batch in loaded for text in batch]
    assert len(texts) == 24
    assert set(texts) == {f"a picture of {i}" for i in range(24)}


@pytest.mark.slow
def test_open_clips_loader_reads_every_sample_with_the_webdataset_it_pins(built: Path, tmp_path: Path) -> None:
    """open_clip's training extra asks for `webdataset<=0.2.86`, which lies here before everything else that is
    installed; nothing of open_clip is replaced."""
    pytest.importorskip("open_clip_train.data", exc_type=ImportError)
    install = [find_uv_bin(), "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "webdataset==0.2.86"]
    subprocess.run(install, check=True)
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parents[1] / "support" / "read_with_open_clip.py"),
            f"{built}/{{00000..00002}}.tar",
        ],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["webdataset"] == "0.2.86"
    expected = [[m["txt"].decode(), pixels_sha256(m)] for m in samples(built).values()]
    for kind, announced in (("train", 24), ("validation", 0)):  # it counts no samples for validation
        assert report[kind][0] == announced
        assert sorted(report[kind][1]) == sorted(expected)


def pixels_sha256(members: dict[str, bytes]) -> str:
    """Of the image as Pillow decodes it, which is what open_clip does."""
    data = next(members[extension] for extension in ("jpg", "png", "webp") if extension in members)
    return hashlib.sha256(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes()).hexdigest()
