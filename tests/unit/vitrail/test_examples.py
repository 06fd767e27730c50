"""The Python API: its examples, what importing it costs, and what the examples leave out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import vitrail
from pipeline.errors import ConfigError, DataError
from tests.support import facade_examples, train_cases
from tests.unit.data.conftest import numbered, write_data_set

REPOSITORY = Path(__file__).resolve().parents[3]


def write_example_data(folder: Path) -> None:
    """What the examples expect in the working directory."""
    write_data_set(str(folder / "data" / "train"), numbered([40, 24]))
    write_data_set(str(folder / "data" / "heldout"), numbered([10]))
    document = train_cases.document(folder, "mae", length_samples=32) | {"runs": "runs"}
    document["data"] |= {"train": "data/train", "evaluate": {"heldout": "data/heldout"}}
    (folder / "mae.yaml").write_text(yaml.safe_dump(document))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the examples have run."""
    folder = tmp_path_factory.mktemp("notebook")
    write_example_data(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        failures = facade_examples.run_examples()
    finally:
        os.chdir(before)
    assert failures == []
    return folder


def test_the_examples_run(place: Path) -> None:
    assert (place / "vit.safetensors").is_file()
    assert set(facade_examples.ORDER) == {name for name in vitrail.__all__ if name.islower()}


def test_images_come_in_any_form(place: Path) -> None:
    model = vitrail.load(str(place / "runs" / "mae"))
    pixels = np.asarray(Image.open(place / "photo.png"))
    forms: list[Any] = [
        place / "photo.png",
        (place / "photo.png").read_bytes(),
        Image.fromarray(pixels),
        pixels,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
    ]
    vectors = vitrail.embed(model, forms)
    assert vectors.shape == (5, 16)
    assert all(torch.equal(vector, vectors[0]) for vector in vectors)
    with pytest.raises(DataError, match=r"an array \(40, 56, 3\) of float64 is no image"):
        vitrail.embed(model, pixels.astype(np.float64))
    with pytest.raises(DataError, match=r"a tensor \(3, 40, 56\) of torch.bfloat16 is no image"):
        vitrail.embed(model, forms[4].bfloat16())
    transparent = Image.fromarray(pixels).convert("RGBA")
    transparent.putalpha(100)
    transparent.save(place / "transparent.png")
    assert torch.equal(*vitrail.embed(model, [transparent, place / "transparent.png"]))
    predictions = vitrail.predict(model, [str(place / "photo.png"), b"no image"], attention=True)
    assert predictions[0].facts["height"] == 40
    assert len(predictions[0].pictures) == 2
    assert predictions[1].error == "bytes that are no image"


def test_neighbours_are_measured_and_mistakes_named(place: Path) -> None:
    run = str(place / "runs" / "mae")
    heldout, train = str(place / "data" / "heldout"), str(place / "data" / "train")
    model = vitrail.load(run)
    result = vitrail.evaluate(model, {"set": heldout}, train=train, knn=vitrail.KnnOptions(k=3))
    assert list(result.figures) == ["set/knn_top1"]
    changed = vitrail.load(run, options={"mask_ratio": 0.25})
    assert list(vitrail.evaluate(changed, {"set": heldout}, train=train).figures) == ["set/reconstruction_mse"]
    with pytest.raises(ConfigError, match="has no text tower"):
        vitrail.embed(model, texts=["a cat"])
    with pytest.raises(ConfigError, match="either images or texts"):
        vitrail.embed(model)


def test_configurations_may_be_given_as_they_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    document = yaml.safe_load((place / "mae.yaml").read_text())
    again = vitrail.train(document)
    assert (again.status, again.step) == ("done", 2)


def test_importing_costs_nothing_until_something_is_used() -> None:
    code = "import sys, vitrail; print([m for m in ('torch', 'numpy', 'pydantic', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "use", ["import pipeline.convert", "import vitrail; vitrail.load, vitrail.convert, vitrail.read_dataset"]
)
def test_using_weights_needs_neither_ray_nor_deepspeed(use: str) -> None:
    code = f"import sys; {use}; print([m for m in ('ray', 'deepspeed', 'webdataset') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def build_wheel(folder: Path) -> Path:
    """The wheel of a copy of the source tree: building leaves its traces in the tree."""
    source = folder / "source"
    for package in ("pipeline", "data_prep", "launch", "vitrail", "configs"):
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    uv = Path(sys.executable).with_name("uv")
    if uv.exists():
        build = [str(uv), "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", str(folder)]
    done = subprocess.run([*build, str(source)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_examples_run_from_the_built_wheel(tmp_path: Path) -> None:
    """In an environment that has the dependencies, but knows nothing of this source tree."""
    wheel = build_wheel(tmp_path)
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(packages)], check=True)
    # A plain path, whose own .pth files, that of the editable installation among them, aren't read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    write_example_data(folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = [str(python), "-c", "import vitrail, pipeline; print(vitrail.__file__, pipeline.__file__)"]
    imported = subprocess.run(where, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    assert imported.count(str(packages)) == 2
    examples = [str(python), str(REPOSITORY / "tests" / "support" / "facade_examples.py")]
    done = subprocess.run(examples, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
