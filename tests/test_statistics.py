import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipesim.statistics import bootstrap_interval, mean_interval, paired_difference, paired_ratio


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.7062), (6, 2.5706), (11, 2.2281), (31, 2.0423), (1001, 1.9623)])
def test_the_half_width_uses_students_t(count: int, quantile: float) -> None:
    values = [float(i % 2) for i in range(count)]
    mean = mean_interval(values)
    spread = math.sqrt(sum((value - mean.estimate) ** 2 for value in values) / (count - 1) / count)
    assert mean.half_width / spread == pytest.approx(quantile, rel=1e-4)


def test_one_value_has_no_spread_and_none_has_no_mean() -> None:
    mean = mean_interval([4.0])
    assert mean.estimate == 4.0
    assert math.isnan(mean.low)
    assert math.isnan(mean.half_width)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_19_of_20_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(1)
    means = [mean_interval(rng.normal(7, 3, size=5).tolist()) for _ in range(2000)]
    assert sum(one.low <= 7 <= one.high for one in means) / 2000 == pytest.approx(0.95, abs=0.015)
    skewed = rng.exponential(size=(300, 40))
    medians = [bootstrap_interval(sample, lambda x: float(np.median(x)), resamples=300) for sample in skewed]
    assert sum(one.low <= math.log(2) <= one.high for one in medians) / 300 == pytest.approx(0.95, abs=0.05)


def test_pairs_see_through_what_a_seed_does_to_both() -> None:
    seeds = np.random.default_rng(2).normal(100, 20, size=8)
    better = paired_difference((seeds + 1).tolist(), seeds.tolist())
    assert better.low == pytest.approx(1)
    assert better.high == pytest.approx(1)
    faster = paired_ratio((1.1 * seeds).tolist(), seeds.tolist())
    assert (faster.low, faster.high) == (pytest.approx(1.1), pytest.approx(1.1))


@settings(deadline=None)  # the first interval imports SciPy
@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=9))
def test_swapping_the_two_inverts_a_ratio_and_negates_a_difference(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    ratio, inverse = paired_ratio(ours, theirs), paired_ratio(theirs, ours)
    assert ratio.estimate == pytest.approx(1 / inverse.estimate)
    assert ratio.low == pytest.approx(1 / inverse.high, rel=1e-6)
    difference, negative = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert difference.low == pytest.approx(-negative.high)


def test_what_is_not_paired_or_not_positive_is_refused() -> None:
    for compare in (paired_difference, paired_ratio):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            compare([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        paired_ratio([1.0, 2.0], [0.0, 1.0])


def test_the_bootstrap_is_the_same_every_time_and_skewed_where_the_sample_is() -> None:
    sample = [1.0, 1.1, 1.2, 1.3, 9.0, 1.1, 1.0, 1.2]

    def mean(values: np.ndarray) -> float:
        return float(values.mean())

    one, again = (bootstrap_interval(sample, mean, seed=3) for _ in range(2))
    assert one == again
    assert one.high - one.estimate > 1.5 * (one.estimate - one.low)
    assert math.isnan(bootstrap_interval(sample[:4], mean).low), "four are too few"
    assert not math.isnan(bootstrap_interval(sample[:5], mean).low)


def test_draws_without_the_figure_are_left_out() -> None:
    def positive(values: np.ndarray) -> float:
        return float(values.mean()) if values.min() > 0 else math.nan

    sometimes = bootstrap_interval([5.0, 6.0, 7.0, 8.0, -1.0], positive)
    assert math.isnan(sometimes.estimate)
    assert sometimes.low >= 5.0
    assert math.isnan(bootstrap_interval([-1.0] * 5, positive).high)


def test_an_interval_reads_as_people_write_it() -> None:
    assert str(mean_interval([1.0, 2.0, 3.0])) == "2 [-0.484, 4.48]"
