"""Each token's waiting time, taken apart: the parts sum up to the time exactly, and each knob moves its own part."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_builder import build

from pipesim.metrics import LatencyShares, compute_metrics
from pipesim.scenario import Scenario
from pipesim.simulation.latency import decompose, path_parts
from pipesim.simulation.pipeline import evaluate, simulate
from pipesim.trace import Latency, Trace

POLICIES = [
    "{name: pipeinfer}",
    "{name: pipeinfer, branches: 3, p_split: 0.05, always_canonical: true}",
    "{name: pipeinfer, asynchronous: false, cancellation: false}",
    "{name: speculative, max_nodes: 4, branches: 2}",
    "{name: autoregressive}",
]


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Any pipeline, with shared devices and prefill in several waves."""
    stage_ms = draw(st.lists(st.floats(0.1, 20), min_size=2, max_size=5))
    stages = ", ".join(f"{{cost: {{kind: linear, constant_ms: {one}, per_token_ms: 0.3}}}}" for one in stage_ms)
    shared = ["cluster.devices=[{name: box}]", "cluster.stages.0.device=box", "cluster.head.device=box"]
    return build(
        f"cluster.stages=[{stages}]",
        *(shared if draw(st.booleans()) else []),
        f"cluster.links.latency_ms={draw(st.floats(0, 10))}",
        f"cluster.links.bandwidth_gbps={draw(st.sampled_from([0.001, 0.1, 10]))}",
        f"cluster.head.overhead_ms={draw(st.sampled_from([0.0, 0.7]))}",
        f"cluster.drafter.level_ms={draw(st.floats(0.1, 5))}",
        f"cluster.prefill_chunk={draw(st.integers(1, 30))}",
        "cluster.prefill_window=2",
        f"workload={{prompt_tokens: {draw(st.integers(1, 60))}, max_new_tokens: {draw(st.integers(1, 30))}}}",
        f"acceptance.rate={draw(st.floats(0, 1))}",
        f"policy={draw(st.sampled_from(POLICIES))}",
        f"seed={draw(st.integers(0, 99))}",
    )


def parts(latency: Latency | LatencyShares) -> dict[str, float]:
    return dataclasses.asdict(latency)


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


@settings(deadline=None, max_examples=60)
@given(scenarios())
def test_the_parts_sum_up_exactly_to_the_time_between_emissions(scenario: Scenario) -> None:
    before = 0
    for emission in simulate(scenario).emissions:
        assert emission.latency is not None
        spent = parts(emission.latency).values()
        assert sum(spent) == nanoseconds(emission.time_s) - before
        assert min(spent) >= 0
        before = nanoseconds(emission.time_s)


@settings(deadline=None, max_examples=40)
@given(scenarios())
def test_evaluate_gives_the_metrics_of_the_trace(scenario: Scenario) -> None:
    assert evaluate(scenario) == compute_metrics(simulate(scenario))


def test_the_breakdown_sums_up_to_the_first_tokens_time_and_the_mean_gap() -> None:
    metrics = evaluate(build())
    assert metrics.latency_breakdown_s is not None
    assert metrics.latency_breakdown_s.itl is not None
    assert metrics.itl_s is not None
    assert sum(parts(metrics.latency_breakdown_s.ttft).values()) == pytest.approx(metrics.ttft_s)
    assert sum(parts(metrics.latency_breakdown_s.itl).values()) == pytest.approx(metrics.itl_s.mean)


def plain(*sets: str) -> dict[str, float]:
    breakdown = evaluate(build("cluster.head.overhead_ms=0.2", *sets)).latency_breakdown_s
    assert breakdown is not None
    assert breakdown.itl is not None
    return parts(breakdown.itl)


