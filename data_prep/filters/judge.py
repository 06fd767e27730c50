"""Filters that look at finished samples: a CLIP model's score, and a user's own function.

They are applied in the order of the configuration, each to what the ones before it left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8

from data_prep.account import Refused
from data_prep.config import FunctionFilter, ScoreFilter
from pipeline.config import by_dotted_name
from pipeline.data.images.decode import decode
from pipeline.errors import ConfigError


class Candidate(NamedTuple):
    """A pair as it would be stored; what a `function` filter is given."""

    image: bytes  # encoded, upright and resized
    caption: str  # "" without captions
    url: str
    extra: dict[str, Any]  # columns that are passed on, and scores of earlier filters

    def pixels(self) -> UInt8[np.ndarray, "h w 3"]:
        """The image decoded."""
        return decode(self.image)


class Scorers(Protocol):
    """Processes that hold the models, one group for each model filter."""

    def scores(self, number: int, pairs: Sequence[tuple[bytes, str]]) -> list[float]:
        """The scores that the model of filter `number` gives to any number of pairs of encoded image and caption."""
        ...


def judge(
    options: Sequence[ScoreFilter | FunctionFilter], candidates: Sequence[Candidate], scorers: Scorers | None
) -> list[Refused | dict[str, Any]]:
    """For each candidate the refusal, or the scores to note about it.

    Raises:
        ConfigError: a user's function can't be found, raises, or returns neither a bool nor a text.
    """
    verdicts: list[Refused | dict[str, Any]] = [{} for _ in candidates]
    for number, option in enumerate(options):
        left = [i for i, verdict in enumerate(verdicts) if isinstance(verdict, dict)]
        if isinstance(option, ScoreFilter):
            assert scorers is not None, "model filters need scorers"
            pairs = [(candidates[i].image, candidates[i].caption) for i in left]
            found = scorers.scores(number, pairs)
            for i, score in zip(left, found, strict=True):
                verdicts[i] = _judge_score(verdicts[i], option, score, number)
        else:
            function = by_dotted_name(option.name, where=f"filters.{number}.name")
            for i in left:
                refused = _ask(function, candidates[i], option, number)
                if refused is not None:
                    verdicts[i] = refused
    return verdicts


def _judge_score(
    before: Refused | dict[str, Any], option: ScoreFilter, score: float, number: int
) -> Refused | dict[str, Any]:
    assert isinstance(before, dict)
    if not score >= option.min_score:
        return Refused("score_too_low", f"a score of {score:.4f}, below {option.min_score:g} (filter {number})")
    name = "clip_score" if "clip_score" not in before else f"clip_score_{number}"
    return before | {name: round(score, 4)}


def _ask(function: Any, candidate: Candidate, option: FunctionFilter, number: int) -> Refused | None:
    where = f"filters.{number}.name {option.name}"
    try:
        answer = function(candidate)
    except Exception as error:
        raise ConfigError(
            f"the filter raised {type(error).__name__}: {error}",
            where=f"{where}, input {candidate.url}",
            fix="have it return False, or a text, for what it doesn't want",
        ) from error
    if answer is True or (isinstance(answer, np.bool_) and bool(answer)):
        return None
    if isinstance(answer, str) and answer:
        return Refused("function_refused", f"{option.name}: {answer}"[:1000])
    if answer is False or isinstance(answer, np.bool_):
        return Refused("function_refused", option.name)
    raise ConfigError(
        f"the filter returned {answer!r}", where=where, fix="have it return True, False or a text that says why not"
    )
