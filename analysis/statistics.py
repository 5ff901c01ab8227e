"""Means with the spread that belongs to them."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev


def confidence_95(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (Student's t).

    The t quantile is Cornish and Fisher's expansion around the normal one (Abramowitz and Stegun 26.7.5), right to
    three digits from 5 values on. One value has no spread: its half width is nan.
    """
    if len(values) < 2:
        return fmean(values), math.nan
    freedom = len(values) - 1
    z = NormalDist().inv_cdf(0.975)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return fmean(values), t * stdev(values) / math.sqrt(len(values))
