"""How sure a figure is: binomial intervals, mean and deviation over seeds."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.pages.numbers import number

Z_95 = 1.959963984540054  # 97.5% quantile of the normal distribution

# Figures that are a share of samples got right: top1, zeroshot_top5, retrieval_i2t_r10, top1_<head>, ...
_PROPORTION = re.compile(r"(^|_)(top\d+|r\d+|accuracy|recall|precision)(_|$)")


class Estimate(NamedTuple):
    """A figure of one run, or of several that differ in their seed."""

    values: tuple[float, ...]
    num_samples: int | None  # that each value was measured on
    proportion: bool  # whether each value is a share of num_samples

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of a single proportion over its samples; None otherwise."""
        if len(self.values) != 1 or not self.proportion or not self.num_samples:
            return None
        return wilson(self.values[0], self.num_samples)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """What a whisker shows: the binomial interval of one run, mean plus and minus a deviation of several."""
        if self.deviation is not None:
            return self.mean - self.deviation, self.mean + self.deviation
        return self.interval

    def text(self) -> str:
        """The figure as a reader wants it: "63.2%", "63.2 ± 1.4%", "0.0123"."""
        if self.deviation is None:
            return number(self.mean, proportion=self.proportion)
        if self.proportion:
            return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f}%"
        if not (math.isfinite(self.mean) and 0 < self.deviation < math.inf):
            return f"{number(self.mean)} ± {number(self.deviation)}"
        decimals = max(0, 1 - math.floor(math.log10(self.deviation)))  # no more than the deviation's two digits say
        return f"{self.mean:,.{decimals}f} ± {self.deviation:,.{decimals}f}"

    def interval_text(self) -> str | None:
        interval = self.interval
        return None if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}%"


def student_95(degrees: int) -> float:
    """97.5% quantile of Student's t distribution.

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"no interval with {degrees} degrees of freedom")
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    return float(stdtrit(degrees, 0.975))


def wilson(share: float, num_samples: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a binomial proportion (Wilson 1927): sound near 0 and 1, and for small n.

    Raises:
        ValueError: no samples, or a share outside [0, 1].
    """
    if num_samples < 1 or not 0 <= share <= 1:
        raise ValueError(f"no proportion: {share} of {num_samples}")
    z2 = Z_95**2
    centre = (share + z2 / (2 * num_samples)) / (1 + z2 / num_samples)
    half = Z_95 / (1 + z2 / num_samples) * math.sqrt(share * (1 - share) / num_samples + z2 / (4 * num_samples**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def is_proportion(figure: str, values: Sequence[float]) -> bool:
    """Whether a figure called so, with such values, is a share of samples."""
    return bool(_PROPORTION.search(figure.rpartition("/")[2])) and all(0 <= value <= 1 for value in values)
