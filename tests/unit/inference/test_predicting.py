"""The verb `predict`: what a trained stage makes of any image, as pictures and as JSON."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipeline import convert
from pipeline.config import validate
from pipeline.data.images.decode import decode
from pipeline.data.images.transforms import EvalImage
from pipeline.errors import CheckpointError, ConfigError, DataError, StorageError, UserError
from pipeline.inference.images import find_images, read_image
from pipeline.inference.loading import load
from pipeline.stages import stage_class
from pipeline.stages.base import DataFacts, Stage
from tests.support.saved_run import save_checkpoint
from tests.support.weight_verbs import predict

MODEL = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "mae": {"model": MODEL, "decoder": {"width": 16, "depth": 1, "heads": 2}},
    "mp3": {"model": MODEL},
    "classify": {"model": MODEL, "head_init_std": 0.5},
    "probe": {"model": MODEL, "lr_multipliers": [0.5, 1.0, 2.0]},
    "vitdet": {
        "model": MODEL | {"cls_token": False, "final_norm": False},
        "detector": {"pyramid_channels": 8, "box_width": 8, "score_threshold": 0.01, "detections": 5},
    },
    "flip": {"model": MODEL, "text": {"context_length": 8, "width": 16, "heads": 2, "layers": 1}, "embed_dim": 16},
}
CLASSES = ("cat", "dog", "owl")


def build(name: str) -> Stage:
    torch.manual_seed(0)
    cls = stage_class(name)
    return cls(validate(cls.options_class, OPTIONS[name], where="test"), DataFacts(CLASSES)).eval()


def noise(seed: int, height: int = 40, width: int = 56) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.png", "more/a.png")):
        noise(seed).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def predicted(stage: Stage, places: list[str], folder: Path, **asked: Any) -> tuple[list[dict[str, Any]], bool]:
    """The document's images, and whether all could be read."""
    weights = str(folder / "weights.safetensors")
    convert.save(stage, weights, "vitrail")
    _, _, good = predict(weights, places, str(folder / "out"), lambda _: None, **asked)
    document = json.loads((folder / "out" / "predictions.json").read_text())
    assert (document["format"], document["format_version"]) == ("vitrail.predictions", 1)
    return document["images"], good


@pytest.mark.parametrize(("name", "fact"), [("mae", "reconstruction_mse"), ("mp3", "position_top1")])
def test_pretrained_stages_show_what_they_make_of_each_image(
    name: str, fact: str, images: Path, tmp_path: Path
) -> None:
    entries, good = predicted(build(name), [str(images)], tmp_path)
    assert good
    assert [entry["image"] for entry in entries] == [str(images / n) for n in ("a.png", "b.png", "more/a.png")]
    assert [entry["pictures"] for entry in entries] == [["a.png"], ["b.png"], ["a-2.png"]]
    for entry in entries:
        assert (entry["height"], entry["width"]) == (40, 56)
        assert 0 <= entry[fact] < 10
        with Image.open(tmp_path / "out" / entry["pictures"][0]) as sheet:
            assert sheet.size == (3 * (224 + 8) + 8, 224 + 28 + 16)


def test_an_images_mask_is_its_own_whatever_else_is_asked_about(images: Path, tmp_path: Path) -> None:
    stage = build("mae")
    together, _ = predicted(stage, [str(images)], tmp_path, batch=2)
    alone, _ = predicted(stage, [str(images / "b.png")], tmp_path)
    assert alone[0]["reconstruction_mse"] == pytest.approx(together[1]["reconstruction_mse"], rel=1e-5)
    other, _ = predicted(stage, [str(images / "b.png")], tmp_path, seed=1)
    assert other[0]["reconstruction_mse"] != pytest.approx(alone[0]["reconstruction_mse"], rel=1e-5)


@pytest.mark.parametrize("name", ["classify", "probe"])
def test_classifiers_tell_probabilities(name: str, images: Path, tmp_path: Path) -> None:
    stage: Any = build(name)
    questions = ["head=0"] if name == "probe" else []
    entries, _ = predicted(stage, [str(images / "a.png")], tmp_path, questions=questions)
    pixels = EvalImage(size=(32, 32))((images / "a.png").read_bytes(), 0).unsqueeze(0)
    with torch.no_grad():
        scores = stage.scores(pixels) if name == "classify" else stage.scores(pixels, torch.ones(1))[:, 0]
    shares = dict(zip(CLASSES, scores[0].softmax(0).tolist(), strict=True))
    likeliest = entries[0]["classes"]
    assert {item["class"]: item["probability"] for item in likeliest} == pytest.approx(shares, rel=1e-4)
    assert [item["probability"] for item in likeliest] == pytest.approx(sorted(shares.values(), reverse=True), rel=1e-4)


