"""A detector under every ZeRO stage: many modules, called on lists of maps and on no regions at all."""

from __future__ import annotations

from tests.process_group import ProcessGroup
from tests.unit.train import vitdet_cases as cases


def test_every_zero_stage_takes_the_same_steps(one: ProcessGroup) -> None:
    losses = one.run(cases.losses_at_every_zero_stage)[0]
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert losses[0][1] < losses[0][0], "a batch without objects was among them"
