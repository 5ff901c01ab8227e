"""The exported timeline, read back and held against the format and the trace."""

import io
import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from scenario_builder import build

from pipesim.perfetto import write_perfetto
from pipesim.simulation.pipeline import simulate
from pipesim.trace import RunRecord, Trace

Event = dict[str, Any]

KEYS = {
    "M": {"args"},
    "X": {"cat", "dur", "args"},
    "i": {"cat", "s", "args"},
    "b": {"cat", "id", "args"},
    "e": {"cat", "id"},
    "s": {"cat", "id", "bp"},
    "t": {"cat", "id", "bp"},
    "f": {"cat", "id", "bp"},
    "C": {"args"},
}
"""What each phase of the format needs beside ph, name, ts, pid and tid."""

TRACES = {
    "pipeinfer": ["policy={name: pipeinfer, branches: 2, partitions: 8}"],
    "pipeinfer, redundant runs": ["policy={name: pipeinfer, always_canonical: true, cancellation: false}"],
    "speculative": ["policy={name: speculative, max_nodes: 4}"],
    "autoregressive": ["policy.name=autoregressive"],
    "crashes and a partition": [
        "faults=[{kind: crash, stage: 1, start_ms: 200, detect_ms: 50, restart_ms: 90}, {kind: partition, link: 2, "
        "start_ms: 100, duration_ms: 50}, {kind: crash, stage: 0, start_ms: 210, detect_ms: 9, restart_ms: 9}]"
    ],
    "one shared core": ["cluster.devices=[{name: box}]", "cluster.stages.0.device=box", "cluster.drafter.device=box"],
}


@pytest.fixture(params=TRACES)
def trace(request: pytest.FixtureRequest) -> Trace:
    return simulate(build(*TRACES[request.param]))


def exported(trace: Trace) -> list[Event]:
    stream = io.StringIO()
    write_perfetto(trace, stream)
    written = json.loads(stream.getvalue())
    assert written.keys() == {"displayTimeUnit", "traceEvents"}
    return written["traceEvents"]  # type: ignore[no-any-return]


def of(events: list[Event], phases: str, cat: str | None = None) -> list[Event]:
    return [event for event in events if event["ph"] in phases and cat in (None, event.get("cat"))]


def landed_s(run: RunRecord) -> float:
    """When it came home, or was given up: never both."""
    (time,) = {run.returned_s, run.lost_s} - {None}
    assert time is not None
    return time


def ends(event: Event) -> tuple[int, int]:
    """Start and end of a slice in nanoseconds."""
    start = round(event["ts"] * 1e3)
    return start, start + round(event["dur"] * 1e3)


def test_every_event_has_what_its_phase_needs(trace: Trace) -> None:
    for event in exported(trace):
        common = {"ph", "name", "ts", "pid", "tid"}
        assert KEYS[event["ph"]] == event.keys() - common - {"cname"}, event
        assert common <= event.keys()
        assert isinstance(event["name"], str)
        assert isinstance(event["ts"], int | float)
        assert event["ts"] >= 0
        assert event["pid"] == 1
        assert 0 <= event["tid"] <= len(trace.stages) + 1


def test_events_stand_in_order_of_time_behind_the_names_of_the_tracks(trace: Trace) -> None:
    events = exported(trace)
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(tracks.items()) == list(enumerate(["head", *trace.stages, "drafter"]))
    names = len(of(events, "M"))
    assert all(event["ph"] != "M" for event in events[names:])
    assert all(before["ts"] <= after["ts"] for before, after in pairwise(events[names:]))


def test_slices_are_the_spans_and_do_not_overlap_on_their_track(trace: Trace) -> None:
    events = exported(trace)
    slices = of(events, "X")
    assert len(of(events, "X", "stage")) == len(trace.spans)
    assert len(of(events, "X", "draft")) == len(trace.drafts)
    told = {(one["tid"] - 1, one["args"]["run"], *ends(one), one["args"]["void"]) for one in of(events, "X", "stage")}
    assert told == {
        (one.stage, one.run_id, round(one.start_s * 1e9), round(one.end_s * 1e9), one.void) for one in trace.spans
    }
    tracks = defaultdict(list)
    for one in slices:
        tracks[one["tid"]].append(ends(one))
    assert set(tracks) <= set(range(1, len(trace.stages) + 2))
    for extents in tracks.values():
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(extents)))