def test_flip_compares_images_with_the_texts_asked_for(images: Path, tmp_path: Path) -> None:
    stage: Any = build("flip")
    with pytest.raises(ConfigError, match=r"--ask: .*texts=\[a cat, a dog\]"):
        predicted(stage, [str(images)], tmp_path)
    entries, _ = predicted(stage, [str(images)], tmp_path, questions=["texts=[a cat, a dog]", "embedding=true"])
    for entry in entries:
        assert {t["text"] for t in entry["texts"]} == {"a cat", "a dog"}
        assert sum(t["probability"] for t in entry["texts"]) == pytest.approx(1)
        assert np.linalg.norm(entry["embedding"]) == pytest.approx(1, rel=1e-5)


def test_options_can_be_changed_and_positions_stay_those_that_were_trained(tmp_path: Path) -> None:
    convert.save(build("mae"), str(tmp_path / "w.safetensors"), "vitrail")
    stage: Any = load(str(tmp_path / "w.safetensors"), options={"model.image_size": 64, "mask_ratio": 0.5}).stage
    assert stage.options.model.grid == (8, 8)
    assert stage.options.model.position_grid == (4, 4)
    assert stage.options.mask_ratio == 0.5


def test_weights_of_a_run_and_of_other_projects_are_taken(images: Path, tmp_path: Path) -> None:
    stage = build("mae")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"stage": "mae", "options": OPTIONS["mae"]}))
    (run / "status.json").write_text("{}")
    save_checkpoint(str(run / "checkpoints"), {name: value.detach() for name, value in stage.state_dict().items()})
    convert.save(stage, str(tmp_path / "mae.pth"), "mae")
    ours, _ = predicted(stage, [str(images / "a.png")], tmp_path)
    known = ["heads=2", "decoder_heads=2", "norm_pix=true"]
    for source, form, facts in ((str(run), None, []), (str(tmp_path / "mae.pth"), "mae", known)):
        document, _, _ = predict(
            source, [str(images / "a.png")], str(tmp_path / "out"), print, source_format=form, known=facts
        )
        assert document["images"][0]["reconstruction_mse"] == pytest.approx(ours[0]["reconstruction_mse"], rel=1e-5)


