"""Stage `flip` under the engine: gradients of the full batch however it is cut, and the logit scale held."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import pytest

from tests.support import flip_cases as cases
from tests.support.process_group import ProcessGroup

LOSSES, WORLDS, MICRO, STAGES, MASKS = ("clip", "siglip"), (1, 2, 3), (1, 2, 4), (0, 1, 2, 3), (0.0, 0.5)


reference = functools.cache(cases.reference)


def check(group: ProcessGroup, loss: str, num_micro: int, zero_stage: int, mask: float) -> float:
    error, name = max(group.run(cases.worst, reference(loss, mask), loss, num_micro, zero_stage, mask))
    assert error <= 1e-6, f"{loss}, mask {mask}, ZeRO {zero_stage}, {num_micro} micro batches: {name} is off by {error}"
    return error


@pytest.mark.parametrize(("loss", "zero_stage"), [("clip", 0), ("clip", 3), ("siglip", 1), ("siglip", 2)])
def test_gradients_on_two_ranks_are_the_full_batchs(two: ProcessGroup, loss: str, zero_stage: int) -> None:
    check(two, loss, 1, zero_stage, 0.0)
    check(two, loss, 4, zero_stage, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_gradients_are_the_full_batchs_everywhere(groups: dict[int, ProcessGroup], world: int) -> None:
    """CLIP and SigLIP x accumulation x ZeRO stage x mask, logit scale included."""
    errors = {case: check(groups[world], *case) for case in itertools.product(LOSSES, MICRO, STAGES, MASKS)}
    assert len(errors) == 48


@pytest.fixture(scope="module")
def groups(one: ProcessGroup, two: ProcessGroup) -> Iterator[dict[int, ProcessGroup]]:
    three = ProcessGroup(3)
    yield {1: one, 2: two, 3: three}
    three.close()


@pytest.mark.parametrize("zero_stage", STAGES)
def test_the_logit_scale_stays_below_100_where_a_plain_clamp_lets_it_go(two: ProcessGroup, zero_stage: int) -> None:
    limit = math.log(100)
    master, factor = two.run(cases.pushed_scale, zero_stage, "held")[0]
    assert limit - 1e-6 <= master <= limit + 1e-6, "it was pushed against the limit"
    assert factor <= 100 * (1 + 1e-6)
    clamped, factor = two.run(cases.pushed_scale, zero_stage, "clamped")[0]
    assert clamped > limit + 0.1, "bf16's masters don't see a clamp of the parameter"
    assert factor <= 100 * (1 + 1e-6), "the forward pass holds it all the same"
