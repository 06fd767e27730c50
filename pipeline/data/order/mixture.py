"""Several data sets drawn as one stream, in exact shares, and the samples of any global batch of it.

Each *source* has a share: a positive integer, its number of samples in a cycle of as many samples as all shares add up
to. Occurrence i of a source with share m is due at (i + 1/2) / m of a cycle, and the stream takes what is due next (of
equals the first source's). So any stretch of the stream holds each source within about one sample of its share, and
how many of a source's samples come before any position has a closed form: nothing is stored, and any place of the
stream is found at once.

Within its source a sample's place is that of `pipeline.data.order.permutation.Order`, epoch after epoch. Where every
share is the source's number of samples (the default), an epoch of the mixture has each sample exactly once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from pipeline.data.batch import derive_seed
from pipeline.data.manifest import Manifest
from pipeline.data.order.permutation import Cursor, Order, Window

MAX_CYCLE = 10**12  # samples; shares that only a longer cycle could hold exactly are refused


@dataclasses.dataclass(frozen=True)
class TrainingSource:
    """A data set and how much of the stream it makes.

    Args:
        manifest: of the data set.
        share: of the stream, relative to the other sources' shares.
        subset: how many of its samples are drawn at all; None: all.
    """

    manifest: Manifest
    share: int
    subset: int | None = None

    @property
    def num_samples(self) -> int:
        """Samples drawn in an epoch of this source."""
        return self.manifest.num_samples if self.subset is None else self.subset


Data = Manifest | Sequence[TrainingSource]
"""One data set, or several."""


def sources_of(data: Data) -> tuple[TrainingSource, ...]:
    """The sources of a stream: of one data set, all of it."""
    return (TrainingSource(data, 1),) if isinstance(data, Manifest) else tuple(data)


class StreamSlots(NamedTuple):
    """A run of slots of a global batch."""

    ids: Int64[np.ndarray, " n"]  # numbered through all sources' data sets
    epochs: Int64[np.ndarray, " n"]  # of the sample's source
    windows: tuple[
        tuple[int, Window], ...
    ]  # (source, window) that the samples lie in, in the order of their first slot
    window_of: Int64[np.ndarray, " n"]  # index into `windows`


class Stream:
    """The endless stream of samples of one or several sources.

    Args:
        sources: at least one.
        seed: of the run.
        block, lanes, window: see `Order`.
    """

    def __init__(self, sources: Sequence[TrainingSource], *, seed: int, block: int, lanes: int, window: int) -> None:
        self.sources = tuple(sources)
        self.shares = Shares([source.share for source in sources])
        self.first_ids = first_ids(sources)
        self.num_samples = sum(source.num_samples for source in sources)
        self._orders = [
            Order(
                [shard.num_samples for shard in source.manifest.shards],
                seed=derive_seed("source", seed, number) if number else seed,
                block=block,
                lanes=lanes,
                window=window,
                subset=source.subset,
            )
            for number, source in enumerate(sources)
        ]

    def slots(self, position: int, size: int, start: int, stop: int) -> StreamSlots:
        """Slots [start, stop) of the `size` samples of the stream from `position` on.

        Slots are arranged source by source and, in a source, lane by lane.
        """
        before, after = self.shares.counts(position), self.shares.counts(position + size)
        parts: list[StreamSlots] = []
        first = 0
        for number, order in enumerate(self._orders):
            count = after[number] - before[number]
            a, b = max(start - first, 0), min(stop - first, count)
            first += count
            if a < b:
                epoch, offset = divmod(before[number], order.num_samples)
                slots = order.slots(Cursor(epoch, offset), count, a, b)
                windows = tuple((number, window) for window in slots.windows)
                parts.append(StreamSlots(slots.ids + self.first_ids[number], slots.epochs, windows, slots.window_of))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def ranges(self, source: int, window: Window) -> list[tuple[int, int]]:
        """The samples of a window as ranges [first, last + 1) of ids of its own data set; each is one read."""
        return self._orders[source].ranges(window)


class Shares:
    """How many samples of each source come before a position of the stream."""

    def __init__(self, shares: Sequence[int]) -> None:
        if not shares or min(shares) < 1:
            raise ValueError(f"shares must be positive: {list(shares)}")
        divisor = math.gcd(*shares)
        self.shares = tuple(share // divisor for share in shares)
        self.cycle = sum(self.shares)

    def counts(self, position: int) -> tuple[int, ...]:
        """Samples of each source among the first `position` of the stream."""
        cycles, rest = divmod(position, self.cycle)
        return tuple(cycles * share + self._within(number, rest) for number, share in enumerate(self.shares))

    def most(self, size: int) -> tuple[int, ...]:
        """An upper bound, for each source, on its samples among any `size` in a row."""
        bounds = []
        for share in self.shares:
            even = -(-size * share // self.cycle)
            bounds.append(size if len(self.shares) == 1 else min(size, even + len(self.shares)))
        return tuple(bounds)

    def _within(self, number: int, position: int) -> int:
        """How many occurrences of a source lie among the first `position` of a cycle."""
        share = self.shares[number]
        low, high = 0, share
        guess = position * share // self.cycle
        if self._place(number, max(guess - len(self.shares), 0)) < position:
            low = max(guess - len(self.shares), 0)
        if guess + len(self.shares) < share and self._place(number, guess + len(self.shares)) >= position:
            high = guess + len(self.shares)
        while low < high:
            middle = (low + high) // 2
            if self._place(number, middle) < position:
                low = middle + 1
            else:
                high = middle
        return low

    def _place(self, number: int, occurrence: int) -> int:
        """Place in the cycle of an occurrence: the number of occurrences, of all sources, that are due before it."""
        due, share = 2 * occurrence + 1, self.shares[number]
        place = occurrence
        for other, theirs in enumerate(self.shares):
            if other != number:
                # Occurrences i of the other with (2i + 1) * share < due * theirs, or equal where it stands before.
                bound = due * theirs + (other < number)
                place += max(0, (-(-bound // share)) // 2)
        return place


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportions of weights, taken as the decimal numbers they are written as.

    Raises:
        ValueError: a weight isn't positive, or the proportions need numbers beyond `MAX_CYCLE`.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    if min(exact) <= 0:
        raise ValueError("weights must be positive")
    scale = math.lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*shares)
    if sum(shares) // divisor > MAX_CYCLE:
        raise ValueError("weights need fewer digits")
    return tuple(share // divisor for share in shares)


def first_ids(sources: Sequence[TrainingSource]) -> tuple[int, ...]:
    """Id of each source's first sample: ids number the samples through all data sets, subsets or not."""
    ids, total = [], 0
    for source in sources:
        ids.append(total)
        total += source.manifest.num_samples
    return tuple(ids)


def _joined(parts: Sequence[StreamSlots]) -> StreamSlots:
    shifts = np.cumsum([0, *(len(part.windows) for part in parts)])
    return StreamSlots(
        np.concatenate([part.ids for part in parts]) if parts else np.empty(0, np.int64),
        np.concatenate([part.epochs for part in parts]) if parts else np.empty(0, np.int64),
        tuple(window for part in parts for window in part.windows),
        np.concatenate([part.window_of + shift for part, shift in zip(parts, shifts[:-1], strict=True)])
        if parts
        else np.empty(0, np.int64),
    )
