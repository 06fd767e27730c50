"""How images are recognized: by the sha256 of their bytes, and by a perceptual hash of their pixels.

The perceptual hash is the DCT hash of Zauner (2010, "Implementation and Benchmarking of Perceptual Image Hash
Functions", 3.2.1), as pHash and the ImageHash package compute it: grey pixels at 32 x 32, their DCT-II, of which the 8
x 8 lowest frequencies are compared with their median. Re-encoding and resizing change a few of its 64 bits at most.

Legend: n images, 64 bits as one uint64 each.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64, Int64, UInt8, UInt64
from PIL import Image

GRID, LOW = 32, 8
_FEW = 8  # candidates per image that a table may give on average
_PAIRS_AT_ONCE = 4_000_000


def perceptual_hash(pixels: UInt8[np.ndarray, "h w 3"]) -> int:
    """The 64-bit DCT hash of an upright image, the lowest frequency's bit first."""
    grey = Image.fromarray(pixels).convert("L").resize((GRID, GRID), Image.Resampling.LANCZOS)
    basis = _dct_basis()
    low = (basis @ np.asarray(grey, dtype=np.float64) @ basis.T).ravel()
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


@functools.cache
def _dct_basis() -> Float64[np.ndarray, "8 32"]:
    """The DCT-II's first rows, without its scale, which changes no comparison."""
    k, n = np.arange(LOW)[:, None], np.arange(GRID)[None, :]
    basis: Float64[np.ndarray, "8 32"] = np.cos(np.pi * k * (2 * n + 1) / (2 * GRID))
    return basis


def distance(a: UInt64[np.ndarray, " n"], b: UInt64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Bits in which hashes differ."""
    bits: Int64[np.ndarray, " n"] = np.bitwise_count(a ^ b).astype(np.int64)
    return bits


def near_pairs(hashes: UInt64[np.ndarray, " n"], most: int) -> Iterator[tuple[Int64[np.ndarray, " p"], ...]]:
    """Every pair (i, j), i < j, of hashes that differ in at most `most` bits, in pieces; pairs may be repeated.

    Exact, by multi-index hashing (Norouzi et al. 2012): of `most` + k bands, two such hashes agree in k at least, so
    all pairs are found among those that agree in some choice of k bands. k grows with n so that tables stay sparse.
    """
    yield from _cross_pairs(hashes, None, most)


def near_any(hashes: UInt64[np.ndarray, " n"], others: UInt64[np.ndarray, " m"], most: int) -> Int64[np.ndarray, " n"]:
    """For each hash an index into `others` of one that differs in at most `most` bits; -1 where there is none."""
    nearest = np.full(len(hashes), -1, dtype=np.int64)
    for i, j in _cross_pairs(hashes, others, most):
        nearest[i] = np.maximum(nearest[i], j)
    return nearest


def _cross_pairs(
    hashes: UInt64[np.ndarray, " n"], others: UInt64[np.ndarray, " m"] | None, most: int
) -> Iterator[tuple[Int64[np.ndarray, " p"], ...]]:
    """Near pairs within `hashes`, or between them and `others`: then (index of hashes, index of others)."""
    every = hashes if others is None else np.concatenate([hashes, others])
    bands = _bands(len(every), most)
    needed = len(bands) - most
    for chosen in itertools.combinations(bands, needed):
        mask = np.uint64(sum(chosen))
        keys = every & mask
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        starts = np.flatnonzero(np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]]))
        sizes = np.diff(np.concatenate([starts, [len(every)]]))
        for i, j in _pairs_within(starts[sizes > 1], sizes[sizes > 1]):
            left, right = order[i], order[j]
            near = distance(every[left], every[right]) <= most
            if others is not None:
                near &= (left < len(hashes)) & (right >= len(hashes))
            left, right = left[near], right[near]
            if others is not None:
                right = right - len(hashes)
            if len(left):
                yield left, right


def _pairs_within(
    starts: Int64[np.ndarray, " g"], sizes: Int64[np.ndarray, " g"]
) -> Iterator[tuple[Int64[np.ndarray, " p"], ...]]:
    """All pairs of positions within each group of neighbours, the earlier one first, a bounded number at once."""
    for shift in range(1, int(sizes.max(initial=1))):
        groups = np.flatnonzero(sizes > shift)
        counts = sizes[groups] - shift
        cuts = np.flatnonzero(np.diff(np.cumsum(counts) // _PAIRS_AT_ONCE)) + 1
        for piece in np.split(np.arange(len(groups)), cuts):
            number = counts[piece]
            if not len(number):
                continue
            within = np.arange(int(number.sum())) - np.repeat(np.cumsum(number) - number, number)
            first = np.repeat(starts[groups[piece]], number) + within
            yield first, first + shift


def _bands(num: int, most: int) -> list[int]:
    """Masks of bands of bits, more of them the more hashes there are."""
    agreeing = 1
    while num / 2 ** (64 * agreeing / (most + agreeing)) > _FEW and most + agreeing < 24:
        agreeing += 1
    edges = np.linspace(0, 64, most + agreeing + 1).round().astype(int)
    return [(1 << int(b)) - (1 << int(a)) for a, b in itertools.pairwise(edges)]
