"""Whole generations while things go wrong: the text comes later and is the same (I3, I7, I9)."""

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_builder import build
from troubles import faults

from pipesim.event_log import replay_log
from pipesim.metrics import compute_metrics
from pipesim.scheduling.commands import Outcome
from pipesim.scheduling.runs import RunKind
from pipesim.simulation.pipeline import evaluate, simulate
from pipesim.trace import Trace

POLICIES = [
    "{name: autoregressive}",
    "{name: speculative, max_nodes: 5, branches: 2, split: 0.05}",
    "{name: pipeinfer}",
    "{name: pipeinfer, branches: 3, p_split: 0.05, micro_batch: 6}",
    "{name: pipeinfer, always_canonical: true, cancellation: false}",
    "{name: pipeinfer, asynchronous: false, p_accept: 0.6, p_decay: 0.1}",
    "{name: pipeinfer, continuous: false}",
    "{name: pipeinfer, multibuffering: false, p_recovery: 0.05}",
]
PARTITION = "faults=[{kind: partition, start_ms: 300, duration_ms: 2000, link: 2}]"
CRASH = "faults=[{kind: crash, stage: 1, start_ms: 300, detect_ms: 100, restart_ms: 1500}]"

NETWORKS = [
    "cluster.links.jitter_ms=0",
    "cluster.links={preset: wifi}",
    "cluster.links={latency_ms: 5, jitter_ms: 5, loss: 0.05, retransmit_ms: 30}",
    "cluster.links={latency_ms: 1, profile: {period_ms: 90, shape: ramps, "
    "points: [{at_ms: 0, bandwidth_gbps: 1, latency_ms: 1}, {at_ms: 50, bandwidth_gbps: 0.001, latency_ms: 9}]}}",
]
DEVICES = [
    "cluster.devices=[]",
    "cluster={devices: [{name: a, cores: 2, nic_gbps: 0.001}, {name: b, nic_gbps: 0.002}], head: {device: a, "
    "overhead_ms: 2}, drafter: {device: a, level_ms: 2}, links: {latency_ms: 1}, stages: [{device: b, repeat: 2, "
    "cost: &c {kind: linear, constant_ms: 10, per_token_ms: 1}}, {device: a, cost: *c}]}",
]


@settings(deadline=None, max_examples=40)
@given(
    policy=st.sampled_from(POLICIES),
    network=st.sampled_from(NETWORKS),
    devices=st.sampled_from(DEVICES),
    wrong=st.lists(faults(stages=3, until_ms=1200), max_size=5),
    seed=st.integers(0, 99),
    rate=st.sampled_from([0, 0.5, 0.9]),
)
def test_whatever_goes_wrong_the_text_is_that_of_plain_decoding_and_the_log_replays(
    tmp_path_factory: pytest.TempPathFactory,
    policy: str,
    network: str,
    devices: str,
    wrong: list[dict[str, Any]],
    seed: int,
    rate: float,
) -> None:
    sets = [f"seed={seed}", f"acceptance.rate={rate}", "workload.max_new_tokens=24", devices, network]
    plain = simulate(build(*sets, "policy.name=autoregressive"))
    log = io.StringIO()
    scenario = build(*sets, f"policy={policy}", f"faults={wrong}")
    trace = simulate(scenario, log)
    assert trace.tokens == plain.tokens
    assert trace.complete
    assert all(run.outcome is not None for run in trace.runs), "every run ends once (I1)"
    for before, after in itertools.pairwise(trace.emissions):
        assert before.time_s <= after.time_s
        if after.latency is not None:
            assert sum_ns(after) == round((after.time_s - before.time_s) * 1e9)
    assert all(0 <= span.start_s < span.end_s for span in trace.spans)
    assert evaluate(scenario) == compute_metrics(trace)
    path = tmp_path_factory.getbasetemp() / "events.jsonl"
    path.write_text(log.getvalue())
    replayed = replay_log(path)
    assert (replayed.difference, replayed.released) == (None, True)


def sum_ns(emission: Any) -> int:
    latency = emission.latency
    return sum(getattr(latency, name) for name in type(latency).__slots__)


def gap_over(trace: Trace, moment_s: float) -> float:
    """The longest time without a token that contains ``moment_s``."""
    times = [0.0, *(emission.time_s for emission in trace.emissions)]
    return next(after - before for before, after in itertools.pairwise(times) if before <= moment_s < after)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_partition_of_two_seconds_delays_the_text_by_as_much_and_never_changes_it(policy: str) -> None:
    sets = [f"policy={policy}", "workload.max_new_tokens=80"]
    plain, cut = simulate(build(*sets)), simulate(build(*sets, PARTITION))
    assert cut.tokens == plain.tokens
    assert gap_over(cut, 1.0) > 1.9
    assert 1.5 < (cut.finished_s or 0) - (plain.finished_s or 0) < 2.2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_crash_with_restart_delays_the_text_by_both_and_never_changes_it(policy: str) -> None:
    sets = [f"policy={policy}", "workload.max_new_tokens=80"]
    plain, crashed = simulate(build(*sets)), simulate(build(*sets, CRASH))
    assert crashed.tokens == plain.tokens
    assert gap_over(crashed, 1.0) > 1.5
    assert 1.4 < (crashed.finished_s or 0) - (plain.finished_s or 0) < 2.2
    lost = [run for run in crashed.runs if run.returned_s is None]
    assert {(run.outcome, run.lost_s) for run in lost} == {(Outcome.DRAINED, 0.4)}, "300 + 100 ms"
    assert all(run.lost_s is None for run in crashed.runs if run not in lost)


