"""Draws belong to (seed, purpose, index) and look uniform."""

from __future__ import annotations

import torch

from pipeline.data.batch import derive_seed
from pipeline.models.noise import uniform


def test_a_draw_depends_on_nothing_but_seed_purpose_and_index() -> None:
    seeds = torch.tensor([5, 0, 2**63 - 1, 17])
    noise = uniform(seeds, "mask", 32)
    assert torch.equal(uniform(seeds[[3, 1]], "mask", 8), noise[[3, 1], :8])
    assert not torch.equal(uniform(seeds, "drop_path", 32), noise)


def test_draws_are_splitmix64s() -> None:
    """Masks of a resumed run must equal the undisturbed run's, on any machine and with any release of torch."""
    bits = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & bits
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & bits
        return x ^ (x >> 31)

    start = mix(123 ^ derive_seed("mask"))
    expected = [(mix((start + i * 0x9E3779B97F4A7C15) & bits) >> 11) / 2**53 for i in (1, 2, 3)]
    assert uniform(torch.tensor([123]), "mask", 3).tolist() == [expected]


def test_draws_are_uniform_and_independent() -> None:
    noise = uniform(torch.arange(2000), "mask", 64)
    assert noise.min() >= 0
    assert noise.max() < 1
    counts = torch.histc(noise.float(), bins=16, min=0, max=1)
    expected = noise.numel() / 16
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # chi squared, 15 degrees of freedom, p = 0.001
    centred = noise - noise.mean()
    neighbours_in_sample = (centred[:, 1:] * centred[:, :-1]).mean() * 12
    neighbours_in_batch = (centred[1:] * centred[:-1]).mean() * 12
    assert abs(neighbours_in_sample) < 0.012
    assert abs(neighbours_in_batch) < 0.012


def test_every_patch_is_masked_equally_often() -> None:
    frequencies = uniform(torch.arange(4000), "mask", 16).argsort(1)[:, :4].flatten().bincount()
    assert (frequencies - 1000).abs().max() < 110  # four standard deviations