def test_arrows_lead_from_slice_to_slice_of_their_run_in_order(trace: Trace) -> None:
    events = exported(trace)
    slices = {(one["args"]["run"], one["tid"]): ends(one) for one in of(events, "X", "stage")}
    flows = defaultdict(list)
    for event in of(events, "stf", "flow"):
        flows[event["id"]].append(event)
    stages = defaultdict(set)
    for run_id, track in slices:
        stages[run_id].add(track)
    assert {run_id: {step["tid"] for step in steps} for run_id, steps in flows.items()} == {
        run_id: tracks for run_id, tracks in stages.items() if len(tracks) > 1
    }
    for run_id, steps in flows.items():
        assert "".join(step["ph"] for step in steps) == "s" + "t" * (len(steps) - 2) + "f"
        assert all(before["tid"] < after["tid"] for before, after in pairwise(steps))
        assert all(before["ts"] < after["ts"] for before, after in pairwise(steps))
        for step in steps:
            start, end = slices[run_id, step["tid"]]
            assert start <= step["ts"] * 1e3 <= end, "an arrow binds to the slice that encloses it"
            assert step["bp"] == "e"


def test_counters_are_never_negative_and_end_at_zero(trace: Trace) -> None:
    events = exported(trace)
    counters = defaultdict(list)
    for event in of(events, "C"):
        counters[event["name"]].append((event["ts"], event["args"]["runs"]))
    assert counters.keys() >= {"runs in flight"}
    assert counters.keys() <= {"runs in flight", *(f"waiting for {name}" for name in trace.stages)}
    for values in counters.values():
        assert min(value for _, value in values) == 0
        assert values[-1][1] == 0
        assert all(before[0] < after[0] for before, after in pairwise(values))
    most = max(value for _, value in counters["runs in flight"])
    times = sorted(run.submitted_s for run in trace.runs)
    landed = [landed_s(run) for run in trace.runs]
    assert most == max(sum(at <= now for at in times) - sum(at <= now for at in landed) for now in times)


def test_a_run_waits_for_a_stage_on_the_link_and_in_its_queue() -> None:
    """Two prefill runs of 14 ms at each stage: the second one waits for the first at every stage but by the links."""
    sets = ["policy.name=autoregressive", "cluster.prefill_chunk=4", "cluster.links={latency_ms: 1}"]
    events = exported(simulate(build(*sets, "workload.max_new_tokens=1")))
    waiting = [(one["ts"], one["args"]["runs"]) for one in of(events, "C") if one["name"] == "waiting for stage 0"]
    assert waiting == [(0, 2), (1000, 1), (15000, 0)]
    second = [(one["ts"], one["args"]["runs"]) for one in of(events, "C") if one["name"] == "waiting for stage 1"]
    assert second == [(15000, 1), (16000, 0), (29000, 1), (30000, 0)]


def test_flights_and_emissions_are_the_traces(trace: Trace) -> None:
    events = exported(trace)
    begun = {event["id"]: event["ts"] for event in of(events, "b", "run")}
    ended = {event["id"]: event["ts"] for event in of(events, "e", "run")}
    assert begun == {run.run_id: pytest.approx(run.submitted_s * 1e6, abs=1e-3) for run in trace.runs}
    assert ended == {run.run_id: pytest.approx(landed_s(run) * 1e6, abs=1e-3) for run in trace.runs}
    shown = [event["args"]["tokens"] for event in of(events, "i", "emit")]
    assert tuple(token for tokens in shown for token in tokens) == trace.tokens


def test_fates_are_told_apart_by_name_and_colour() -> None:
    trace = simulate(build("policy={name: pipeinfer, always_canonical: true, partitions: 4}"))
    slices = of(exported(trace), "X", "stage")
    colours = {one["name"].split()[0]: one["cname"] for one in slices}
    assert colours.keys() >= {"prefill", "canonical", "accepted", "redundant", "cancelled"}
    assert len(set(colours.values())) == len(colours)
    assert any(one["name"].endswith(", cut short") and one["args"]["void"] for one in slices)


def test_a_run_that_never_came_home_flies_to_the_end_of_the_trace() -> None:
    whole = simulate(build())
    lost = replace(whole.runs[5], returned_s=None, outcome=None)
    broken = replace(whole, runs=(*whole.runs[:5], lost, *whole.runs[6:]))
    events = exported(broken)
    (end,) = (event["ts"] for event in of(events, "e", "run") if event["id"] == lost.run_id)
    assert end == max(event["ts"] for event in events)
    assert [one["args"]["runs"] for one in of(events, "C") if one["name"] == "runs in flight"][-1] == 0


def test_its_size_is_a_few_hundred_bytes_for_each_span() -> None:
    sizes = []
    for tokens in (200, 400):
        trace = simulate(build(f"workload.max_new_tokens={tokens}"))
        stream = io.StringIO()
        write_perfetto(trace, stream)
        sizes.append(len(stream.getvalue()) / len(trace.spans))
    assert sizes[0] < 800
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
