"""What the page of hops says of its aims."""

import pytest

from analysis.hops import at_least, at_most

STEADY = [0.50, 0.51, 0.52, 0.53, 0.54]


@pytest.mark.parametrize(
    ("aim", "series", "verdict"),
    [
        (0.6, [STEADY], "reached"),
        (0.6, [STEADY, [value + 0.2 for value in STEADY]], "missed"),
        (0.525, [STEADY], "not established"),  # the median keeps it, the upper quartile does not
        (0.6, [STEADY, [0.3, 0.4, 0.5, 0.55, 0.58]], "not established"),  # too wide a spread, though all keep it
        (0.3, [[0.3, 0.4, 0.5, 0.6, 0.7]], "not established"),
    ],
)
def test_a_verdict_looks_at_the_spread(aim: float, series: list[list[float]], verdict: str) -> None:
    assert at_most(aim, series) == verdict
    assert at_least(-aim, [-value for value in series[-1]]) == at_most(aim, series[-1:])
