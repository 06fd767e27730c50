"""Which inputs are the same image as an earlier one, or as one of an evaluation set, and each input's split.

Inputs are judged in a fixed order, each by the ones before it alone. So inputs that are appended later change no
decision, and exactly one of a group of equal images stays. An input that was already refused has no influence.

Where near duplicates aren't dropped, similar images can still be kept in one split: an input joins the split of its
earlier neighbours, and is refused (`bridges_splits`) where these lie in different splits.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int8, Int64, UInt64

from data_prep.config import DedupConfig
from data_prep.duplicates.signatures import near_any, near_pairs
from data_prep.plan.planning import unit_interval

VERDICTS = ("", "duplicate", "near_duplicate", "in_evaluation_set", "bridges_splits")
_STAYS, _DUPLICATE, _NEAR, _EVALUATION, _BRIDGE = range(len(VERDICTS))


class Signatures(NamedTuple):
    """Of n images, in the order in which they are judged."""

    digests: UInt64[np.ndarray, "n 2"]  # the first 16 bytes of the sha256
    hashes: UInt64[np.ndarray, " n"]  # perceptual; anything where they aren't needed
    usable: Bool[np.ndarray, " n"]  # was read, and no rule refused it by itself


class Decisions(NamedTuple):
    """What becomes of n inputs."""

    verdicts: Int8[np.ndarray, " n"]  # index into `VERDICTS`; 0 also for unusable images
    others: Int64[np.ndarray, " n"]  # the earlier input, or the evaluation image, that it is the same as; -1: none
    splits: Int8[np.ndarray, " n"]  # index into the splits


class JudgedInputs(NamedTuple):
    """What was decided about the n inputs of all segments so far, in the order in which they were judged."""

    decisions: Decisions
    positions: Int64[np.ndarray, " n"]  # in the source
    starts: list[int]  # number of each segment's first input in that order


def digest_words(digests: pa.Array) -> UInt64[np.ndarray, "n 2"]:
    """The first 16 bytes of sha256 digests as two words; nulls become zeros."""
    filled = digests.fill_null(bytes(32))
    joined = b"".join(value[:16] for value in filled.to_pylist())
    return np.frombuffer(joined, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def decide(
    images: Signatures, evaluation: Signatures, options: DedupConfig, shares: dict[str, float], seed: int
) -> Decisions:
    """Judge all images; see `Decisions`.

    Args:
        shares: of the splits; an image's split is drawn by its digest.
    """
    n = len(images.usable)
    verdicts = np.zeros(n, dtype=np.int8)
    others = np.full(n, -1, dtype=np.int64)
    alive = images.usable.copy()

    def strike(which: Int64[np.ndarray, " k"], verdict: int, by: Int64[np.ndarray, " k"]) -> None:
        verdicts[which], others[which], alive[which] = verdict, by, False

    if len(evaluation.usable):
        seen = _seen_in(images, evaluation, options.near_distance)
        struck = np.flatnonzero(alive & (seen >= 0))
        strike(struck, _EVALUATION, seen[struck])
    if options.drop != "none":
        first = _first_equal(images.digests, alive)
        struck = np.flatnonzero(alive & (first != np.arange(n)))
        strike(struck, _DUPLICATE, first[struck])
    if options.drop == "near":
        struck, by = _followers(images.hashes, alive, options.near_distance)
        strike(struck, _NEAR, by)
        # The first of equal images may itself have been dropped as similar to another: then that one stayed.
        gone = np.flatnonzero((verdicts == _DUPLICATE) & (verdicts[others] == _NEAR))
        others[gone] = others[others[gone]]
    splits = _draw(images.digests, shares, seed)
    if options.near_splits and options.drop != "near" and len(shares) > 1:
        splits, struck = _neighbours_splits(images, alive, splits, options.near_distance)
        strike(struck, _BRIDGE, np.full(len(struck), -1))
    return Decisions(verdicts, others, splits)


def _draw(digests: UInt64[np.ndarray, "n 2"], shares: dict[str, float], seed: int) -> Int8[np.ndarray, " n"]:
    """Each image's split, by its digest alone, so that equal images share one."""
    if len(shares) == 1:
        return np.zeros(len(digests), dtype=np.int8)
    bounds = np.cumsum(list(shares.values()))[:-1]
    words = digests.astype(">u8").tobytes()
    draws = np.array([unit_interval(words[i : i + 16], seed) for i in range(0, len(words), 16)])
    return np.searchsorted(bounds, draws, side="right").astype(np.int8)