def test_an_encoder_alone_shows_its_attention_and_predicts_nothing(images: Path, tmp_path: Path) -> None:
    convert.save(build("mae"), str(tmp_path / "encoder.pth"), "mae_encoder")
    arguments = (str(tmp_path / "encoder.pth"), [str(images / "a.png")], str(tmp_path / "out"))
    facts = {"source_format": "mae_encoder", "known": ["heads=2"]}
    with pytest.raises(CheckpointError, match="add --attention"):
        predict(*arguments, print, **facts)
    document, _, _ = predict(*arguments, print, attention=True, **facts)
    assert set(document["images"][0]) == {"image", "height", "width", "pictures"}
    with Image.open(tmp_path / "out" / "a.png") as sheet:  # original, mean, rollout and two heads
        assert sheet.width == 5 * (224 + 8) + 8


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"attention": True, "block": 2}, "--block: no block 2; there are 0 to 1"),
        ({"which": "ema"}, "only a run keeps a moving average"),
        ({"questions": ["texts=[a]"]}, "--ask: texts"),
        ({"settings": ["mask_ratio=1.5"]}, "mask_ratio"),
        ({"settings": ["mask_ratio=0.99"]}, "keeps 0 of 16 patches"),
        ({"settings": ["model.image_size=30"]}, "isn't a multiple of patch_size 8"),
        ({"settings": ["model.width=64"]}, "64"),
    ],
)
def test_mistakes_are_named(asked: dict[str, Any], words: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        predicted(build("mae"), [str(images)], tmp_path, **asked)


def test_images_that_cannot_be_read_are_named_and_the_others_done(images: Path, tmp_path: Path) -> None:
    (images / "b.png").write_bytes((images / "b.png").read_bytes()[:400])
    (images / "empty.jpg").write_bytes(b"")
    entries, good = predicted(build("mae"), [str(images), str(images / "notes.txt")], tmp_path)
    assert not good
    errors = {Path(entry["image"]).name: entry.get("error") for entry in entries}
    assert errors["a.png"] is None
    assert "damaged png" in errors["b.png"]
    assert errors["empty.jpg"] == "an empty file"
    assert errors["notes.txt"] == "bytes that are no image"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(images: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(images))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_images_are_files_folders_globs_and_urls(images: Path, web: str) -> None:
    def names(*places: str) -> list[str]:
        return [place.removeprefix(str(images)) for place in find_images(places)]

    assert names(str(images)) == ["/a.png", "/b.png", "/more/a.png"]
    assert names(str(images / "b.png"), str(images / "*.png")) == ["/b.png", "/a.png"]
    assert names(str(images / "**" / "a.*")) == ["/a.png", "/more/a.png"]
    assert find_images([f"{web}/a.png"]) == [f"{web}/a.png"]
    assert read_image(f"{web}/a.png") == (images / "a.png").read_bytes()
    for nothing in (str(images / "*.gif"), str(images / "absent.png"), str(images / "none")):
        with pytest.raises(DataError, match="no image there"):
            find_images([nothing])


def test_a_url_that_fails_is_told(web: str, images: Path, tmp_path: Path) -> None:
    entries, good = predicted(build("mae"), [f"{web}/absent.png"], tmp_path)
    assert not good
    assert entries[0]["error"] == "the server says 404 File not found"
    with pytest.raises(StorageError, match="check the URL"):
        read_image("http://127.0.0.1:9/a.png")


def test_photos_that_a_camera_laid_sideways_are_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    noise(0).save(tmp_path / "photo.jpg", exif=exif)
    pixels = decode(read_image(str(tmp_path / "photo.jpg")))
    stored = decode((tmp_path / "photo.jpg").read_bytes())
    assert pixels.shape == (56, 40, 3)
    assert np.abs(pixels.astype(int) - np.rot90(stored, -1)).max() <= 8  # two decoders' rounding


def test_the_command_writes_replies_and_exits_as_it_should(images: Path, tmp_path: Path) -> None:
    convert.save(build("classify"), str(tmp_path / "w.safetensors"), "vitrail")
    (images / "bad.png").write_bytes(b"no")
    words = "predict w.safetensors images --out seen --attention --block 0 --json"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    command = [sys.executable, "-m", "launch", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    reply = json.loads(io.StringIO(done.stdout).readlines()[-1])
    assert reply["exit_code"] == 2
    assert "images/bad.png: bytes that are no image" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in (tmp_path / "seen").iterdir()} == {
        "a.png", "a.1.png", "b.png", "b.1.png", "a-2.png", "a-2.1.png", "predictions.json"
    }  # fmt: skip


def test_sam_segments_what_points_and_boxes_ask_for_in_pixels_of_each_image(images: Path, tmp_path: Path) -> None:
    from tests.support.sam_batches import tiny_stage

    stage = tiny_stage().eval()
    entries, good = predicted(stage, [str(images)], tmp_path, questions=["points=[[50, 30], [3, 4, 0]]"])
    assert good
    for entry in entries:
        (answered,) = entry["objects"]
        (mask,) = answered["masks"]
        assert mask["segmentation"]["size"] == [40, 56]
        assert isinstance(mask["segmentation"]["counts"], str)
        with Image.open(tmp_path / "out" / entry["pictures"][0]) as drawn:
            assert drawn.width > 2 * 56
    entries, _ = predicted(stage, [str(images)], tmp_path, questions=["boxes=[[1, 2, 20, 30], [4, 4, 50, 39]]"])
    assert [len(answered["masks"]) for answered in entries[0]["objects"]] == [3, 3]
    assert len(entries[0]["pictures"]) == 2
    with pytest.raises(ConfigError, match="outside of an image of 56x40"):
        predicted(stage, [str(images)], tmp_path, questions=["points=[[60, 30]]"])
    with pytest.raises(ConfigError, match="can't be cropped"):
        predicted(stage, [str(images)], tmp_path, questions=["automatic={crop_layers: 1}"])


def test_a_detector_tells_cocos_results_in_pixels_of_the_image(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate(("000000000042.png", "000000000007.png")):
        noise(seed, 40, 56).save(folder / name)
    convert.save(build("vitdet"), str(tmp_path / "det.safetensors"), "vitrail")
    document, lines, _ = predict(
        str(tmp_path / "det.safetensors"), [str(folder)], str(tmp_path / "out"), print, questions=("above=0.0",)
    )
    results = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    detections = [result for image in document["images"] for result in image["detections"]]
    assert len(results) == len(detections) > 0
    assert {result["image_id"] for result in results} == {7, 42}
    assert {result["class"] for result in detections} <= set(CLASSES)
    from pycocotools import mask as coco_mask

    for result in results:
        x, y, w, h = result["bbox"]
        assert -1e-3 <= x <= x + w <= 56 + 1e-3
        assert -1e-3 <= y <= y + h <= 40 + 1e-3
        assert result["segmentation"]["size"] == [40, 56]
        left, top, width, height = coco_mask.toBbox(result["segmentation"])
        assert width == 0 or (left >= x - 1 and top >= y - 1 and left + width <= x + w + 1)
        assert height == 0 or top + height <= y + h + 1
    assert (tmp_path / "out" / "000000000042.png").exists()
    assert any(name in line for line in lines for name in CLASSES)


def test_sam_segments_everything_where_nothing_is_pointed_at(images: Path, tmp_path: Path) -> None:
    from tests.support.sam_batches import tiny_stage

    loose = "automatic={points_per_side: 3, min_iou: 0.0, min_stability: 0.0}"
    entries, _ = predicted(tiny_stage().eval(), [str(images)], tmp_path, questions=[loose])
    assert any(entry["annotations"] for entry in entries)
    for entry in entries:
        ious = [mask["predicted_iou"] for mask in entry["annotations"]]
        assert ious == sorted(ious, reverse=True)
        assert all(mask["segmentation"]["size"] == [40, 56] for mask in entry["annotations"])
        assert len(entry["pictures"]) == 1
