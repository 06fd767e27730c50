"""What every registered stage must do, under ZeRO-3 on two ranks and on one; `stage_trial.py` does the work."""

from __future__ import annotations

import io
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from pipeline.classes import class_parameters
from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.pictures.picture import Picture
from pipeline.stages import STAGES, stage_class
from pipeline.stages.base import DataFacts

pytestmark = pytest.mark.timeout(900)  # one fixture does everything
CLASSES = ("dark", "red", "green", "blue")


class Trials(NamedTuple):
    """What the trial of one stage brought: of one rank alone, and of each of two."""

    alone: dict[str, Any]
    ranks: tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def all_trials(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trials]:
    folder = tmp_path_factory.mktemp("trials")
    processes = start(repository, folder, 2) + start(repository, folder, 1)
    try:
        for process in processes:
            output, _ = process.communicate(timeout=800)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    found = {
        name: pickle.loads((folder / f"world{name}.pickle").read_bytes()) for name in ("1-rank0", "2-rank0", "2-rank1")
    }
    return {s: Trials(found["1-rank0"][s], (found["2-rank0"][s], found["2-rank1"][s])) for s in STAGES}


def start(repository: Path, folder: Path, world_size: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(Path(__file__).parents[1] / "support" / "stage_trial.py")
    world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common = os.environ | world | {"PYTHONPATH": str(repository)}
    return [
        subprocess.Popen(
            [sys.executable, script, str(folder)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


@pytest.fixture(params=list(STAGES))
def trials(request: pytest.FixtureRequest, all_trials: dict[str, Trials]) -> Trials:
    return all_trials[request.param]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_says_whether_it_learns_classes(name: str) -> None:
    """Then all data sets of a run must name the same: see `Stage.label_use`."""
    cls = stage_class(name)
    model = {"width": 32, "depth": 2, "heads": 2, "image_size": 32, "patch_size": 8}
    if name in ("vitdet", "segment", "sam"):
        model |= {"cls_token": False, "final_norm": False}
    options = validate(cls.options_class, {"model": model}, where=name)
    if cls.class_rows is None:
        with torch.device("meta"):
            shapes = [
                {key: tuple(value.shape) for key, value in cls(options, DataFacts(classes)).state_dict().items()}
                for classes in ((), CLASSES)
            ]
        assert shapes[0] == shapes[1]
        return
    assert cls.label_use(options) is not None
    parameter, others = cls.class_rows
    with torch.device("meta"):
        stage = cls(options, DataFacts(CLASSES))
    assert stage.state_dict()[parameter].shape[0] == len(CLASSES) + others
    rows = class_parameters(stage)
    assert parameter in rows
    assert not [name for name in rows if name.startswith("trunk.")]
    with pytest.raises(ConfigError, match="names no classes"):
        cls(options, DataFacts())


@pytest.mark.parametrize("key", ["losses", "losses_bf16"])
def test_the_loss_falls(trials: Trials, key: str) -> None:
    losses = trials.ranks[0][key]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_ten_steps_equal_five_and_a_resume_and_five(trials: Trials) -> None:
    """Bit for bit, in every parameter and buffer, from a snapshot restored into a differently initialised stage."""
    ran = trials.ranks[0]
    assert ran["losses_resumed"] == ran["losses"][5:]
    assert ran["after"].keys() == ran["after_resumed"].keys()
    for name, value in ran["after"].items():
        assert torch.equal(value, ran["after_resumed"][name]), name


def test_a_snapshot_holds_the_whole_state(trials: Trials) -> None:
    assert trials.ranks[0]["after"].keys() == trials.ranks[0]["initial"].keys()


def test_every_trainable_parameter_gets_a_gradient_and_no_other(trials: Trials) -> None:
    """Within five steps: what stands behind a factor that starts as zero is first reached in the second."""
    ran = trials.ranks[0]
    assert set(ran["gradients"]) == set(ran["trainable"])
    assert set(ran["reached"]) == set(ran["trainable"])


def test_frozen_parameters_stay_as_they_are(trials: Trials) -> None:
    ran = trials.ranks[0]
    trained = {name for name in ran["initial"] if not torch.equal(ran["initial"][name], ran["after"][name])}
    buffers = trained - set(ran["trainable"])
    assert trained >= set(ran["trainable"])
    assert all("running" in name or "num_" in name for name in buffers), buffers


def test_the_gradient_is_the_same_on_one_rank_and_on_two(trials: Trials) -> None:
    alike(trials.alone["gradients"], trials.ranks[0]["gradients"])


def test_accumulation_is_exact(trials: Trials, request: pytest.FixtureRequest) -> None:
    if "probe" in request.node.name:
        pytest.skip("its features are standardised over what all ranks have at hand, a micro batch (see FeatureNorm)")
    alike(trials.ranks[0]["gradients"], trials.ranks[0]["gradients_accumulated"])


def alike(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Gradients up to rounding: of each parameter's greatest, and fp32's own of the greatest of all, since those of
    biases of keys, to which a softmax is blind, are nothing but rounding.
    """
    greatest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7 * greatest, name


def test_losses_and_figures_are_the_same_on_one_rank_and_on_two(trials: Trials) -> None:
    alone, shared = trials.alone, trials.ranks[0]
    assert shared["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert shared["figures"] == pytest.approx(alone["figures"], rel=1e-3)


def test_all_ranks_measure_the_same(trials: Trials) -> None:
    first, second = trials.ranks
    assert first["figures"] == second["figures"]
    assert first["figures"], "a stage can be measured"
    assert all(name.split("/")[0] in ("validation", "heldout") for name in first["figures"])
    assert first["details"] == second["details"]
    assert first["losses"] == second["losses"]


def test_pictures_can_be_saved(trials: Trials) -> None:
    pictures: list[Picture] = trials.ranks[0]["pictures"]
    assert pictures
    for picture in pictures:
        assert picture.title
        for caption, image in picture.panels:
            assert caption
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(io.BytesIO(), "PNG")
