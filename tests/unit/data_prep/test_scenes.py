import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_prep.scenes.captions import color_name
from data_prep.scenes.draw import SHAPES, TEXTURES, draw_scene
from data_prep.scenes.render import ScenesConfig, class_names, label_of, render, write_scenes
from pipeline.config import validate
from pipeline.errors import ConfigError

SMALL = ScenesConfig(num_train=60, num_validation=20, num_heldout=40)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder: Path) -> list[dict[str, object]]:
    return pyarrow.parquet.read_table(folder / "pairs.parquet").to_pylist()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(SMALL, str(folder), processes=1)
    return folder


def test_a_seed_gives_the_same_bytes_however_many_processes_render(written: Path, tmp_path: Path) -> None:
    write_scenes(SMALL, str(tmp_path), processes=2)
    assert contents(tmp_path) == contents(written)


def test_another_seed_gives_other_scenes(written: Path) -> None:
    other = SMALL.model_copy(update={"seed": 1})
    assert render(other, "train", 0).data != render(SMALL, "train", 0).data
    assert render(SMALL, "train", 0).data != render(SMALL, "heldout", 0).data


def test_the_table_tells_what_every_image_is(written: Path) -> None:
    table = rows(written)
    assert Counter(row["split"] for row in table) == {"train": 60, "validation": 20, "heldout": 40}
    images = {name for name in contents(written) if name.startswith("images/")}
    assert {row["url"] for row in table} == images
    for row in table:
        with Image.open(written / str(row["url"])) as image:
            assert image.size == (row["width"], row["height"])
            assert image.mode == "RGB"


