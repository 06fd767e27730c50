"""Contrastive training, step by step, against open_clip's model and loss driven by plain torch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import flip_trajectory_cases as cases
from tests.support.process_group import ProcessGroup


@pytest.fixture(scope="module")
def expected(one: ProcessGroup, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    losses = one.run(cases.theirs, str(tmp_path_factory.mktemp("peer")))[0]
    assert losses[-1] < 0.8 * losses[0], "a loss that doesn't fall would show nothing"
    return losses


@pytest.mark.parametrize(
    ("zero_stage", "num_micro"), [(2, 2), *(pytest.param(stage, 1, marks=pytest.mark.slow) for stage in (0, 1, 3))]
)
def test_fifty_masked_steps_are_those_of_open_clip_in_plain_torch(
    two: ProcessGroup, expected: list[float], zero_stage: int, num_micro: int
) -> None:
    """On two ranks, with GradCache; 1e-4 is what rounding may grow to."""
    ours = two.run(cases.ours, zero_stage, num_micro)[0]
    assert len(ours) == cases.NUM_STEPS
    assert ours == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"betas": (0.9, 0.95)}, {"weight_decay": 0.5}, {"eps": 1e-8}])
def test_the_trajectory_would_show_a_wrong_setting(
    two: ProcessGroup, expected: list[float], changes: dict[str, Any]
) -> None:
    ours = two.run(cases.ours, 2, 1, changes)[0]
    assert ours != pytest.approx(expected, rel=1e-4)
