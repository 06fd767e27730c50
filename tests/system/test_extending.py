"""The worked examples of docs/extending do what their pages say: each is taken from its page, registered and used."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from launch.backends.base import Job
from launch.chain.kinds import KINDS, step_kind
from launch.chain.kinds.base import ChainFolders
from launch.stopping import StopRequest
from pipeline import convert
from pipeline.config import validate
from pipeline.data.batch import Batch, RawSample
from pipeline.data.images.transforms import EvalImage
from pipeline.stages import STAGES, stage_class
from pipeline.stages.base import DataFacts
from tests.support.stage_trial import MODEL, TINY
from tests.support.tiny_chain import wait_for

PAGES = Path(__file__).resolve().parents[2] / "docs" / "extending"
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Module = Callable[[str, str, int], types.ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    """Makes the example of a page, its n-th block of Python, a module of the name the page gives its file."""

    def make(page: str, name: str, block: int = 0) -> types.ModuleType:
        source = _PYTHON.findall((PAGES / page).read_text(encoding="utf-8"))[block]
        made = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made)
        exec(compile(source, f"{page}, block {block}", "exec", dont_inherit=True), made.__dict__)
        return made

    return make


def gradients_batch(size: int) -> Batch:
    """Images that grow brighter downwards, so that a rotation shows."""
    rows = torch.linspace(0, 255, 32).to(torch.uint8).view(1, 1, 32, 1).expand(size, 3, 32, 32).contiguous()
    numbers = torch.arange(size)
    return Batch(
        ids=numbers, seeds=numbers * 7919, weight=torch.ones(size), position=0, images=rows, text=None, labels=None,
        instances=None,
    )  # fmt: skip


def test_an_objective_learns_and_is_measured(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    module("objective.md", "pipeline.stages.rotation", 0)
    monkeypatch.setitem(STAGES, "rotation", "pipeline.stages.rotation:RotationStage")
    cls = stage_class("rotation")
    options = validate(cls.options_class, {"model": MODEL}, where="test")
    torch.manual_seed(0)
    stage = cls(options, DataFacts())
    batch = gradients_batch(16)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3)
    totals = []
    for _ in range(30):
        losses = stage("loss", batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(float(losses.total))
    assert totals[-1] < 0.5 * totals[0]
    assert set(stage("predict", batch)) == {"rotation_top1"}
    assert list(stage.evaluations()) == ["rotation"]


def test_a_source_is_built_from(module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from data_prep.build import build
    from data_prep.config import PrepConfig
    from data_prep.sources import SOURCES
    from pipeline.data.manifest import read_manifest

    module("source.md", "data_prep.sources.listing")
    monkeypatch.setitem(SOURCES, "listing", "data_prep.sources.listing:ListingOptions")
    for number in range(6):
        Image.new("RGB", (24, 16), (40 * number, 80, 200)).save(tmp_path / f"{number}.png")
    (tmp_path / "listing.txt").write_text("".join(f"{number}.png\tpicture {number}\n" for number in range(6)))
    document = {
        "output": str(tmp_path / "out"),
        "source": {"type": "listing", "url": str(tmp_path / "listing.txt")},
        "splits": {"shares": {"train": 1.0}},
        "ray": {"workers": 0},
    }
    report = build(validate(PrepConfig, document, where="test"))
    assert report.document()["written"] == 6
    assert read_manifest(str(tmp_path / "out" / "train")).num_samples == 6


def test_a_weight_format_goes_there_and_back(module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    example = module("format.md", "pipeline.convert.my_lab")
    monkeypatch.setitem(convert.FORMATS, "my_lab", example.MyLab())
    cls = stage_class("mae")
    torch.manual_seed(0)
    stage = cls(validate(cls.options_class, TINY["mae"], where="test"), DataFacts())
    convert.save(stage, str(tmp_path / "lab"), "my_lab")
    again = convert.load(str(tmp_path / "lab"), "my_lab")
    assert again.options == stage.options
    for name, value in stage.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_an_augmentation_depends_on_the_seed_alone(module: Module) -> None:
    example = module("augmentation.md", "pipeline.data.images.inverted")
    data = io.BytesIO()
    Image.new("RGB", (32, 32), (10, 20, 30)).save(data, "PNG")
    sample = RawSample(0, "key", {"png": data.getvalue()})
    transform = example.SometimesInverted(EvalImage(size=(32, 32)), share=0.5)
    images = [transform(sample, seed).image for seed in range(40)]
    assert all(torch.equal(image, transform(sample, seed).image) for seed, image in enumerate(images))
    first = [int(image[0, 0, 0]) for image in images]
    assert set(first) == {10, 245}
    assert 8 < first.count(245) < 32


def test_a_backend_submits_finds_and_stops(module: Module, tmp_path: Path) -> None:
    example = module("backend.md", "launch.backends.detached", 0)
    backend = example.Detached(tmp_path)
    done = backend.submit(Job("hello", ("sh", "-c", "echo hello; exit 75")))
    wait_for(lambda: done.result() is not None, "the job's end", timeout_s=20)
    assert (done.status(), list(done.logs())) == ("stopped", ["hello"])
    running = backend.submit(Job("long", ("sleep", "60")))
    assert running.status() == "running"
    again = example.Detached(tmp_path).find("long")
    assert again.status() == "running"
    os.killpg(int((tmp_path / "long" / "pid").read_text()), signal.SIGTERM)
    assert backend.find("nothing") is None


def test_a_kind_of_step_runs(module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module("backend.md", "launch.chain.kinds.note", 1)
    monkeypatch.setitem(KINDS, "note", "launch.chain.kinds.note:NoteStep")
    kind, document = step_kind("note"), {"text": "as agreed"}
    output = kind.output("memo", document, ChainFolders(tmp_path, str(tmp_path / "store")))
    summary: dict[str, Any] = kind.run(document, where="test", output=output, stop=StopRequest())
    assert summary == {"written": str(tmp_path / "memo.txt")}
    assert (tmp_path / "memo.txt").read_text() == "as agreed"