def _seen_in(images: Signatures, evaluation: Signatures, most: int) -> Int64[np.ndarray, " n"]:
    """For each image an evaluation image that it is equal or similar to; -1 where there is none."""
    seen = near_any(images.hashes, evaluation.hashes, most)
    known = {tuple(words): number for number, words in enumerate(evaluation.digests.tolist())}
    equal = np.array([known.get(tuple(words), -1) for words in images.digests.tolist()], dtype=np.int64)
    return np.where(equal >= 0, equal, seen)


def _first_equal(digests: UInt64[np.ndarray, "n 2"], alive: Bool[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """The first input still alive that has the same digest as each; itself for those that aren't."""
    first = np.arange(len(alive))
    living = np.flatnonzero(alive)
    order = living[np.lexsort((living, digests[living, 1], digests[living, 0]))]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    heads = np.flatnonzero(fresh)
    first[order] = order[heads[np.cumsum(fresh) - 1]] if len(order) else order
    return first


def _neighbourhoods(
    hashes: UInt64[np.ndarray, " n"], alive: Bool[np.ndarray, " n"], most: int
) -> tuple[dict[int, set[int]], UInt64[np.ndarray, " u"], Int64[np.ndarray, " n"]]:
    """The distinct hash values of inputs that are still alive, numbered by first occurrence. Equal hashes are one
    value, so a million white images cost nothing.

    Returns:
        Each value's earlier values near it, the values, and the number of each input's value (-1: not alive).
    """
    living = np.flatnonzero(alive)
    values, first, inverse = np.unique(hashes[living], return_index=True, return_inverse=True)
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(values))
    value_of = np.full(len(hashes), -1, dtype=np.int64)
    value_of[living] = rank[inverse]
    ordered = values[np.argsort(first)]
    earlier: dict[int, set[int]] = defaultdict(set)
    for i, j in near_pairs(ordered, most):
        for low, high in zip(np.minimum(i, j).tolist(), np.maximum(i, j).tolist(), strict=True):
            earlier[high].add(low)
    return earlier, ordered, value_of


def _followers(
    hashes: UInt64[np.ndarray, " n"], alive: Bool[np.ndarray, " n"], most: int
) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """Inputs near an earlier one that stays, and that one. No two of those that stay are near each other."""
    earlier, values, value_of = _neighbourhoods(hashes, alive, most)
    leader = np.arange(len(values))
    for value in sorted(earlier):
        leaders = [other for other in earlier[value] if leader[other] == other]
        if leaders:
            leader[value] = min(leaders)
    living = np.flatnonzero(alive)
    first_of = np.full(len(values), -1, dtype=np.int64)
    reverse = living[::-1]
    first_of[value_of[reverse]] = reverse  # the last assignment, that of the first input, stays
    stays = first_of[leader[value_of[living]]]
    struck = living[stays != living]
    return struck, stays[stays != living]


def _neighbours_splits(
    images: Signatures, alive: Bool[np.ndarray, " n"], drawn: Int8[np.ndarray, " n"], most: int
) -> tuple[Int8[np.ndarray, " n"], Int64[np.ndarray, " k"]]:
    """Splits that keep similar images together, and the inputs that are near images of different splits."""
    earlier, values, value_of = _neighbourhoods(images.hashes, alive, most)
    splits = drawn.copy()
    of_value = np.full(len(values), -1, dtype=np.int8)  # -2: bridges
    for i in np.flatnonzero(alive).tolist():
        value = int(value_of[i])
        if of_value[value] == -1:
            around = {int(of_value[other]) for other in earlier.get(value, ()) if of_value[other] >= 0}
            of_value[value] = around.pop() if len(around) == 1 else -2 if around else drawn[i]
        if of_value[value] >= 0:
            splits[i] = of_value[value]
    bridges = alive & (value_of >= 0)
    bridges[bridges] = of_value[value_of[bridges]] == -2
    return splits, np.flatnonzero(bridges)
