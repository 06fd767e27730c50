"""MAE's pretraining, step by step, against transformers' ViTMAE driven by plain torch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import trajectory_cases as cases
from tests.support.process_group import ProcessGroup


@pytest.fixture(scope="module")
def expected(one: ProcessGroup, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    losses = one.run(cases.theirs, str(tmp_path_factory.mktemp("peer")))[0]
    assert losses[-1] < 0.8 * losses[0], "a loss that doesn't fall would show nothing"
    return losses


@pytest.mark.parametrize("zero_stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_fifty_steps_of_the_recipe_are_those_of_plain_torch(
    two: ProcessGroup, expected: list[float], zero_stage: int
) -> None:
    """On two ranks; 1e-4 is what rounding may grow to (measured 2e-7)."""
    ours = two.run(cases.ours, zero_stage)[0]
    assert len(ours) == cases.NUM_STEPS
    assert ours == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"betas": (0.9, 0.999)}, {"weight_decay": 0.5}, {"warmup_samples": 0}, {"min_lr": 1e-4}]
)
def test_the_trajectory_would_show_a_wrong_setting(
    two: ProcessGroup, expected: list[float], changes: dict[str, Any]
) -> None:
    ours = two.run(cases.ours, 2, changes)[0]
    assert ours != pytest.approx(expected, rel=1e-4)