def test_files_are_jpeg_png_and_webp_of_many_sizes(written: Path) -> None:
    table = rows(written)
    endings = Counter(str(row["url"]).rpartition(".")[2] for row in table)
    assert set(endings) == {"jpg", "png", "webp"}
    for row in table:
        with Image.open(written / str(row["url"])) as image:
            assert {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[str(row["url"]).rpartition(".")[2]] == image.format
            assert all(72 <= side <= 128 for side in image.size)
            assert 1 / 1.3 < image.width / image.height < 1.3
    assert len({(row["width"], row["height"]) for row in table}) > 60
    assert any(row["width"] > 1.1 * row["height"] for row in table)  # type: ignore[operator]
    assert any(row["height"] > 1.1 * row["width"] for row in table)  # type: ignore[operator]


def test_every_class_is_equally_frequent_in_every_split() -> None:
    names = class_names()
    assert len(names) == len(set(names)) == len(SHAPES) * len(TEXTURES) >= 20
    config = ScenesConfig()
    for split, count in (("train", 200), ("validation", 200), ("heldout", 400)):
        labels = [label_of(config, split, index) for index in range(count)]
        assert set(Counter(labels).values()) == {count // len(names)}
        assert labels[:20] != sorted(labels[:20])


def test_a_caption_names_the_shape_and_the_texture_of_the_label(written: Path) -> None:
    names = json.loads((written / "classes.json").read_text())
    assert tuple(names) == class_names()
    for row in rows(written):
        shape, _, texture = names[row["label"]].partition(" with ")
        assert shape in str(row["caption"])
        assert texture in str(row["caption"])
    assert len({row["caption"] for row in rows(written)}) > 100


def test_annotations_outline_every_object_the_labelled_one_first(written: Path) -> None:
    numbers = Counter()
    for row in rows(written):
        annotations = json.loads(str(row["annotations"]))
        numbers[len(annotations)] += 1
        assert annotations[0]["category_id"] == row["label"]
        assert annotations[0]["area"] == max(item["area"] for item in annotations)
        drawn = np.zeros((row["height"], row["width"]), int)  # type: ignore[call-overload]
        for item in annotations:
            mask = coco_mask.decode(item["segmentation"])
            assert mask.shape == drawn.shape
            assert mask.sum() == item["area"] > 0
            down, right = np.nonzero(mask)
            x, y, w, h = item["bbox"]
            assert (x, y, x + w, y + h) == (right.min(), down.min(), right.max() + 1, down.max() + 1)
            drawn += mask
        assert drawn.max() == 1
    assert set(numbers) == {1, 2, 3, 4}


def test_a_part_lies_within_the_main_object_whose_mask_holds_it_too() -> None:
    config = ScenesConfig(part_share=1.0, max_clutter=0)
    numbers = Counter()
    for index in range(60):
        row = render(config, "train", index).row
        whole, *parts = (coco_mask.decode(item["segmentation"]) for item in json.loads(row["annotations"]))
        numbers[len(parts)] += 1
        for part in parts:
            assert (part <= whole).all()
            assert 0.01 < part.sum() / whole.sum() < 0.75
    assert set(numbers) == {0, 1}  # thin objects bear none
    assert numbers[1] > 30


def test_without_parts_scenes_are_what_they_always_were() -> None:
    assert render(ScenesConfig(part_share=0.0), "train", 7) == render(ScenesConfig(), "train", 7)
    some = [
        len(json.loads(render(ScenesConfig(part_share=0.5, max_clutter=0), "train", i).row["annotations"]))
        for i in range(60)
    ]
    assert 0.15 < some.count(2) / 60 < 0.6


def test_a_mask_covers_exactly_the_pixels_its_object_changes() -> None:
    size = {"height": 96, "width": 100, "max_clutter": 0}
    for shape in SHAPES:
        scene = draw_scene(np.random.default_rng(3), shape, "vertical stripes", **size)
        # The same draws, another texture: only the object's pixels differ.
        other = draw_scene(np.random.default_rng(3), shape, "diamonds", **size)
        changed = np.abs(scene.image.astype(int) - other.image).max(-1) > 40
        assert changed.any()
        grown = scene.main.mask.copy()
        for axis in (0, 1):
            grown |= np.roll(grown, 1, axis) | np.roll(grown, -1, axis)
        assert not (changed & ~grown).any()


def test_the_main_object_survives_a_centre_crop() -> None:
    config = ScenesConfig()
    for index in range(60):
        row = render(config, "train", index).row
        side = min(row["width"], row["height"])
        x, y, w, h = json.loads(row["annotations"])[0]["bbox"]
        left, top = (row["width"] - side) / 2, (row["height"] - side) / 2
        assert x >= left - 2
        assert y >= top - 2
        assert x + w <= left + side + 2
        assert y + h <= top + side + 2


def test_stripes_run_as_their_names_say() -> None:
    """Along a stripe the brightness hardly changes; across it, it does."""
    steps = {"horizontal": (0, 4), "vertical": (4, 0), "rising": (-4, 4), "falling": (4, 4)}
    for name in steps:
        scores = {other: 0.0 for other in steps}
        for seed in range(8):
            scene = draw_scene(
                np.random.default_rng(seed), "disc", f"{name} stripes", height=120, width=120, max_clutter=0
            )
            brightness = np.where(scene.main.mask, scene.image.mean(-1), np.nan)
            for other, (down, right) in steps.items():
                moved = np.roll(brightness, (down, right), (0, 1))
                scores[other] += float(np.nanmean(np.abs(moved - brightness)))
        assert min(scores, key=scores.__getitem__) == name


def test_a_finished_folder_is_left_alone(written: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert write_scenes(SMALL, str(written), processes=1).num_rendered == 0
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_a_rendering_that_was_killed_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    config = ScenesConfig(num_train=200, num_validation=0, num_heldout=0)
    killed, fresh = tmp_path / "killed", tmp_path / "fresh"
    killed.mkdir()
    program = (
        "from data_prep.scenes.render import ScenesConfig, write_scenes;"
        f"write_scenes(ScenesConfig(**{config.model_dump()}), {str(killed)!r}, processes=2)"
    )
    with subprocess.Popen([sys.executable, "-c", program], start_new_session=True) as process:
        while len(list(killed.rglob("images/train/0*"))) < 30:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not (killed / "pairs.parquet").exists()
    while group_is_alive(process.pid):  # its renderers end by themselves
        time.sleep(0.05)
    present = {path: path.stat().st_mtime_ns for path in killed.rglob("images/train/0*")}
    write_scenes(config, str(killed), processes=1)
    write_scenes(config, str(fresh), processes=1)
    expected = contents(fresh)
    assert {name: data for name, data in contents(killed).items() if name in expected} == expected
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in present.items())


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_other_settings_replace_what_lies_in_the_folder(tmp_path: Path) -> None:
    few = ScenesConfig(num_train=5, num_validation=0, num_heldout=2)
    write_scenes(few, str(tmp_path / "a"), processes=1)
    write_scenes(few.model_copy(update={"seed": 5}), str(tmp_path / "a"), processes=1)
    write_scenes(few.model_copy(update={"seed": 5}), str(tmp_path / "b"), processes=1)
    table = rows(tmp_path / "a")
    assert table == rows(tmp_path / "b")
    for row in table:
        assert (tmp_path / "a" / str(row["url"])).read_bytes() == (tmp_path / "b" / str(row["url"])).read_bytes()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"min_side": 100, "max_side": 90}, "min_side is larger than max_side"),
        ({"num_train": 0, "num_validation": 0, "num_heldout": 0}, "all 0"),
        ({"num_trian": 10}, "did you mean 'num_train'"),
    ],
)
def test_impossible_settings_are_refused(document: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ScenesConfig, document, where="scenes.yaml")


def test_colors_have_their_common_names() -> None:
    assert color_name((0.0, 1.0, 1.0)) == color_name((0.99, 1.0, 1.0)) == "red"
    assert color_name((1 / 3, 1.0, 1.0)) == "green"
    assert color_name((2 / 3, 1.0, 0.3)) == "dark blue"
    assert color_name((0.5, 0.05, 0.9)) == "gray"


def test_images_decode_to_what_was_drawn() -> None:
    """PNG is exact; JPEG and WebP come close."""
    for index in range(12):
        scene = render(SMALL, "train", index)
        pixels = np.asarray(Image.open(io.BytesIO(scene.data)))
        assert pixels.std() > 5
        assert pixels.shape == (scene.row["height"], scene.row["width"], 3)