def test_after_a_crash_the_whole_text_is_prefilled_again_the_generated_part_as_decode_rows() -> None:
    trace = simulate(build(CRASH, "policy.name=autoregressive"))
    again = [run for run in trace.runs if run.submitted_s > 1.899]
    known = 8 + sum(len(emission.tokens) for emission in trace.emissions if emission.time_s < 0.5)
    assert again[0].kind is RunKind.PREFILL
    assert (again[0].rows, again[1].rows) == (8, known - 8)
    assert again[1].kind is RunKind.CANONICAL
    assert again[0].submitted_s == pytest.approx(1.9), "300 + 100 + 1500 ms"


def test_a_dead_stage_computes_nothing_and_the_others_go_on_until_the_head_notices() -> None:
    trace = simulate(build(CRASH))
    assert not [span for span in trace.spans if span.stage == 1 and span.end_s > 0.3 and span.start_s < 1.9]
    assert [span for span in trace.spans if span.stage == 0 and 0.3 < span.start_s < 0.4]
    assert not [span for span in trace.spans if span.end_s > 0.4 and span.start_s < 1.9]


def test_what_has_left_the_stage_before_it_died_still_comes_home() -> None:
    slow = ["cluster.links.latency_ms=30", "policy.name=pipeinfer"]
    crashed = simulate(build(*slow, CRASH))
    assert any(run.returned_s is not None and 0.3 < run.returned_s < 0.4 for run in crashed.runs)


def test_what_comes_home_after_it_was_given_up_is_ignored() -> None:
    """Every stage is 30 ms from the next: at any time there are frames on the link home."""
    crash = "faults=[{kind: crash, stage: 0, start_ms: 400, detect_ms: 0, restart_ms: 10}]"
    trace = simulate(build("cluster.links.latency_ms=30", crash))
    assert trace.tokens == simulate(build()).tokens
    assert not [run for run in trace.runs if run.submitted_s < 0.4 < (run.returned_s or 0)]
    assert [run for run in trace.runs if run.lost_s == 0.4]


def test_a_stage_is_slow_by_its_factors_while_they_last() -> None:
    """10 + 1 ms per run otherwise; 0.2 to 0.8 s twice as long, 0.5 to 1.1 s thrice."""
    two = "{kind: slow-stage, stage: 1, start_ms: 200, duration_ms: 600, factor: 2}"
    three = "{kind: slow-stage, stage: 1, start_ms: 500, duration_ms: 600, factor: 3}"
    for both in (f"faults=[{two}, {three}]", f"faults=[{three}, {two}]"):
        trace = simulate(build("policy.name=autoregressive", both))
        spans = [span for span in trace.spans if span.stage == 1][1:]

        def lasts(start: float, end: float, spans: Any = spans) -> set[float]:
            return {round((span.end_s - span.start_s) * 1e3, 6) for span in spans if start <= span.start_s < end}

        assert lasts(0, 0.189) == {11}
        assert lasts(0.2, 0.478) == {22}
        assert lasts(0.5, 0.734) == {66}
        assert lasts(0.8, 1.067) == {33}
        assert lasts(1.1, 9) == {11}
        assert {span.stage for span in trace.spans if span.end_s - span.start_s > 0.0111} <= {0, 1, 2}


def test_a_run_that_dies_on_a_slow_stage_stops_between_two_layers() -> None:
    """4 layers a stage; a factor of 8 makes a layer of a one-row run take 22 ms."""
    slow = "faults=[{kind: slow-stage, stage: 1, start_ms: 0, duration_ms: 1000000, factor: 8}]"
    trace = simulate(build(slow, "acceptance.rate=0.3", "cluster.drafter.level_ms=1", "policy.micro_batch=1"))
    cut = [span for span in trace.spans if span.stage == 1 and span.void]
    assert cut
    for span in cut:
        layers = (span.end_s - span.start_s) / 22e-3
        assert layers == pytest.approx(round(layers), abs=1e-4)
    assert any(span.end_s - span.start_s < 87e-3 for span in cut)


CRASHES = {
    # stage, start, detect, restart of each; when the head can go on
    "of two stages, one within the other": ([(1, 300, 50, 900), (2, 500, 10, 100)], 1250),
    "of two stages, overlapping": ([(1, 300, 50, 400), (2, 500, 10, 900)], 1410),
    "of a stage that is down already": ([(1, 300, 50, 400), (1, 500, 10, 900)], 1410),
    "noticed only after the first one is over": ([(1, 300, 10, 200), (2, 500, 400, 300)], 1200),
    "of all stages at once": ([(0, 300, 50, 400), (1, 300, 50, 400), (2, 300, 50, 400)], 750),
}


