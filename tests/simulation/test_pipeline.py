import io
import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_builder import build

from pipesim.errors import InvariantError
from pipesim.event_log import decode
from pipesim.scheduling.commands import CancelRuns, Command, Outcome, RequestDraft, SubmitRun
from pipesim.scheduling.runs import Run
from pipesim.simulation.acceptance import make_truth
from pipesim.simulation.devices import Clock, Device
from pipesim.simulation.drafter import DrafterServer, DraftJob
from pipesim.simulation.links import HEADER_BYTES, TOKEN_BYTES, metadata_bytes
from pipesim.simulation.pipeline import simulate
from pipesim.simulation.sharing import FairDevice
from pipesim.simulation.stage import StageServer
from pipesim.trace import Trace

SHARED = (
    "cluster.devices=[{name: laptop, cores: 2}]",
    "cluster.stages.0.device=laptop",
    "cluster.head={device: laptop, overhead_ms: 0.5}",
    "cluster.drafter.device=laptop",
)
policies = st.sampled_from(
    [
        "{name: speculative, max_nodes: 5, branches: 2, split: 0.05}",
        "{name: pipeinfer}",
        "{name: pipeinfer, branches: 3, p_split: 0.05, micro_batch: 6}",
        "{name: pipeinfer, always_canonical: true, cancellation: false}",
        "{name: pipeinfer, asynchronous: false, p_accept: 0.6, p_decay: 0.1}",
        "{name: pipeinfer, continuous: false}",
        "{name: pipeinfer, multibuffering: false, p_recovery: 0.05}",
    ]
)


@settings(deadline=None, max_examples=60)
@given(
    policy=policies,
    shared=st.booleans(),
    seed=st.integers(0, 1000),
    rate=st.sampled_from([0, 0.5, 0.9, 1]),
    latency_ms=st.sampled_from([0, 0.3, 40]),
    tokens=st.integers(1, 50),
    stages=st.integers(1, 5),
)
def test_every_policy_gives_the_text_of_plain_decoding(
    policy: str, shared: bool, seed: int, rate: float, latency_ms: float, tokens: int, stages: int
) -> None:
    sets = [
        f"seed={seed}",
        f"acceptance.rate={rate}",
        f"cluster.links.latency_ms={latency_ms}",
        f"workload.max_new_tokens={tokens}",
        f"cluster.stages.0.repeat={stages}",
        *(SHARED if shared else ()),
    ]
    plain = simulate(build(*sets, "policy.name=autoregressive"))
    trace = simulate(build(*sets, f"policy={policy}"))
    assert trace.tokens == plain.tokens
    assert len(trace.tokens) == tokens
    assert trace.complete
    check_books(trace)


def check_books(trace: Trace) -> None:
    """What holds of every trace: each run ended, stages do one thing at a time, emissions are gapless."""
    assert all(run.outcome is not None and run.returned_s is not None for run in trace.runs)
    for stage in range(len(trace.stages)):
        spans = [span for span in trace.spans if span.stage == stage]
        for before, after in itertools.pairwise(spans):
            assert before.end_s <= after.start_s
            assert before.run_id < after.run_id, "streams are FIFO (I2)"
    for before, after in zip(trace.drafts, trace.drafts[1:], strict=False):
        assert before.end_s <= after.start_s
    position = trace.prompt_tokens
    for emission in trace.emissions:
        assert emission.position == position
        position += len(emission.tokens)
    cancelled = {run.run_id for run in trace.runs if run.outcome in (Outcome.CANCELLED, Outcome.DRAINED)}
    assert {span.run_id for span in trace.spans if span.void} <= cancelled


def serialised(*sets: str) -> tuple[str, Trace]:
    log = io.StringIO()
    trace = simulate(build(*sets), log)
    return log.getvalue(), trace


def test_same_seed_same_bytes_other_seed_other_bytes() -> None:
    log, trace = serialised("seed=7")
    assert (log, trace) == serialised("seed=7")
    other_log, other = serialised("seed=8")
    assert other_log != log
    assert other.tokens != trace.tokens


