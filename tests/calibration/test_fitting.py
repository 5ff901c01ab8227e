"""Fits find the costs that made the measurements, and say how far they can be trusted."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from observing import observe
from scenario_builder import build

from pipesim.calibration import fit_costs

STAGES = (
    "cluster.stages=[{repeat: 2, cost: {kind: table, rows_ms: {1: %s, 2: %s, 16: %s}, "
    "prefill_rows_ms: {1: %s, 64: %s}, kv_us_per_kilocell: %s}}]"
)
times = st.floats(1, 100)


@settings(max_examples=25, deadline=None)
@given(times, times, times, times, times, st.sampled_from([0.0, 50.0, 900.0]), st.sampled_from([None, 0.1, 5.0]))
def test_costs_are_found_again(
    one: float, two: float, many: float, first: float, chunk: float, kv: float, gbps: float | None
) -> None:
    scenario = build(
        STAGES % (one, two, many, first, chunk, kv),
        f"cluster.links={{latency_ms: 0.4, bandwidth_gbps: {'null' if gbps is None else gbps}}}",
        "cluster.head={overhead_ms: 0.3, draft_overhead_ms: 0.1}",
        "cluster.drafter={level_ms: 2, request_ms: 0.5, prefill_per_token_ms: 0.05, kv_us_per_kilocell: 200}",
    )
    found = fit_costs(observe(scenario), None).values
    cost = scenario.stages()[1].cost_model()
    expected = {
        "cluster.stages.1.cost.rows_ms.1": one,
        "cluster.stages.1.cost.rows_ms.2": two,
        "cluster.stages.1.cost.rows_ms.16": many,
        "cluster.stages.1.cost.prefill_rows_ms.1": first,
        "cluster.stages.1.cost.prefill_rows_ms.64": chunk,
        "cluster.stages.1.cost.kv_us_per_kilocell": kv,
        "cluster.stages.1.void_ms": 0.1,
        "cluster.links.hops.1.latency_ms": 0.4,
        "cluster.links.draft.latency_ms": 0.4,
        "cluster.head.overhead_ms": 0.3,
        "cluster.head.draft_overhead_ms": 0.1,
        "cluster.drafter.level_ms": 2.0,
        "cluster.drafter.request_ms": 0.5,
        "cluster.drafter.prefill_per_token_ms": 0.05,
        "cluster.drafter.kv_us_per_kilocell": 200.0,
    }
    if gbps is not None:
        expected["cluster.links.hops.1.bandwidth_gbps"] = gbps
    assert cost is not None
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    assert min(found.values()) >= 0.0, "a negative cost is no cost"


@pytest.mark.parametrize("contention", [0.0, 0.3, 0.9])
def test_contention_is_found_again(contention: float) -> None:
    shared = f"{{name: box, cores: 2, sharing: fair, contention: {contention}}}"
    scenario = build(
        f"cluster.devices=[{shared}]",
        "cluster.stages=[{repeat: 4, device: box, cost: {kind: linear, constant_ms: 9, per_token_ms: 1}}]",
    )
    assert fit_costs(observe(scenario), 2).values["cluster.devices.0.contention"] == pytest.approx(contention, abs=5e-3)


def test_intervals_cover_what_rounds_disagree_about() -> None:
    scenario = build("cluster.stages=[{repeat: 2, cost: {kind: linear, constant_ms: 9, per_token_ms: 1}}]")
    calm, shaky = (fit_costs(observe(scenario, 12, noise), None) for noise in (0.0, 0.1))
    for key, (low, high) in shaky.intervals.items():
        if key.endswith("rows_ms.1") and "stages" in key:
            assert low < calm.values[key] < high
            assert calm.intervals[key][1] - calm.intervals[key][0] < 1e-6
    assert shaky.residuals["stage 0"] == pytest.approx(0.1, abs=0.01)


def test_one_hiccup_does_not_move_a_cost() -> None:
    scenario = build("cluster.stages=[{repeat: 2, cost: {kind: linear, constant_ms: 9, per_token_ms: 1}}]")
    seen = observe(scenario, 9, noise=0.01)
    odd = dataclasses.replace(seen.runs[0], stages_s=(1.0, 1.0))
    fit = fit_costs(dataclasses.replace(seen, runs=(odd, *seen.runs[1:])), None)
    assert fit.values["cluster.stages.0.cost.rows_ms.1"] == pytest.approx(10.0, rel=0.02)


def test_intervals_are_of_all_samples_of_a_round() -> None:
    """A round has several messages to the drafter; limits from the last of each alone need not cover the median."""
    seen = observe(build("cluster.drafter={level_ms: 2}"), noise=0.02)
    drafts = tuple(dataclasses.replace(one, way_s=0.001 + 0.0001 / one.levels) for one in seen.drafts)
    found = fit_costs(dataclasses.replace(seen, drafts=drafts), None)
    low, high = found.intervals["cluster.links.draft.latency_ms"]
    assert low <= found.values["cluster.links.draft.latency_ms"] <= high
