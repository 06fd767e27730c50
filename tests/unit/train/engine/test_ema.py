"""The moving average of the weights: timm's, on any layout, before and after a resume; evaluation and export use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.run_dir import RunDir
from pipeline.train.checkpoints.restore import read_saved, read_weights
from pipeline.train.config import EmaConfig
from pipeline.train.engine.ema import decay_after
from tests.support import engine_cases as cases
from tests.support import run_cases, train_cases
from tests.support.process_group import ProcessGroup
from tests.support.weight_verbs import convert_weights


def test_half_of_the_average_is_newer_after_a_half_life_at_any_batch_size() -> None:
    for batch in (10, 50, 100, 200):
        remaining = 1.0
        for samples in range(0, 1000, batch):
            remaining *= decay_after(EmaConfig(half_life_samples=500), samples, batch)
        assert remaining == pytest.approx(0.25)


def test_the_ramp_up_is_that_of_edm() -> None:
    config = EmaConfig(half_life_samples=500, rampup_ratio=0.05)
    assert decay_after(config, 0, 100) == 0.5 ** (100 / (0.05 * 100))
    assert decay_after(config, 100_000, 100) == 0.5 ** (100 / 500)


LAYOUTS = [(world, stage) for world in (1, 2) for stage in (0, 1, 2, 3)]
QUICK = [(2, 0), (2, 2), (2, 3)]


@pytest.mark.parametrize(
    ("world", "zero_stage"),
    [pytest.param(*layout, marks=() if layout in QUICK else pytest.mark.slow) for layout in LAYOUTS],
)
def test_after_20_steps_and_a_resume_it_is_timms(
    one: ProcessGroup, two: ProcessGroup, world: int, zero_stage: int
) -> None:
    """1e-6: what 20 steps of reductions in another order come to (measured 2e-7)."""
    expected, expected_logits = one.run(cases.averaged_by_timm, 20)[0]
    group = {1: one, 2: two}[world]
    state, averaged, logits, digests = group.run(cases.averaged_over_a_resume, zero_stage, "fp32", None, 20)[0]
    worst = max(
        float((state[name][0]["ema"].view(value.shape) - value).abs().max()) for name, value in expected.items()
    )
    assert worst <= 1e-6
    moved = max(float((state[name][0]["value"] - state[name][0]["ema"]).abs().max()) for name in expected)
    assert moved > 1e-3, "an average equal to the weights would show nothing"
    torch.testing.assert_close(averaged, expected_logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(averaged, logits[0], atol=1e-4)
    assert torch.equal(logits[0], logits[1]), "the weights come back as they were"
    assert digests[0] == digests[1]


@pytest.mark.parametrize("zero_stage", [pytest.param(z, marks=() if z == 2 else pytest.mark.slow) for z in range(4)])
def test_in_bf16_it_follows_the_fp32_masters_and_the_buffers(two: ProcessGroup, zero_stage: int) -> None:
    options = {"batch_norm": True, "freeze": "trunk.patch_embed"}
    ours, timms = two.run(cases.averages_followed, zero_stage, "bf16", options)[0]
    assert ours.keys() == timms.keys()
    for name, value in timms.items():
        tolerance = 2e-2 if name.startswith("norm.running") else 1e-6  # buffers, and so their averages, are in bf16
        torch.testing.assert_close(ours[name].float(), value.float(), rtol=tolerance, atol=tolerance)


def test_a_run_says_which_weights_it_measured_and_exports(tmp_path: Path, two: ProcessGroup) -> None:
    train_cases.write_data(tmp_path)
    changes = {"ema": {"half_life_samples": 64, "evaluate": "both"}, "length_samples": 128}
    document = train_cases.document(tmp_path, "averaged", **changes)
    assert two.run(run_cases.run, document, 4)[0][0] == "stopped"
    assert two.run(run_cases.run, document)[0][0] == "done"
    run = RunDir(str(tmp_path / "runs" / "averaged"))
    (line,) = [line for line in run.metrics() if line["kind"] == "evaluate"]
    assert line["weights"] == "ema"
    name = "heldout/reconstruction_mse"
    assert line["figures"].keys() == {name, f"{name}_raw"}
    assert line["figures"][name] != line["figures"][f"{name}_raw"]

    ema, raw = read_saved(run.url), read_saved(run.url, "raw")
    assert (ema.which, raw.which) == ("ema", "raw")
    assert any(not torch.equal(ema.tensors[n], raw.tensors[n]) for n in ema.tensors)
    assert run.status()["weights_sha256"] == run_cases.digest(read_weights(run.url, "raw"))
    for which, saved in (("auto", ema), ("ema", ema), ("raw", raw)):
        target = str(tmp_path / f"{which}.safetensors")
        document, lines = convert_weights(run.url, target, None, "vitrail", [], which)
        assert document["weights"] == saved.describe()
        assert saved.describe() in lines[0]
        exported = read_weights(target)
        assert all(torch.equal(exported[n], value) for n, value in saved.tensors.items() if n in exported)
    tuned = train_cases.document(
        tmp_path, "tuned", init_from=run.url, init_weights="raw", length_samples=16, **{"optim.lr": 1e-30}
    )
    assert two.run(run_cases.run, tuned)[0][0] == "done"
    started = read_weights(str(tmp_path / "runs" / "tuned"))
    assert all(torch.equal(started[n], raw.tensors[n]) for n in started if n.startswith("trunk."))


def test_asking_for_an_average_that_is_not_kept_is_refused(tmp_path: Path, one: ProcessGroup) -> None:
    train_cases.write_data(tmp_path)
    document = train_cases.document(tmp_path, "plain", length_samples=16)
    assert one.run(run_cases.run, document)[0][0] == "done"
    with pytest.raises(CheckpointError, match="keeps no moving average"):
        read_weights(str(tmp_path / "runs" / "plain"), "ema")
    assert (
        json.loads((tmp_path / "runs" / "plain" / "evaluations" / "step-000000001.json").read_text())["details"][
            "weights"
        ]
        == "raw"
    )
