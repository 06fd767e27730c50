"""Random numbers that depend on the sample alone: a counter-based hash, which needs no generator objects.

The same (seed, purpose, index) gives the same number on any device, in any batch and on any rank.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from pipeline.data.batch import derive_seed

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # constants of splitmix64 (Steele et al. 2014), as signed 64-bit numbers
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def uniform(seeds: Int[Tensor, " b"], purpose: str, num: int) -> Float64[Tensor, "b num"]:
    """`num` numbers in [0, 1) for each sample, with 53 random bits each.

    Args:
        seeds: the samples' seeds, int64.
        purpose: draws under different names are independent.
    """
    start = _mix(seeds.unsqueeze(1) ^ derive_seed(purpose))
    counter = torch.arange(1, num + 1, device=seeds.device) * _GOLDEN
    return _shift(_mix(start + counter), 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64; int64 products wrap around as unsigned ones do."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
