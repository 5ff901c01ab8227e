"""Means, differences and ratios with the spread that belongs to them.

Everything here takes one value per seed. Simulations under the same seed meet the same text and the same lucky and
unlucky positions (common random numbers), so two policies are compared by the differences or ratios *within* each seed:
what a seed does to both cancels out, and far fewer seeds are needed than by comparing two means.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Statistic = Callable[[NDArray[np.float64]], float]
"""A figure of a sample, given as an array whose first dimension is the seeds."""

_FEWEST_TO_RESAMPLE = 5


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % confidence interval; ``low`` and ``high`` are nan where a spread cannot be known."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        """Three significant digits: ``23.1 [19.4, 28]``."""
        return f"{significant(self.estimate)} [{significant(self.low)}, {significant(self.high)}]"

    @property
    def half_width(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean with Student's t interval: ``m ± t(0.975, n - 1) s / sqrt(n)``, ``s`` with ``n - 1`` degrees of freedom.

    Right for means of values that are not wildly skewed. A single value has no spread: its limits are nan.

    Raises:
        ValueError: there is no value.
    """
    sample = np.asarray(values, dtype=np.float64)
    if not sample.size:
        raise ValueError("a mean needs at least one value")
    mean = math.fsum(sample) / sample.size
    if sample.size == 1:
        return Interval(mean, math.nan, math.nan)
    from scipy.special import stdtrit  # takes long to import

    half = float(stdtrit(sample.size - 1, 0.975)) * float(sample.std(ddof=1)) / math.sqrt(sample.size)
    return Interval(mean, mean - half, mean + half)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of ``values[i] - baseline[i]``, entries of one seed each, with Student's t interval of the differences.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    return mean_interval([value - base for value, base in zip(values, baseline, strict=True)])


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """How many times as large: geometric mean of ``values[i] / baseline[i]``, entries of one seed each.

    ``exp(mean ± t s / sqrt(n))`` of the ratios' logarithms: to swap the two inverts estimate and limits exactly, which
    the mean of plain ratios does not.

    Raises:
        ValueError: the sequences differ in length or are empty, or a value is not positive.
    """
    if min(*values, *baseline, math.inf) <= 0:
        raise ValueError("ratios need positive values")
    logs = mean_interval([math.log(value / base) for value, base in zip(values, baseline, strict=True)])
    return Interval(*(math.exp(one) for one in (logs.estimate, logs.low, logs.high)))


def bootstrap_interval(sample: ArrayLike, statistic: Statistic, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Any figure of a sample with its percentile bootstrap interval, for figures whose distribution is skewed.

    Whole seeds are drawn with replacement, as many as there are; the limits are the 2.5 % and 97.5 % quantiles of the
    figure over ``resamples`` such draws (Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3). Draws
    for which the figure does not exist (nan) are left out; the caller says what that means. Of fewer than five seeds
    the interval would be too narrow to be believed: its limits are nan.

    Args:
        sample: ``[seeds, ...]``.
        statistic: the figure of such an array.
        resamples: how many draws.
        seed: of the draws; same seed, same interval.
    """
    values = np.asarray(sample, dtype=np.float64)
    estimate = float(statistic(values))
    if len(values) < _FEWEST_TO_RESAMPLE:
        return Interval(estimate, math.nan, math.nan)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    figures = np.array([statistic(values[draw]) for draw in draws])
    figures = figures[~np.isnan(figures)]
    if not figures.size:
        return Interval(estimate, math.nan, math.nan)
    low, high = np.quantile(figures, (0.025, 0.975))
    return Interval(estimate, float(low), float(high))


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent: ``0.0123``, ``1230000``."""
    return np.format_float_positional(value, digits, unique=False, fractional=False, trim="-")
