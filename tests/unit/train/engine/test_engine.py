"""The engine: exact gradients at every ZeRO stage, state that moves between layouts, NaN that does nothing."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import engine_cases as cases
from tests.support.process_group import ProcessGroup

FROZEN = {"freeze": "trunk.patch_embed", "batch_norm": True}
State = dict[str, tuple[dict[str, Tensor], dict[str, float]]]


@pytest.fixture(scope="module")
def groups(one: ProcessGroup, two: ProcessGroup) -> dict[int, ProcessGroup]:
    return {1: one, 2: two}


def first_moments(state: State) -> Tensor:
    """What one step leaves in exp_avg: the clipped gradient times 1 - beta1."""
    return torch.cat([tensors["exp_avg"] for tensors, _ in state.values() if "exp_avg" in tensors])


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["plain", "pair"])
def test_gradient_is_the_full_batchs_at_every_stage_world_and_accumulation(
    groups: dict[int, ProcessGroup], kind: str
) -> None:
    reference = first_moments(groups[1].run(cases.run, 0, "fp32", kind, 1, 1)[0][1])
    for world, zero_stage, num_micro in [*itertools.product((2,), (0, 1, 2, 3), (1, 4)), (1, 2, 4), (1, 3, 1)]:
        ours = first_moments(groups[world].run(cases.run, zero_stage, "fp32", kind, 1, num_micro)[0][1])
        assert relative_error(ours, reference) < 2e-5, (world, zero_stage, num_micro)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_later_steps_start_from_clean_gradients(two: ProcessGroup, zero_stage: int) -> None:
    """With GradCache the first backward of a step reaches the head only: nothing of the last step may remain."""
    ours, reference = (two.run(cases.run, stage, "fp32", "pair", 3, n)[0] for stage, n in ((zero_stage, 4), (0, 1)))
    assert [row[0] for row in ours[0]] == pytest.approx([row[0] for row in reference[0]], rel=1e-3)
    assert [row[2] for row in ours[0]] == pytest.approx([row[2] for row in reference[0]], rel=1e-3)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_accumulates_in_fp32(two: ProcessGroup, zero_stage: int) -> None:
    reference = first_moments(two.run(cases.run, 0, "fp32", "plain", 1, 1)[0][1])
    many = first_moments(two.run(cases.run, zero_stage, "bf16", "plain", 1, 8)[0][1])
    assert relative_error(many, reference) < 0.03


def test_weights_are_kept_in_fp32_below_bf16(two: ProcessGroup) -> None:
    for zero_stage in (0, 1, 2, 3):
        _, state, _ = two.run(cases.run, zero_stage, "bf16", "plain", 0, 1, FROZEN)[0]
        built = two.run(cases.built_weights, FROZEN)[0]
        for name, value in built.items():
            assert torch.equal(state[name][0]["value"].view(value.shape), value), name


LAYOUTS = [(1, 0), (1, 2), (2, 0), (2, 2), (2, 3)]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("plain", "fp32"),
        ("plain", "bf16"),
        *(pytest.param("pair", p, marks=pytest.mark.slow) for p in ("fp32", "bf16")),
    ],
)
def test_state_moves_between_layouts(groups: dict[int, ProcessGroup], precision: str, kind: str) -> None:
    options = FROZEN if kind == "plain" else None
    for source in LAYOUTS:
        _, state, digest = groups[source[0]].run(cases.run, source[1], precision, kind, 3, 1, options)[0]
        for target in LAYOUTS if source == LAYOUTS[0] else LAYOUTS[3:]:
            restored, _, _, visible = groups[target[0]].run(
                cases.resume, state, target[1], precision, kind, 3, 3, options
            )[0]
            assert restored == digest, (source, target)
            expected = groups[1].run(cases.predict_from, state, precision, kind, options)[0]
            for ours, theirs in zip(visible, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_five_steps_are_three_and_a_resume_and_two(two: ProcessGroup, zero_stage: int, precision: str) -> None:
    options = {**FROZEN, "dropout": 0.3}
    _, _, straight = two.run(cases.run, zero_stage, precision, "plain", 5, 1, options)[0]
    _, state, _ = two.run(cases.run, zero_stage, precision, "plain", 3, 1, options)[0]
    _, _, resumed, _ = two.run(cases.resume, state, zero_stage, precision, "plain", 3, 5, options)[0]
    assert resumed == straight


def test_groups_keep_their_settings(two: ProcessGroup) -> None:
    _, state, _ = two.run(cases.run, 2, "fp32", "plain", 2, 1, FROZEN)[0]
    assert state["head.weight"][1] == {"lr": 1e-2, "weight_decay": 0.1, "lr_scale": 1.0, "step": 2.0}
    assert state["head.bias"][1]["weight_decay"] == 0.0
    assert state["trunk.blocks.1.mlp.fc1.weight"][1]["lr_scale"] == pytest.approx(0.7)
    assert state["trunk.blocks.0.mlp.fc1.weight"][1]["lr"] == pytest.approx(0.49e-2)
    assert state["trunk.patch_embed.proj.weight"][1] == {}
    assert set(state["trunk.patch_embed.proj.weight"][0]) == {"value"}
    assert not torch.equal(state["norm.running_mean"][0]["value"], torch.zeros(16))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_nan_on_one_rank_changes_nothing_anywhere(two: ProcessGroup, zero_stage: int, precision: str) -> None:
    poison = 29  # of rank 1, in step 1 of ids 16 ... 31
    _, clean, _ = two.run(cases.run, zero_stage, precision, "plain", 1, 2, {"poison": poison})[0]
    for results, after, _ in two.run(cases.run, zero_stage, precision, "plain", 2, 2, {"poison": poison}):
        loss, _, _, applied, _, _, suspects = results[1]
        assert math.isnan(loss)
        assert not applied
        assert poison in suspects
        assert set(suspects) <= set(range(28, 32)), "only the micro batch it came from"
        for name, (tensors, _) in clean.items():
            for key, value in tensors.items():
                assert torch.equal(value, after[name][0][key]), (name, key)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_steps_after_a_skipped_one_are_as_if_it_never_was(two: ProcessGroup, zero_stage: int) -> None:
    state = two.run(cases.run_with_gap, zero_stage, "bf16", 29)[0]
    reference = two.run(cases.run_with_gap, zero_stage, "bf16", None)[0]
    assert state == reference


SPIKES = [(0, "bf16", "plain"), (2, "fp32", "plain"), (3, "bf16", "pair")]


@pytest.mark.parametrize(
    ("zero_stage", "precision", "kind"),
    [
        pytest.param(*case, marks=() if case in SPIKES else pytest.mark.slow)
        for case in itertools.product((0, 1, 2, 3), ("fp32", "bf16"), ("plain", "pair"))
    ],
)
def test_a_loss_beyond_the_limit_changes_nothing(two: ProcessGroup, zero_stage: int, precision: str, kind: str) -> None:
    state = two.run(cases.run_with_gap, zero_stage, precision, 0, kind)[0]
    assert state == two.run(cases.run_with_gap, zero_stage, precision, None, kind)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_limits_hold_on_the_masters(two: ProcessGroup, zero_stage: int, precision: str) -> None:
    assert two.run(cases.scale_after, zero_stage, precision, True)[0] == 2.0


def test_without_limits_the_scale_is_free(two: ProcessGroup) -> None:
    assert two.run(cases.scale_after, 2, "fp32", False)[0] == 2.5


def test_frozen_parameters_stay_and_absent_samples_count_for_nothing(two: ProcessGroup) -> None:
    before, after = two.run(cases.frozen_before_and_after, FROZEN)[0]
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    with_absent, without = two.run(cases.absent_samples)[0]
    assert with_absent == pytest.approx(without, rel=1e-5)


def test_a_batch_of_absent_samples_is_no_step(two: ProcessGroup) -> None:
    applied, changed = two.run(cases.all_absent)[0]
    assert not applied
    assert not changed


def test_stop_of_one_rank_reaches_all(two: ProcessGroup) -> None:
    assert two.run(cases.stop_votes) == [[False, True]] * 2


@pytest.mark.parametrize(("name", "moment"), [("sgd", "momentum_buffer"), ("lars", "momentum_buffer")])
def test_other_optimizers_resume_too(two: ProcessGroup, name: str, moment: str) -> None:
    straight, resumed, keys = two.run(cases.other_optimizer, name)[0]
    assert straight == resumed
    assert moment in keys


def test_dropout_is_that_of_the_step_not_of_the_process(one: ProcessGroup) -> None:
    def losses(results: Any) -> list[float]:
        return [row[0] for row in results]

    again, once = (one.run(cases.run, 0, "fp32", "plain", 2, 1, {"dropout": 0.5})[0] for _ in range(2))
    plain = one.run(cases.run, 0, "fp32", "plain", 2, 1)[0]
    assert losses(again[0]) == losses(once[0])
    assert losses(again[0]) != losses(plain[0])
