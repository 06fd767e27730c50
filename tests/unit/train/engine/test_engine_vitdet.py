"""A detector under every ZeRO stage: many modules, called on lists of maps and on no regions at all."""

from __future__ import annotations

import pytest
import torch

from pipeline.models.batch_norm import BatchNorm
from tests.support import vitdet_cases as cases
from tests.support.process_group import ProcessGroup


@pytest.mark.parametrize("relative", [True, "shared"])
def test_every_zero_stage_takes_the_same_steps(one: ProcessGroup, relative: bool | str) -> None:
    losses = one.run(cases.losses_at_every_zero_stage, relative)[0]
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert losses[0][1] < losses[0][0], "a batch without objects was among them"


@pytest.mark.parametrize("shares", [(3, 2), (5, 0), (1, 0)])
def test_batch_norm_of_all_ranks_equals_torchs_of_the_whole(two: ProcessGroup, shares: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(sum(shares), 3, 2, 2, generator=draw, dtype=torch.float64) + 1 for _ in range(2))
    peer = torch.nn.BatchNorm2d(3).double()
    torch.nn.init.normal_(peer.weight, generator=draw)
    out = peer(x.requires_grad_())
    (out * pull).sum().backward()
    expected = {
        "out": out, "x": x.grad, "weight": peer.weight.grad, "bias": peer.bias.grad, "mean": peer.running_mean,
        "variance": peer.running_var,
    }  # fmt: skip
    for of_rank in two.run(cases.batch_norm_in_shares, shares):
        for name, value in expected.items():
            torch.testing.assert_close(of_rank[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_gradients_through_batch_norm_are_the_same_on_one_rank_and_on_two(one: ProcessGroup, two: ProcessGroup) -> None:
    expected = one.run(cases.gradients_with_batch_norm)[0]
    assert any("fpn" in name for name in expected)
    assert any("patch_embed.norms" in name for name in expected)
    of_two = two.run(cases.gradients_with_batch_norm)[0]
    greatest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (of_two[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6 * greatest, name


def test_no_rows_leave_batch_norms_averages_as_they_are() -> None:
    norm = BatchNorm(3)
    assert norm(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert torch.equal(norm.running_var, torch.ones(3))
