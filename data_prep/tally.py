"""What became of a build's inputs so far, and when too many of them have failed."""

from __future__ import annotations

from collections import Counter

from data_prep.account import by_reason, describe, total
from data_prep.config import PrepConfig
from data_prep.shards.commit import Committed
from pipeline.errors import DataError

_TOO_FEW_TO_JUDGE = 20  # failures below which a build never gives up early


class Tally:
    """Counts the inputs of committed partitions.

    Args:
        config: whose `max_failed` says which share of the inputs may fail.
    """

    def __init__(self, config: PrepConfig) -> None:
        self._config = config
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self.num_written = 0  # samples

    def clear(self) -> None:
        """Count from zero again; examples stay."""
        self._reasons.clear()
        self.num_written = 0

    def add(self, part: Committed, num_inputs: int) -> None:
        """Count a partition.

        Args:
            num_inputs: of the whole build.

        Raises:
            DataError: more inputs failed than are allowed.
        """
        self.num_written += part.written
        self._reasons.update(part.refused)
        for reason, example in part.examples.items():
            self._examples.setdefault(reason, example)
        self.refuse_many_failures(num_inputs, final=False)

    @property
    def num_filtered(self) -> int:
        """Inputs that the settings don't want."""
        return total(self._reasons, filtered=True)

    @property
    def num_failed(self) -> int:
        """Inputs that can't be used."""
        return total(self._reasons, filtered=False)

    @property
    def num_inputs(self) -> int:
        """Inputs that were counted."""
        return self.num_written + sum(self._reasons.values())

    def refuse_many_failures(self, num_inputs: int, *, final: bool) -> None:
        """Give up once more inputs have failed than `max_failed` allows, or where in the end nothing was written.

        Raises:
            DataError: that is so.
        """
        failures = by_reason(self._reasons, filtered=False)
        num_failed = self.num_failed
        too_many = num_failed > self._config.max_failed * num_inputs
        if (too_many and (final or num_failed >= _TOO_FEW_TO_JUDGE)) or (final and self.num_written == 0):
            counts = failures or by_reason(self._reasons)
            raise DataError(
                f"{sum(counts.values())} of {num_inputs} inputs failed: {describe(counts, self._examples)}",
                where=self._config.source.url,
                fix="correct the inputs, or raise max_failed, and run the same command: finished work is kept",
            )
