"""Segment Anything's evaluation under ZeRO-3, whose ranks must ask equally often."""

from __future__ import annotations

import pytest

from tests.support import sam_cases as cases
from tests.support.process_group import ProcessGroup


def test_ranks_with_many_objects_and_with_none_measure_what_one_rank_does(one: ProcessGroup, two: ProcessGroup) -> None:
    """A rank that asked less often would leave the others waiting for its parameters."""
    (expected,) = one.run(cases.figures)
    assert expected["seen/num_objects"] == cases.MANY
    for figures in two.run(cases.figures):
        assert figures == pytest.approx(expected, abs=1e-6)
