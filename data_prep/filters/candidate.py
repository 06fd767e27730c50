"""What filters are asked about, and who scores it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8

from pipeline.data.images.decode import decode


class Candidate(NamedTuple):
    """A pair as it would be stored; what a `function` filter is called with."""

    image: bytes  # encoded, upright and resized
    caption: str  # "" without captions
    url: str
    extra: dict[str, Any]  # columns that are passed on, and scores of earlier filters

    def pixels(self) -> UInt8[np.ndarray, "h w 3"]:
        """The image decoded."""
        return decode(self.image)


class Scorers(Protocol):
    """Processes that hold the models, one group for each filter with a model."""

    def scores(self, number: int, pairs: Sequence[tuple[bytes, str]]) -> list[float]:
        """The scores that the model of filter `number` gives to any number of pairs of encoded image and caption."""
        ...
