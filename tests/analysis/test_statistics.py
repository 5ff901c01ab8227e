import math

import pytest

from analysis.statistics import confidence_95


@pytest.mark.parametrize(("count", "quantile"), [(6, 2.5706), (11, 2.2281), (31, 2.0423), (1001, 1.9623)])
def test_the_half_width_uses_students_t(count: int, quantile: float) -> None:
    values = [float(i % 2) for i in range(count)]
    mean, half = confidence_95(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    assert half / spread == pytest.approx(quantile, rel=2e-3)


def test_one_value_has_no_spread() -> None:
    mean, half = confidence_95([4.0])
    assert mean == 4.0
    assert math.isnan(half)
