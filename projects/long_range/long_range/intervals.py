"""Means, and paired differences over seeds with their intervals."""

import math
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Dict, Optional, Sequence

from mpmath import betainc, findroot

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with the ends of its t interval.

    Attributes:
        mean: the mean.
        deviation: the sample standard deviation; None of a single value.
        low, high: the ends; None of a single value.
        count: how many values.
    """

    mean: float
    deviation: Optional[float]
    low: Optional[float]
    high: Optional[float]
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t for which ``confidence`` of Student's distribution lies between -t and t.

    P(|T| > t) is the regularised incomplete beta function I_x(freedom / 2, 1 / 2) at
    x = freedom / (freedom + t^2) (Abramowitz and Stegun, 26.7.1 and 26.5.27).
    """

    def excess(x: float) -> float:
        return betainc(freedom / 2, 0.5, 0, x, regularized=True) - (1 - confidence)

    x = float(findroot(excess, (1e-9, 1 - 1e-9), solver="bisect", maxsteps=200, tol=1e-25))
    return math.sqrt(freedom * (1 - x) / x)


def interval(values: Sequence[float]) -> Optional[Interval]:
    """The mean of values, one of each seed, and its 95% t interval; None of no values."""
    if not values:
        return None
    if len(values) == 1:
        return Interval(values[0], None, None, None, 1)
    centre, deviation = mean(values), stdev(values)
    reach = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(centre, deviation, centre - reach, centre + reach, len(values))


def paired(values: Dict[int, float], of_baseline: Dict[int, float]) -> Optional[Interval]:
    """The differences to the baseline, over the seeds that both have: seed -> value."""
    return interval([values[seed] - of_baseline[seed] for seed in values if seed in of_baseline])
