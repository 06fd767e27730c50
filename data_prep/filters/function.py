"""A user's own function as a filter."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from data_prep.account import Refused
from data_prep.filters.candidate import Candidate
from data_prep.filters.options import FilterOptions
from pipeline.config import by_dotted_name
from pipeline.errors import ConfigError


class FunctionFilter(FilterOptions):
    """A user's own `function(candidate) -> bool | str` by dotted name: see `data_prep.filters.candidate.Candidate`.

    True keeps the pair; False, or a text that says why, refuses it (`function_refused`). An exception that it raises
    stops the build. It must be importable on every machine.
    """

    type: Literal["function"]
    name: str

    def judge(self, candidate: Candidate, score: float | None, number: int) -> Refused | dict[str, Any]:
        where = f"filters.{number}.name"
        function = by_dotted_name(self.name, where=where)
        try:
            answer = function(candidate)
        except Exception as error:
            raise ConfigError(
                f"the filter raised {type(error).__name__}: {error}",
                where=f"{where} {self.name}, input {candidate.url}",
                fix="let it return False, or a text that says why, for pairs it refuses",
            ) from error
        if answer is True or (isinstance(answer, np.bool_) and bool(answer)):
            return {}
        if isinstance(answer, str) and answer:
            return Refused("function_refused", f"{self.name}: {answer}"[:1000])
        if answer is False or isinstance(answer, np.bool_):
            return Refused("function_refused", self.name)
        raise ConfigError(
            f"the filter returned {answer!r}",
            where=f"{where} {self.name}",
            fix="let it return True, False or a text that says why not",
        )