@pytest.mark.parametrize(
    ("part", "policy", "slower", "by_ms"),
    [
        ("propagation", "autoregressive", "cluster.links.latency_ms=1.5", 4 * 1.0),
        ("compute", "autoregressive", "cluster.stages.0.cost.constant_ms=12", 3 * 2),
        ("head", "autoregressive", "cluster.head.overhead_ms=1.2", 1.0),
        ("serialisation", "autoregressive", "cluster.links.bandwidth_gbps=0.1", None),
        ("drafter", "speculative", "cluster.drafter.level_ms=5", None),
    ],
)
def test_a_slower_part_moves_its_own_share_alone(part: str, policy: str, slower: str, by_ms: float | None) -> None:
    before, after = plain(f"policy.name={policy}"), plain(f"policy.name={policy}", slower)
    moved = {name: after[name] - before[name] for name in before if after[name] != pytest.approx(before[name])}
    assert list(moved) == [part]
    assert moved[part] > 0
    if by_ms is not None:
        assert moved[part] == pytest.approx(by_ms / 1e3)


def test_autoregressive_decoding_on_its_own_machines_never_queues() -> None:
    shares = plain("policy.name=autoregressive")
    assert shares["queueing"] == shares["drafter"] == 0
    assert shares["compute"] == pytest.approx(3 * 11e-3)


def test_prefill_behind_a_narrow_window_queues() -> None:
    sets = ["cluster.prefill_chunk=2", "policy.name=autoregressive", "workload.prompt_tokens=40"]
    one, all_at_once = (evaluate(build(*sets, f"cluster.prefill_window={w}")).latency_breakdown_s for w in (1, 20))
    assert one is not None
    assert all_at_once is not None
    assert one.ttft.queueing > 2 * all_at_once.ttft.queueing


def test_a_gap_is_cut_out_of_the_path() -> None:
    """One stage; the gap begins while the run is on the link, 2 ns before it arrives."""
    path = [1, 2, 4, 5, 7, 10, 11, 15, 15, 16, 18, 20, 21]
    assert decompose(path, path_parts(1), drafted=False, since=8) == Latency(1 + 2, 4, 1, 2 + 2, 1, 0)


@pytest.mark.parametrize(("drafted", "queueing", "drafter"), [(False, 6, 0), (True, 3 + 2, 1)])
def test_what_went_before_is_the_drafters_if_a_draft_led_to_the_run(drafted: bool, queueing: int, drafter: int) -> None:
    path = [1, 2, 4, 5, 7, 10, 11, 15, 15, 16, 18, 20, 21]
    latency = decompose(path, path_parts(1), drafted, since=0)
    assert (latency.queueing, latency.drafter) == (queueing, drafter)
    assert sum(parts(latency).values()) == 21


def test_a_trace_without_latencies_has_no_breakdown() -> None:
    trace: Trace = simulate(build())
    bare = dataclasses.replace(
        trace, emissions=tuple(dataclasses.replace(one, latency=None) for one in trace.emissions)
    )
    assert compute_metrics(bare).latency_breakdown_s is None


@pytest.mark.parametrize(
    ("fault", "share", "at_least"),
    [
        ("{kind: crash, stage: 1, start_ms: 300, detect_ms: 100, restart_ms: 1500}", "queueing", 1.6),
        ("{kind: partition, link: 1, start_ms: 309, duration_ms: 1600}", "queueing", 1.58),
        ("{kind: latency, link: 1, start_ms: 300, duration_ms: 50, extra_ms: 1600}", "propagation", 1.6),
        ("{kind: bandwidth, link: 1, start_ms: 300, duration_ms: 1700, cap_gbps: 1.0e-9}", "serialisation", 1.6),
        ("{kind: slow-stage, stage: 1, start_ms: 300, duration_ms: 1700, factor: 1000}", "compute", 1.6),
    ],
)
def test_the_time_that_a_fault_costs_stands_where_it_was_spent(fault: str, share: str, at_least: float) -> None:
    """Of the one gap that it made longer; 8 plain ones take 0.28 s, prefill about 60 ms."""
    trace = simulate(build("policy.name=autoregressive", f"faults=[{fault}]"))
    latencies = [parts(one.latency) for one in trace.emissions[1:] if one.latency]
    longest = max(latencies, key=lambda one: sum(one.values()))
    assert longest[share] >= at_least * 1e9
    assert sum(longest.values()) - longest[share] < 0.2e9
