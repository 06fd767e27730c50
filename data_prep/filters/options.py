"""What every filter has in common: its options, and how it judges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from data_prep.filters import FILTERS
from pipeline.config import TypedOptions

if TYPE_CHECKING:
    from data_prep.account import Refused
    from data_prep.filters.candidate import Candidate


class FilterOptions(TypedOptions):
    """Options of a filter: see `FILTERS`."""

    types = FILTERS

    # "module:Class" of the model that scores pairs, which runs in processes of its own and is imported only there;
    # None: the filter has no model. It is called with (options, where=...) and has `scores(pairs) -> list[float]`.
    scorer: ClassVar[str | None] = None

    @property
    def wants_gpu(self) -> bool:
        """Whether the model runs on a GPU where there is one."""
        return False

    @property
    def batch_size(self) -> int:
        """Pairs that the model scores at once."""
        return 1

    def judge(self, candidate: Candidate, score: float | None, number: int) -> Refused | dict[str, Any]:
        """Whether to keep a sample: why not, or what to note about it.

        Args:
            candidate: the sample as it would be stored.
            score: the model's; None where the filter has none.
            number: of the filter in the configuration, for messages.

        Raises:
            ConfigError: the filter itself is wrong.
        """
        raise NotImplementedError
