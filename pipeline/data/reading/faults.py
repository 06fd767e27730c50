"""Counting and naming samples that can't be read."""

from __future__ import annotations

import logging

from pipeline.data.reading.examples import BatchPart, Fault
from pipeline.errors import DataError

TALLY_FLOOR = 1000  # samples the share of unreadable ones is counted on at least

logger = logging.getLogger(__name__)


class FaultTally:
    """Counts unreadable samples, logs each by name once, and says when there are too many.

    Args:
        where: what is read, for the message.
        limit: share of the samples that may be unreadable.
    """

    def __init__(self, where: str, limit: float) -> None:
        self._where = where
        self._limit = limit
        self._num_seen = 0
        self._num_faults = 0
        self._named: set[int] = set()
        self._told_withdrawn = False

    def add(self, part: BatchPart) -> None:
        """Count a part's samples.

        Raises:
            DataError: too many were unreadable.
        """
        self._num_seen += len(part.batch)
        for fault in part.faults:
            self._num_faults += 1
            if fault.id not in self._named:
                self._named.add(fault.id)
                logger.warning("unreadable sample %s; its slot counts nothing", _name(fault))
        if part.num_withdrawn and not self._told_withdrawn:
            self._told_withdrawn = True
            logger.info("samples of the takedown list come up; their slots count nothing")
        if part.faults and self._num_faults > self._limit * max(self._num_seen, TALLY_FLOOR):
            raise DataError(
                f"{self._num_faults} of {self._num_seen} samples are unreadable, over the limit of {self._limit:.2%}; "
                f"the last: {_name(part.faults[-1])}",
                where=self._where,
                fix="find the damage with `vitrail verify`, rebuild, or raise data.max_unreadable",
            )


def _name(fault: Fault) -> str:
    key = repr(fault.key) if fault.key else f"number {fault.number}"
    return f"{key} of {fault.shard} (id {fault.id}): {fault.reason}"
