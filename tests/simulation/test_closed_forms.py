"""The simulator against formulas that do not know it."""

from itertools import accumulate
from operator import mul

import pytest
from scenario_builder import build

from pipesim.metrics import compute_metrics
from pipesim.simulation.links import HEADER_BYTES, KV_OPERATION_BYTES, ROW_BYTES, TOKEN_BYTES
from pipesim.simulation.pipeline import simulate

NO_LINKS = "cluster.links={}"


def round_trip_s(rows: int = 1, kv_operations: int = 1) -> float:
    """Seconds of one run of the plain scenario through its three stages and four links."""
    stages = 3 * (10e-3 + rows * 1e-3)
    metadata = HEADER_BYTES + kv_operations * KV_OPERATION_BYTES
    first = metadata + rows * (ROW_BYTES + TOKEN_BYTES)
    between = metadata + rows * (ROW_BYTES + 64 * 4)
    home = HEADER_BYTES + TOKEN_BYTES
    return stages + 4 * 0.5e-3 + (first + 2 * between + home) * 8 / 1e9


def test_autoregressive_latency_is_the_sum_of_stages_and_links() -> None:
    metrics = compute_metrics(simulate(build("policy.name=autoregressive")))
    assert metrics.itl_s is not None
    for figure in (metrics.itl_s.mean, metrics.itl_s.p50, metrics.itl_s.p99):
        assert figure == pytest.approx(round_trip_s(), abs=1e-8)
    assert metrics.ttft_s == pytest.approx(round_trip_s(rows=8, kv_operations=0), abs=1e-8)
    assert metrics.tokens_per_second == pytest.approx(1 / round_trip_s(), rel=1e-6)


def test_head_overhead_is_paid_once_per_event() -> None:
    metrics = compute_metrics(simulate(build("policy.name=autoregressive", "cluster.head.overhead_ms=3")))
    assert metrics.itl_s is not None
    assert metrics.itl_s.mean == pytest.approx(round_trip_s() + 3e-3, abs=1e-8)


def test_a_token_is_at_the_user_when_the_head_has_handled_the_run() -> None:
    trace = simulate(build("policy.name=autoregressive", "cluster.head.overhead_ms=3"))
    home = round_trip_s(rows=8, kv_operations=0)
    assert trace.emissions[0].time_s == pytest.approx(home + 3e-3, abs=1e-8)
    last = max(span.end_s for span in trace.spans if span.run_id == 0)
    assert trace.emissions[0].time_s - last > 3e-3 + 0.5e-3, "one link and the head"
    assert trace.runs[1].submitted_s == trace.emissions[0].time_s, "what follows from it leaves at the same time"


def test_stages_of_autoregressive_decoding_idle_while_the_others_work() -> None:
    metrics = compute_metrics(simulate(build("policy.name=autoregressive", NO_LINKS)))
    assert metrics.stage_utilization == pytest.approx([1 / 3] * 3)
    assert metrics.bubble_fraction == pytest.approx(2 / 3)


@pytest.mark.parametrize("policy", ["{name: pipeinfer}", "{name: speculative, max_nodes: 4}"])
def test_acceptance_0_gives_the_speed_of_the_plain_pipeline(policy: str) -> None:
    """With a drafter that takes no time, and runs that cost the same at any number of rows."""
    sets = ["acceptance.rate=0", "acceptance.runner_up=0", "cluster.drafter.level_ms=0", NO_LINKS]
    sets += ["cluster.stages.0.cost={kind: linear, constant_ms: 10, prefill_per_token_ms: 1}"]
    # a stage that has begun a doomed run ends its layer before it can take up the next token
    sets += ["model.layers=120000"]
    plain = compute_metrics(simulate(build(*sets, "policy.name=autoregressive")))
    other = compute_metrics(simulate(build(*sets, f"policy={policy}")))
    assert plain.tokens_per_second is not None
    assert other.tokens_per_second == pytest.approx(plain.tokens_per_second, rel=1e-4)
    assert other.acceptance_rate == 0


@pytest.mark.parametrize(("rate", "drafted"), [(0.3, 2), (0.7, 1), (0.7, 4), (0.9, 8)])
def test_synchronous_speculation_on_one_stage_is_the_textbook_geometric_sum(rate: float, drafted: int) -> None:
    """Expected tokens per round: (1 - a^(k+1)) / (1 - a) (Leviathan et al., arXiv 2211.17192, equation 1)."""
    trace = simulate(
        build(
            f"acceptance.rate={rate}",
            f"policy={{name: speculative, max_nodes: {drafted}, split: 1}}",
            "cluster.stages.0.repeat=1",
            NO_LINKS,
            "workload.max_new_tokens=6000",
        )
    )
    rounds = len(trace.emissions) - 1
    expected = (1 - rate ** (drafted + 1)) / (1 - rate)
    assert (len(trace.tokens) - 1) / rounds == pytest.approx(expected, rel=0.03)
    chain = drafted * 2e-3 + 10e-3 + (drafted + 1) * 1e-3
    gaps = [after.time_s - before.time_s for before, after in zip(trace.emissions, trace.emissions[1:], strict=False)]
    assert gaps[: rounds // 2] == pytest.approx([chain] * (rounds // 2)), "every round drafts k tokens, then verifies"


@pytest.mark.parametrize("rates", [(0.9, 0.6, 0.3), (0.5, 0.8), (0.95, 0.9, 0.8, 0.6, 0.4, 0.2)])
def test_rates_by_depth_give_synchronous_speculation_the_sum_of_their_products(rates: tuple[float, ...]) -> None:
    """A round brings its own token and drafted token i if all up to it are right: 1 + r1 + r1 r2 + ..."""
    drafted = 5
    trace = simulate(
        build(
            f"acceptance={{kind: per_depth, rates: {list(rates)}}}",
            f"policy={{name: speculative, max_nodes: {drafted}, split: 1}}",
            "cluster.stages.0.repeat=1",
            NO_LINKS,
            "workload.max_new_tokens=6000",
        )
    )
    by_depth = [rates[min(depth, len(rates) - 1)] for depth in range(drafted)]
    expected = 1 + sum(accumulate(by_depth, mul))
    rounds = len(trace.emissions) - 1
    assert (len(trace.tokens) - 1) / rounds == pytest.approx(expected, rel=0.03)


def test_acceptance_1_is_bound_by_the_slowest_stage() -> None:
    """Full pipeline of certain runs: rows / (time of a run at the slowest stage)."""
    trace = simulate(
        build(
            "acceptance={kind: iid, rate: 1, confidence_right: 1, confidence_spread: 0}",
            "policy={name: pipeinfer, micro_batch: 4}",
            "cluster.drafter.level_ms=1",
            NO_LINKS,
            "workload.max_new_tokens=1200",
        )
    )
    late = [emission for emission in trace.emissions if emission.time_s > 0.5]
    speed = sum(len(emission.tokens) for emission in late[1:]) / (late[-1].time_s - late[0].time_s)
    assert speed == pytest.approx(4 / 14e-3, rel=0.02)
