"""Filters applied to finished samples, in the order of the configuration, each to what the ones before it left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_prep.account import Refused
from data_prep.filters.candidate import Candidate, Scorers
from data_prep.filters.options import FilterOptions


def judge(
    filters: Sequence[FilterOptions], candidates: Sequence[Candidate], scorers: Scorers | None
) -> list[Refused | dict[str, Any]]:
    """For each candidate the refusal, or what the filters note about it: the scores of their models.

    Raises:
        ConfigError: a user's function can't be imported, raises, or returns neither a bool nor a text.
    """
    verdicts: list[Refused | dict[str, Any]] = [{} for _ in candidates]
    for number, options in enumerate(filters):
        remaining = [i for i, verdict in enumerate(verdicts) if isinstance(verdict, dict)]
        for i, score in zip(remaining, _scores(number, options, remaining, candidates, scorers), strict=True):
            notes = verdicts[i]
            verdict = options.judge(candidates[i], score, number)
            assert isinstance(notes, dict)
            verdicts[i] = verdict if isinstance(verdict, Refused) else notes | _unique(verdict, notes, number)
    return verdicts


def _scores(
    number: int,
    options: FilterOptions,
    remaining: Sequence[int],
    candidates: Sequence[Candidate],
    scorers: Scorers | None,
) -> Sequence[float | None]:
    """What the filter's model says of the remaining candidates; None each where it has no model."""
    if options.scorer is None:
        return [None] * len(remaining)
    assert scorers is not None, "filters with a model need scorers"
    return scorers.scores(number, [(candidates[i].image, candidates[i].caption) for i in remaining])


def _unique(notes: dict[str, Any], before: dict[str, Any], number: int) -> dict[str, Any]:
    """Notes under names that no earlier filter has used: a second filter's get its number."""
    return {name if name not in before else f"{name}_{number}": value for name, value in notes.items()}
