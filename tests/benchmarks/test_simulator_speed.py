"""The simulator's speed as ratios within one process. The quick form's bounds are loose: noise is not news.

``--runslow`` measures at full size; ``python -m analysis.simulator_speed`` writes the figures down.
"""

import tracemalloc

import pytest

from analysis.simulator_speed import count, evaluate_s, event_rates, growth, scenario, sweep
from pipesim.simulation.pipeline import evaluate


def test_a_simulation_keeps_a_share_of_bare_simpys_event_rate() -> None:
    assert event_rates(scenario(stages=32, tokens=40), rounds=3).ratio > 0.1


def test_what_is_known_in_advance_does_not_go_through_the_event_list() -> None:
    counts = count(scenario(tokens=40))
    assert counts.calls < 0.75 * counts.events


def test_time_grows_linearly_with_tokens() -> None:
    few, many = (min(evaluate_s(scenario(tokens=tokens)) for _ in range(3)) for tokens in (100, 400))
    assert many < 2 * 4 * few


def test_time_grows_linearly_with_stages() -> None:
    few, many = (min(evaluate_s(scenario(stages, 30)) for _ in range(3)) for stages in (16, 64))
    assert many < 2 * 4 * few


def peak_bytes(tokens: int) -> int:
    one = scenario(stages=1, tokens=tokens, policy="speculative")
    tracemalloc.start()
    try:
        evaluate(one)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_with_the_text_alone() -> None:
    """A trace would take some kilobytes per token: runs, spans, drafts."""
    assert (peak_bytes(2500) - peak_bytes(1250)) / 1250 < 350


@pytest.mark.slow
def test_a_sweep_of_1000_scenarios_takes_less_than_20_s_on_two_cores() -> None:
    """In CPU time: other work on the cores is not the simulator's."""
    assert sweep([scenario(seed=seed) for seed in range(1000)], jobs=2).free_s < 20


@pytest.mark.slow
def test_time_and_memory_stay_linear_up_to_100000_tokens() -> None:
    few, many = growth([(1_000, 8), (100_000, 8)])
    assert many.seconds < 1.5 * 100 * few.seconds
    assert many.mebibytes * 2**20 / 100_000 < 400


@pytest.mark.slow
def test_time_stays_linear_up_to_128_stages() -> None:
    few, many = growth([(300, 8), (300, 128)])
    assert many.seconds < 16 * few.seconds


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "share"), [(8, 0.1), (32, 0.2), (128, 0.3)])
def test_the_event_rate_at_full_size(stages: int, share: float) -> None:
    assert event_rates(scenario(stages, 400), rounds=5).ratio > share
