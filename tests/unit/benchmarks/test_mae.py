"""The MAE benchmarks: what they compare is the same work, and the GPU script says what it lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import gpu, mae
from benchmarks.harness import UnequalWork
from pipeline.config import validate
from pipeline.stages.base import DataFacts
from pipeline.stages.mae import MaeOptions, MaeStage


def test_different_losses_are_refused() -> None:
    assert mae.same_loss(1.000, 1.009)
    with pytest.raises(UnequalWork, match=r"loss 1\.00000 against 1\.02000"):
        mae.same_loss(1.00, 1.02)


def test_the_unmasked_encoder_hands_the_decoder_as_many_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of the masking comparison do the same decoding; only the encoder's share differs."""
    monkeypatch.setattr(mae, "BATCH", 2)
    monkeypatch.setattr(mae, "SIDE", 32)
    torch.manual_seed(0)
    model = {"width": 32, "depth": 1, "heads": 2, "image_size": 32, "patch_size": 8}
    options = validate(MaeOptions, {"model": model, "decoder": {"width": 16, "depth": 1, "heads": 2}}, where="test")
    stage = MaeStage(options, DataFacts())
    seen: list[torch.Size] = []
    stage.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].patches.shape))
    encoded: list[torch.Size] = []
    stage.trunk.blocks[0].register_forward_pre_hook(lambda _, given: encoded.append(given[0].shape))
    batch = mae.batches()()
    losses = [mae.loss_of(stage, batch, masked=masked) for masked in (True, False)]
    assert seen == [torch.Size([2, 4, 32])] * 2
    assert [shape[1] for shape in encoded] == [5, 17]
    assert not torch.equal(*losses)


def test_without_a_gpu_the_script_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--on-cpu" in capsys.readouterr().err


def test_the_table_shows_what_was_measured() -> None:
    row: dict[str, Any] = {
        "size": "L", "batch": 128, "step_s": {"median": 0.25}, "images_per_s": 512.0, "achieved_tflops": 300.0,
        "mfu": 0.303, "peak_memory_bytes": 40 * 2**30,
    }  # fmt: skip
    assert gpu.table([row]).splitlines()[1].split() == [
        "L",
        "128",
        "250",
        "ms",
        "512.0",
        "300.0",
        "30.3%",
        "40.0",
        "GiB",
    ]
