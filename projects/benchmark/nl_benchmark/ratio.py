"""Ratios of times that say by themselves whether they mean anything."""

from dataclasses import dataclass
from statistics import median, quantiles
from typing import Sequence, Tuple

MIN_ROUNDS = 5  # quartiles of fewer are a guess
MAX_SPREAD = 0.2  # interquartile range over median


def quartiles(values: Sequence[float]) -> Tuple[float, float]:
    """The first and the third quartile; of a single value, twice that value."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = quantiles(values, method="inclusive")
    return low, high


@dataclass(frozen=True)
class Ratio:
    """How many times as long a competitor takes as the reference.

    Attributes:
        value: the median over rounds; None if the ratio is refused.
        low, high: its quartiles.
        refusal: why there is no value, otherwise empty.
    """

    value: float | None
    low: float
    high: float
    refusal: str = ""

    def __str__(self) -> str:
        if self.refusal:
            return f"refused: {self.refusal}"
        if self.low <= 1 <= self.high:
            return f"no difference ({self.low:.2f} to {self.high:.2f})"
        return f"{self.value:.3g}"


def time_ratio(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Compare two competitors that ran in turn, round by round.

    What slows the machine down for a while slows down both times of a round, so the ratio is taken
    in every round first. It is refused below ``MIN_ROUNDS`` rounds, and where the middle half of
    the rounds' ratios spreads over more than ``MAX_SPREAD`` of their median.

    Args:
        seconds: of the competitor, one number per round.
        reference: the reference's, of the same rounds.
    """
    ratios = [own / other for own, other in zip(seconds, reference, strict=True)]
    low, high = quartiles(ratios)
    middle = median(ratios)
    if len(ratios) < MIN_ROUNDS:
        count = f"{len(ratios)} round{'s' * (len(ratios) != 1)}"
        return Ratio(None, low, high, f"{count}, {MIN_ROUNDS} are the least")
    spread = (high - low) / middle
    if spread > MAX_SPREAD:
        return Ratio(None, low, high, f"spread {spread:.0%}")
    return Ratio(middle, low, high)