def test_cancelled_runs_cost_less_than_runs_that_are_computed_to_the_end() -> None:
    with_it, without = (simulate(build(f"policy.cancellation={on}", "acceptance.rate=0.3")) for on in ("true", "false"))
    assert any(span.void for span in with_it.spans)
    assert not any(span.void and span.end_s < (without.finished_s or 0) for span in without.spans)
    assert (with_it.finished_s or 0) < (without.finished_s or 0)


def test_control_messages_travel_beside_the_data_and_take_their_own_time() -> None:
    sets = ["acceptance.rate=0.3", "cluster.links.latency_ms=5"]
    fast = simulate(build(*sets, "cluster.links.control={latency_ms: 0}"))
    slow = simulate(build(*sets, "cluster.links.control={latency_ms: 200}"))

    def wasted(trace: Trace) -> float:
        return sum(span.end_s - span.start_s for span in trace.spans if span.void) / (trace.finished_s or 1)

    assert sum(span.void for span in fast.spans) > sum(span.void for span in slow.spans)
    assert wasted(fast) > 0


def test_a_newer_request_abandons_the_older_at_the_end_of_a_level() -> None:
    trace = simulate(build("cluster.drafter.level_ms=7", "acceptance.rate=0.2"))
    abandoned = [draft for draft in trace.drafts if not draft.tokens]
    assert abandoned
    for draft in abandoned:
        levels = (draft.end_s - draft.start_s) / 7e-3
        assert levels == pytest.approx(round(levels), abs=1e-6)
        assert levels < 4


def test_parts_on_one_device_wait_for_its_cores() -> None:
    shared = simulate(build(*SHARED))
    alone = simulate(build("cluster.head.overhead_ms=0.5"))
    assert (shared.finished_s or 0) > 1.2 * (alone.finished_s or 0)
    edges = sorted([(span.start_s, 1) for span in shared.spans] + [(span.end_s, -1) for span in shared.spans])
    busy, most = 0, 0
    for _, change in edges:
        busy += change
        most = max(most, busy)
    assert most == 2, "two cores"


def test_a_standstill_is_an_error_that_says_who_waits_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageServer, "_pass_on", lambda self, frame, void: None)  # a stage that swallows frames
    with pytest.raises(InvariantError, match="standstill") as caught:
        simulate(build())
    message = str(caught.value)
    assert "head: waits for runs [0]" in message
    assert "stage 2: idle" in message
    assert "drafter: idle" in message


def test_events_without_end_at_one_instant_are_a_standstill() -> None:
    """Empty drafts that cost no time, with a bar that falls by next to nothing."""
    sets = ["cluster.drafter.level_ms=0", "cluster.links={}", "acceptance.confidence_spread=0"]
    with pytest.raises(
        InvariantError, match=r"standstill at [0-9.]+ s, where \d+ events took no time \(I7\)\n.*head: waits"
    ):
        simulate(build(*sets, "policy={name: pipeinfer, p_accept: 0.9, p_decay: 1e-9}"))


def logged(*sets: str) -> tuple[Trace, list[Any], dict[int, Run]]:
    """A trace, the commands other than SubmitRun, and the runs."""
    log, trace = serialised(*sets)
    lines = [json.loads(line) for line in log.splitlines()[1:]]
    commands = [decode(Command, command) for line in lines for command in line["commands"]]
    runs = {command.run.run_id: command.run for command in commands if isinstance(command, SubmitRun)}
    return trace, commands, runs


BUSY = ("acceptance.rate=0.4", "policy.branches=2", "policy.p_split=0.05", "workload.max_new_tokens=80")


def test_a_request_carries_the_text_that_the_drafter_has_not_seen_and_the_path() -> None:
    trace, commands, _ = logged(*BUSY)
    requests = [command for command in commands if isinstance(command, RequestDraft)]
    tokens = max(request.frontier for request in requests) + sum(len(request.path) for request in requests)
    assert any(request.path for request in requests)
    assert trace.link_bytes["head to drafter"] == HEADER_BYTES * len(requests) + TOKEN_BYTES * tokens