@pytest.mark.parametrize("name", CRASHES)
@pytest.mark.parametrize("policy", POLICIES)
def test_crashes_may_overlap(name: str, policy: str) -> None:
    crashes, on_again_ms = CRASHES[name]
    given_faults = [
        f"{{kind: crash, stage: {stage}, start_ms: {start}, detect_ms: {detect}, restart_ms: {restart}}}"
        for stage, start, detect, restart in crashes
    ]
    sets = [f"policy={policy}", "cluster.head.overhead_ms=0.5"]
    plain = simulate(build(*sets))
    forwards, backwards = (
        simulate(build(*sets, f"faults=[{', '.join(order)}]")) for order in (given_faults, given_faults[::-1])
    )
    assert forwards == backwards
    assert forwards.tokens == plain.tokens
    late = [run.submitted_s * 1e3 for run in forwards.runs if run.submitted_s * 1e3 > 600]
    assert min(late) == pytest.approx(on_again_ms + 0.5)


@pytest.mark.parametrize("restart_ms", [0, 400])
def test_a_stage_that_dies_after_the_connection_but_before_the_head_takes_note_of_it_stays_dead(
    restart_ms: int,
) -> None:
    """The head needs 5 ms to take note of anything, and the other stages then compute."""
    died_ms = 352 + restart_ms
    first = f"{{kind: crash, stage: 1, start_ms: 300, detect_ms: 50, restart_ms: {restart_ms}}}"
    second = f"{{kind: crash, stage: 2, start_ms: {died_ms}, detect_ms: 100, restart_ms: 200}}"
    trace = simulate(build("cluster.head.overhead_ms=5", f"faults=[{first}, {second}]"))
    at_work = {span.stage for span in trace.spans if died_ms <= span.start_s * 1e3 < died_ms + 300}
    assert at_work == {0, 1}
    assert trace.tokens == simulate(build()).tokens


def test_a_crash_at_one_instant_loses_what_is_in_flight_all_the_same() -> None:
    trace = simulate(build("faults=[{kind: crash, stage: 1, start_ms: 300, detect_ms: 0, restart_ms: 0}]"))
    assert trace.tokens == simulate(build()).tokens
    assert [run.kind for run in trace.runs].count(RunKind.PREFILL) == 2


def test_a_crash_before_the_first_token_and_one_after_the_last_change_no_token() -> None:
    plain = simulate(build())
    for start in (0, 5, round((plain.finished_s or 0) * 1e3), 10**6):
        crash = f"faults=[{{kind: crash, stage: 2, start_ms: {start}, detect_ms: 20, restart_ms: 50}}]"
        trace = simulate(build(crash))
        assert trace.tokens == plain.tokens
        assert trace.drained_s is not None


def test_faults_that_are_over_before_anything_happens_change_nothing_at_all() -> None:
    """The first frame leaves the first stage after 18 ms."""
    over = [
        "{kind: latency, start_ms: 1, duration_ms: 5, extra_ms: 20, link: 1}",
        "{kind: partition, start_ms: 1, duration_ms: 5, link: 1}",
        "{kind: jitter, start_ms: 1, duration_ms: 5, extra_ms: 20, link: 1}",
        "{kind: slow-stage, start_ms: 1, duration_ms: 5, factor: 9, stage: 1}",
    ]
    assert simulate(build(f"faults=[{', '.join(over)}]")) == simulate(build())


def test_two_latency_steps_add_up_in_the_time_of_a_token() -> None:
    """4 links to pass."""
    steps = [f"{{kind: latency, start_ms: {at}, duration_ms: 600, extra_ms: {ms}}}" for at, ms in ((300, 5), (600, 7))]
    trace = simulate(build("policy.name=autoregressive", f"faults=[{', '.join(steps)}]"))
    times = [emission.time_s for emission in trace.emissions]
    gaps = {round((after - before) * 1e3) for before, after in itertools.pairwise(times) if after < 0.3}
    both = {round((after - before) * 1e3) for before, after in itertools.pairwise(times) if 0.6 < before < after < 0.9}
    one = {round((after - before) * 1e3) for before, after in itertools.pairwise(times) if 0.9 < before < after < 1.2}
    assert (gaps, both, one) == ({35}, {35 + 4 * 12}, {35 + 4 * 7})


def test_a_simulated_crash_is_in_the_log_and_the_log_replays(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with path.open("w") as stream:
        trace = simulate(build(CRASH), stream)
    text = path.read_text()
    assert text.count('"type":"StageLost","stage":1,"reason":"crashed at 300.0 ms"') == 1
    assert text.count('"type":"PipelineRestored"') == 1
    replayed = replay_log(path)
    assert (replayed.difference, replayed.released) == (None, True)
    assert replayed.events == len(text.splitlines()) - 1
    assert trace.complete
