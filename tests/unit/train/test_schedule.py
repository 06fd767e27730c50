"""Learning rates, parameter groups, and what a configuration comes to."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.ranks import World
from pipeline.stages.base import DataFacts
from pipeline.train.config import DataConfig, EngineConfig, OptimConfig, TrainConfig
from pipeline.train.optim import parameter_groups, peak_rate, scheduled_rate
from pipeline.train.resolve import resolve
from tests.support.stages_for_tests import TinyOptions, TinyStage

CPU = torch.device("cpu")


def test_cosine_rises_and_falls() -> None:
    config = OptimConfig(lr=1.0, warmup_samples=100, min_lr=0.1)
    rates = [scheduled_rate(config, 1.0, samples, 1100) for samples in (0, 50, 100, 600, 1100, 2000)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.1])
    quarter = scheduled_rate(config, 1.0, 350, 1100)
    assert quarter == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_warm_up_may_begin_above_zero_as_torch_and_detectron2_have_it() -> None:
    config = OptimConfig(lr=0.4, warmup_samples=250, warmup_start=0.001, schedule="constant")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    peer = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.001, total_iters=250)
    for samples in range(300):
        assert scheduled_rate(config, 0.4, samples, 1000) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        peer.step()


def test_steps_and_constant() -> None:
    steps = OptimConfig(lr=1.0, schedule="step", drops=(0.5, 0.75))
    assert [scheduled_rate(steps, 1.0, s, 100) for s in (0, 49, 50, 75, 99)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    assert scheduled_rate(OptimConfig(lr=1.0, schedule="constant"), 1.0, 99, 100) == 1.0


def test_base_rate_scales_with_the_batch() -> None:
    assert peak_rate(OptimConfig(base_lr=1.5e-4), 4096) == pytest.approx(2.4e-3)
    assert peak_rate(OptimConfig(lr=0.3), 4096) == 0.3


def test_layers_decay_from_the_head_down() -> None:
    stage = TinyStage(TinyOptions(), DataFacts())
    groups = parameter_groups(stage, OptimConfig(lr=1.0, layer_decay=0.5, weight_decay=0.1))
    settings = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert settings["trunk.patch_embed.proj.weight"] == (0.125, 0.1)  # depth 2: layers 0, 1, 2 and the rest at 3
    assert settings["trunk.cls_token"] == (0.125, 0.1)
    assert settings["trunk.blocks.0.attn.qkv.weight"] == (0.25, 0.1)
    assert settings["trunk.blocks.1.attn.qkv.bias"] == (0.5, 0.0)
    assert settings["trunk.norm.weight"] == (1.0, 0.0)
    assert settings["head.weight"] == (1.0, 0.1)
    assert set(settings) == {name for name, _ in stage.named_parameters()}


def test_frozen_parameters_are_in_no_group() -> None:
    stage = TinyStage(TinyOptions(freeze="trunk."), DataFacts())
    groups = parameter_groups(stage, OptimConfig(lr=1.0))
    assert sorted(name for group in groups for name in group["names"]) == ["head.bias", "head.weight"]
    assert not any(p.requires_grad for p in stage.trunk.parameters())
    with pytest.raises(ConfigError, match="frozen"):
        parameter_groups(TinyStage(TinyOptions(freeze="t"), DataFacts()).requires_grad_(False), OptimConfig(lr=1.0))


def config(optim: OptimConfig | None = None, **engine: object) -> TrainConfig:
    return TrainConfig(
        name="x",
        stage="mae",
        data=DataConfig(train="data", global_batch=48, lanes=16),
        length_samples=1000,
        optim=optim or OptimConfig(base_lr=1.0, warmup_samples=100),
        engine=EngineConfig(**engine),  # type: ignore[arg-type]
    )


def test_derived_values() -> None:
    resolved = resolve(config(micro_batch=4, precision="bf16"), World(0, 3, 0), CPU)
    assert (resolved.rank_batch, resolved.micro_batch, resolved.num_micro) == (16, 4, 4)
    assert (resolved.num_steps, resolved.warmup_steps) == (21, 3)
    assert resolved.peak_lr == pytest.approx(48 / 256)
    assert resolved.precision == "bf16"


def test_what_can_not_be_shared_is_refused_with_what_can() -> None:
    with pytest.raises(ConfigError, match="1, 2, 3, 4, 6, 8, 12, 16") as caught:
        resolve(config(), World(0, 5, 0), CPU)
    assert "data.global_batch" in str(caught.value)


@pytest.mark.parametrize(
    ("world", "bound", "micro", "num_micro"), [(2, 5, 4, 6), (1, 5, 4, 12), (3, 5, 4, 4), (6, 9, 8, 1)]
)
def test_the_global_batch_stays_and_the_micro_batch_is_computed_anew(
    world: int, bound: int, micro: int, num_micro: int
) -> None:
    """The bound is one of memory: the largest share of a rank's samples within it is taken."""
    resolved = resolve(config(micro_batch=bound), World(0, world, 0), CPU)
    assert (resolved.micro_batch, resolved.num_micro) == (micro, num_micro)
    assert world * micro * num_micro == 48


def test_lars_is_refused_under_zero() -> None:
    lars = OptimConfig(name="lars", lr=0.1)
    with pytest.raises(ConfigError, match=r"engine\.zero_stage=0"):
        resolve(config(lars), World(0, 1, 0), CPU)
    assert resolve(config(lars, zero_stage=0), World(0, 1, 0), CPU).zero_stage == 0
