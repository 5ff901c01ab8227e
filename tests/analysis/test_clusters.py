import pytest
from scenario_builder import build

from analysis.studies.clusters import with_slope
from pipesim.scenario import Scenario
from pipesim.scheduling.runs import RunKind

ROOFLINE = build(
    "model={profile: llama-2-7b}",
    "cluster.stages=[{layers: auto, repeat: 2, cost: {kind: roofline, profile: rtx-4090}}, "
    "{layers: auto, cost: {kind: roofline, profile: h100-sxm}}]",
)


def seconds(scenario: Scenario, rows: int, kind: RunKind = RunKind.CANONICAL) -> list[float]:
    return [plan.cost_model().seconds(kind, rows, 28) for plan in scenario.stages()]


def test_further_rows_cost_at_least_their_share_and_the_first_one_costs_what_it_did() -> None:
    steeper = with_slope(ROOFLINE, 0.1)
    assert seconds(steeper, 1) == pytest.approx(seconds(ROOFLINE, 1))
    assert seconds(steeper, 4) == pytest.approx([1.3 * one for one in seconds(ROOFLINE, 1)])
    assert [plan.layers for plan in steeper.stages()] == [plan.layers for plan in ROOFLINE.stages()]


def test_where_computing_costs_more_than_the_share_the_roofline_stays() -> None:
    assert seconds(with_slope(ROOFLINE, 0.0001), 512) == pytest.approx(seconds(ROOFLINE, 512))


def test_the_prompt_takes_as_long_as_before() -> None:
    steeper = with_slope(ROOFLINE, 0.1)
    assert seconds(steeper, 64, RunKind.PREFILL) == pytest.approx(seconds(ROOFLINE, 64, RunKind.PREFILL))
