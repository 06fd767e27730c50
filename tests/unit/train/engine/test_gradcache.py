"""GradCache and fp32 gradient sums in plain torch, without an engine."""

from __future__ import annotations

import torch

from pipeline.stages.base import DataFacts, seeded_init
from pipeline.train.engine.accumulation import GradientSums
from pipeline.train.engine.gradcache import GradCache
from tests.support.stages_for_tests import TinyOptions, TinyPair, make_batch


def pair() -> TinyPair:
    seeded_init(3)
    return TinyPair(TinyOptions(), DataFacts())


def test_micro_batches_give_the_loss_and_gradients_of_the_whole_batch() -> None:
    whole, cached = pair(), pair()
    expected = whole("loss", make_batch(list(range(12))))
    expected.total.backward()
    batches = [make_batch(list(range(start, start + 4))) for start in (0, 4, 8)]
    cache = GradCache(cached, batches, seed=1)
    cache.embed()
    losses = cache.losses()
    losses.total.backward()
    for surrogate in cache.surrogates():
        surrogate.backward()
    torch.testing.assert_close(losses.total, expected.total)
    for (name, p), (_, q) in zip(whole.named_parameters(), cached.named_parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_sums_are_rounded_once() -> None:
    """In bf16, 256 + 1 rounds to 256: four of them would be lost one by one."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    sums = GradientSums([p], enabled=True)
    for gradient in (256.0, 1.0, 1.0, 1.0, 1.0):
        p.grad = torch.full((1,), gradient, dtype=torch.bfloat16)
        sums.add()
        assert p.grad is None
    sums.write_back()
    assert p.grad is not None
    assert p.grad.tolist() == [260.0]


def test_switched_off_they_leave_gradients_alone() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    sums = GradientSums([p], enabled=False)
    p.grad = torch.ones(1)
    sums.add()
    sums.write_back()
    assert p.grad.tolist() == [1.0]
