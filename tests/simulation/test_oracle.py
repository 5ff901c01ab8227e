"""A jitter-free FIFO pipeline without cancellation is a max-plus recurrence; the simulator must match it exactly."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_builder import build

from pipesim.recorder import Recorder
from pipesim.scenario import Scenario
from pipesim.scheduling.runs import Run
from pipesim.simulation.links import HEADER_BYTES, ROW_BYTES, TOKEN_BYTES
from pipesim.simulation.pipeline import Simulation
from pipesim.trace import Trace


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def size_bytes(run: Run, row_bytes: int) -> int:
    return HEADER_BYTES + run.rows * (ROW_BYTES + row_bytes) + 24 * len(run.kv_operations)


def max_plus(scenario: Scenario, runs: list[tuple[Run, int]]) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """Start and end of each run at each stage, and its return, from the submission times alone (nanoseconds)."""
    plans, links = scenario.stages(), scenario.hops()
    link_free, stage_free = [0] * len(links), [0] * len(plans)
    spans, returns = [], []

    def cross(hop: int, now: int, size: int) -> int:
        bandwidth = links[hop].bandwidth_gbps
        link_free[hop] = max(now, link_free[hop]) + (round(size * 8 / bandwidth) if bandwidth else 0)
        return link_free[hop] + round(links[hop].latency_ms * 1e6)

    for run, submitted in runs:
        now = cross(0, submitted, size_bytes(run, TOKEN_BYTES))
        spans.append([])
        for stage, plan in enumerate(plans):
            start = max(now, stage_free[stage])
            assert plan.cost.kind == "linear"
            stage_free[stage] = start + nanoseconds(
                plan.cost.constant_ms * 1e-3 + run.rows * plan.cost.per_token_ms * 1e-3
            )
            spans[-1].append((start, stage_free[stage]))
            last = stage == len(plans) - 1
            size = HEADER_BYTES + run.outputs * TOKEN_BYTES if last else size_bytes(run, 64 * 4)
            now = cross(stage + 1, stage_free[stage], size)
        returns.append(now)
    return spans, returns


def simulate_with_runs(scenario: Scenario) -> tuple[Trace, list[Run]]:
    runs = []

    class Witness(Recorder):
        def _submitted(self, run: Run, now: float) -> None:
            runs.append(run)
            super()._submitted(run, now)

    names = [plan.name for plan in scenario.stages()]
    recorder = Witness(scenario.scheduler(), scenario.seed, names, ticks_per_s=1e9)
    Simulation(scenario, recorder).run()
    return recorder.trace(), runs


@settings(deadline=None, max_examples=60)
@given(
    stage_ms=st.lists(st.floats(0.05, 30), min_size=1, max_size=6),
    per_token_ms=st.floats(0, 5),
    latency_ms=st.floats(0, 20),
    bandwidth=st.sampled_from([None, 0.01, 0.1, 1.0, 40.0]),
    level_ms=st.floats(0, 10),
    policy=st.sampled_from(
        ["{name: pipeinfer, cancellation: false}", "{name: pipeinfer, cancellation: false, branches: 3}",
         "{name: speculative, max_nodes: 3}", "{name: autoregressive}"]
    ),
    prompt=st.integers(1, 40),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_span_and_return_is_as_the_recurrence_says(
    stage_ms: list[float],
    per_token_ms: float,
    latency_ms: float,
    bandwidth: float | None,
    level_ms: float,
    policy: str,
    prompt: int,
    seed: int,
) -> None:
    cost = f"per_token_ms: {per_token_ms}"
    stages = ", ".join(f"{{layers: 1, cost: {{kind: linear, constant_ms: {one}, {cost}}}}}" for one in stage_ms)
    scenario = build(
        f"cluster.stages=[{stages}]",
        f"model.layers={len(stage_ms)}",
        f"cluster.links={{latency_ms: {latency_ms}, bandwidth_gbps: {'null' if bandwidth is None else bandwidth}}}",
        f"cluster.drafter.level_ms={level_ms}",
        "cluster.prefill_chunk=8",
        f"workload={{prompt_tokens: {prompt}, max_new_tokens: 25}}",
        f"policy={policy}",
        f"seed={seed}",
    )
    trace, runs = simulate_with_runs(scenario)
    # what is in flight at the end is cancelled: only what was never called off is a plain FIFO
    count = next((i for i, record in enumerate(trace.runs) if record.outcome == "drained"), len(runs))
    submitted = [nanoseconds(record.submitted_s) for record in trace.runs]
    spans, returns = max_plus(scenario, list(zip(runs[:count], submitted, strict=False)))
    for index in range(count):
        run_id = runs[index].run_id
        seen = sorted(
            (one.stage, nanoseconds(one.start_s), nanoseconds(one.end_s)) for one in trace.spans if one.run_id == run_id
        )
        assert seen == [(stage, *times) for stage, times in enumerate(spans[index])]
        assert nanoseconds(trace.runs[index].returned_s or 0) == returns[index]


def test_a_link_slower_than_the_stages_is_the_bottleneck() -> None:
    """Frames of 40 rows of 256 bytes over 10 Mbit/s: about 8.6 ms each, stages 2 ms."""
    scenario = build(
        "cluster.links.hops=[{hop: 2, bandwidth_gbps: 0.01}]",
        "cluster.stages.0.cost={kind: linear, constant_ms: 2}",
        "cluster.prefill_chunk=40",
        "workload={prompt_tokens: 800, max_new_tokens: 1}",
        "policy.name=autoregressive",
    )
    trace, runs = simulate_with_runs(scenario)
    starts = [span.start_s for span in trace.spans if span.stage == 2]
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert gaps == pytest.approx([size_bytes(runs[0], 256) * 8 / 1e7] * len(gaps))