def test_an_answer_carries_token_parent_and_confidence_of_each_node() -> None:
    trace, *_ = logged(*BUSY)
    answers = [draft.tokens for draft in trace.drafts if draft.tokens]
    abandoned = [draft for draft in trace.drafts if not draft.tokens]
    assert abandoned, "they send nothing"
    assert trace.link_bytes["drafter to head"] == sum(HEADER_BYTES + 3 * TOKEN_BYTES * tokens for tokens in answers)


def test_a_cancellation_carries_its_run_ids_to_every_stage() -> None:
    trace, commands, _ = logged(*BUSY)
    sizes = [HEADER_BYTES + TOKEN_BYTES * len(one.run_ids) for one in commands if isinstance(one, CancelRuns)]
    assert len(set(sizes)) > 1
    for stage in range(3):
        assert trace.link_bytes[f"head to stage {stage} (control)"] == sum(sizes)


def test_void_frames_leave_their_activations_behind() -> None:
    trace, _, runs = logged(*BUSY)
    for stage, link in ((0, "stage 0 to stage 1"), (1, "stage 1 to stage 2")):
        live = {span.run_id for span in trace.spans if span.stage == stage and not span.void}
        assert 0 < len(live) < len(runs)
        rows = sum(runs[run_id].rows for run_id in live)
        assert trace.link_bytes[link] == sum(map(metadata_bytes, runs.values())) + rows * 64 * 4


def test_the_drafter_reads_the_prompt_once() -> None:
    trace = simulate(build("cluster.drafter.prefill_per_token_ms=1", "policy.name=speculative"))
    first, *others = [draft.end_s - draft.start_s for draft in trace.drafts]
    assert first == pytest.approx(8e-3 + 4 * 2e-3)
    assert others[:-1] == pytest.approx([4 * 2e-3] * (len(others) - 1))


def test_a_drafter_that_waited_for_a_core_drafts_for_the_newest_request() -> None:
    clock, device, spans, answers = Clock(), Device("d", 1), [], []
    scenario = build()
    recorder: Any = SimpleNamespace(draft_span=lambda *span: spans.append(span))
    drafter = DrafterServer(
        clock, scenario.drafter(), device, make_truth(scenario), recorder, lambda draft: answers.append(draft)
    )
    device.acquire(lambda: None)  # somebody else's work
    for at, request_id in ((0, 4), (1, 5)):
        request = RequestDraft(request_id, 8, (), 4, 1, 0.0, 1.0)
        clock.at(at, drafter.arrive, DraftJob(request, 0))
    clock.at(10, lambda _: device.release())
    clock.run_calls()
    assert [span[0] for span in spans] == [5]
    assert [answer.request_id for answer in answers] == [5]


@pytest.mark.parametrize("fair", [False, True])
def test_a_draft_that_is_overtaken_twice_still_reads_its_request_to_the_end(fair: bool) -> None:
    clock, spans = Clock(), list[tuple[int, int, int, int]]()
    device = FairDevice(clock, "d", 1, 0.0) if fair else Device("d", 1)
    scenario = build("cluster.drafter.request_ms=10")
    recorder: Any = SimpleNamespace(draft_span=lambda *span: spans.append(span))
    drafter = DrafterServer(clock, scenario.drafter(), device, make_truth(scenario), recorder, lambda _: None)
    for ms, request_id in ((0, 1), (2, 2), (3, 3)):
        clock.at(ms * 10**6, drafter.arrive, DraftJob(RequestDraft(request_id, 8, (), 4, 1, 0.0, 1.0), 0))
    clock.run_calls()
    assert [(number, start // 10**6, end // 10**6) for number, start, end, _ in spans] == [(1, 0, 10), (3, 10, 28)]


def test_bytes_are_counted_for_every_link() -> None:
    trace = simulate(build())
    assert set(trace.link_bytes) == {
        "head to stage 0",
        "stage 0 to stage 1",
        "stage 1 to stage 2",
        "stage 2 to head",
        *(f"head to stage {i} (control)" for i in range(3)),
        "head to drafter",
        "drafter to head",
    }
    assert all(trace.link_bytes.values())
    assert trace.link_bytes["stage 0 to stage 1"] > trace.link_bytes["head to stage 0"], "activations outweigh tokens"
