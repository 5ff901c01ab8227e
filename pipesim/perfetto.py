"""Writes a trace in Chrome's trace event format, which ui.perfetto.dev and chrome://tracing open.

One track per stage with a slice for each run, named by its fate (Perfetto colours by name); arrows follow a run along
its slices. One track for the drafter, one for the head with the tokens it showed; above them, the flight of each run
from submission to return as an asynchronous slice. Counters: runs in flight, and runs waiting for each stage.

Format: "Trace Event Format", Google 2016. Times are microseconds with three decimals, so that nanoseconds stay exact.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, TextIO

from pipesim.trace import Fate, RunRecord, StageSpan, Trace

_PROCESS = 1
_HEAD = 0
_COLOURS: Mapping[Fate, str] = {
    Fate.PREFILL: "grey",
    Fate.CANONICAL: "thread_state_running",
    Fate.ACCEPTED: "good",
    Fate.REDUNDANT: "rail_load",
    Fate.REJECTED: "terrible",
    Fate.CANCELLED: "bad",
    Fate.DRAINED: "generic_work",
}
"""chrome://tracing's own colour names."""


def write_perfetto(trace: Trace, stream: TextIO) -> None:
    """Writes ``trace`` as one JSON object, an event a line in order of time."""
    stream.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
    events = sorted((*_slices(trace), *_flights(trace), *_counters(trace)), key=lambda event: event["ts"])
    for index, event in enumerate((*_names(trace), *events)):
        stream.write((",\n" if index else "") + json.dumps(event, separators=(",", ":")))
    stream.write("\n]}\n")


def _names(trace: Trace) -> Iterator[dict[str, Any]]:
    yield _event("M", "process_name", 0.0, _HEAD, args={"name": f"pipesim {trace.policy}, seed {trace.seed}"})
    for track, name in enumerate(["head", *trace.stages, "drafter"]):
        yield _event("M", "thread_name", 0.0, track, args={"name": name})
        yield _event("M", "thread_sort_index", 0.0, track, args={"sort_index": track})


def _slices(trace: Trace) -> Iterator[dict[str, Any]]:
    """What stages and drafter did, and what the head showed."""
    runs = {run.run_id: run for run in trace.runs}
    for span in trace.spans:
        run = runs[span.run_id]
        facts = {"run": span.run_id, "kind": run.kind, "rows": run.rows, "outcome": run.outcome, "void": span.void}
        name = f"{run.fate} {run.run_id}" + (", cut short" if span.void else "")
        yield _slice(name, span.start_s, span.end_s, span.stage + 1, cat="stage", cname=_COLOURS[run.fate], args=facts)
    for draft in trace.drafts:
        facts = {"request": draft.request_id, "tokens": draft.tokens}
        name = f"draft {draft.request_id}" if draft.tokens else f"draft in vain {draft.request_id}"
        yield _slice(name, draft.start_s, draft.end_s, len(trace.stages) + 1, cat="draft", args=facts)
    for emission in trace.emissions:
        shown = {"position": emission.position, "tokens": list(emission.tokens)}
        yield _event("i", f"{len(emission.tokens)} tokens", emission.time_s, _HEAD, cat="emit", s="t", args=shown)


def _flights(trace: Trace) -> Iterator[dict[str, Any]]:
    """Each run from submission to return, and the arrows along its slices, from middle to middle."""
    end = _end(trace)
    for run in trace.runs:
        name, facts = f"{run.kind} {run.run_id}", {"rows": run.rows, "useful_rows": run.useful_rows}
        yield _event("b", name, run.submitted_s, _HEAD, cat="run", id=run.run_id, args=facts)
        yield _event("e", name, _landed(run, end), _HEAD, cat="run", id=run.run_id)
    for run_id, spans in _by_run(trace).items():
        for index, span in enumerate(spans if len(spans) > 1 else ()):
            phase = "s" if index == 0 else "f" if index == len(spans) - 1 else "t"
            middle = (span.start_s + span.end_s) / 2
            yield _event(phase, "run", middle, span.stage + 1, cat="flow", id=run_id, bp="e")


def _counters(trace: Trace) -> Iterator[dict[str, Any]]:
    """Runs in flight, and runs waiting for each stage: on the link to it or in its queue.

    A run waits from the end of its slice before, or from its submission. One that dies while it waits leaves no slice
    behind that would tell when: it is not counted.
    """
    end = _end(trace)
    flights = ((run.submitted_s, _landed(run, end)) for run in trace.runs)
    yield from _counter("runs in flight", flights)
    waits: list[list[tuple[float, float]]] = [[] for _ in trace.stages]
    submitted = {run.run_id: run.submitted_s for run in trace.runs}
    for run_id, spans in _by_run(trace).items():
        waits[spans[0].stage].append((submitted[run_id], spans[0].start_s))
        for before, after in pairwise(spans):
            waits[after.stage].append((before.end_s, after.start_s))
    for name, stretches in zip(trace.stages, waits, strict=True):
        yield from _counter(f"waiting for {name}", stretches)


def _counter(name: str, stretches: Iterable[tuple[float, float]]) -> Iterator[dict[str, Any]]:
    """How many stretches there are at a time. In real traces clocks differ by a little: none ends before it begins."""
    changes: dict[float, int] = {}
    for start, stop in stretches:
        if start < stop:
            changes[start] = changes.get(start, 0) + 1
            changes[stop] = changes.get(stop, 0) - 1
    value = 0
    for time, change in sorted(changes.items()):
        if change:
            value += change
            yield _event("C", name, time, _HEAD, args={"runs": value})


def _by_run(trace: Trace) -> dict[int, list[StageSpan]]:
    """Each run's spans in the order of stages; a run that a broken pipeline repeats has a new number."""
    found: dict[int, list[StageSpan]] = {}
    for span in sorted(trace.spans, key=lambda span: span.stage):
        found.setdefault(span.run_id, []).append(span)
    return found


def _landed(run: RunRecord, end: float) -> float:
    """When a run's flight was over: it returned, or was given up, or neither until the ``end``."""
    return next((time for time in (run.returned_s, run.lost_s) if time is not None), end)


def _end(trace: Trace) -> float:
    """The last moment that the trace knows of."""
    times = [span.end_s for span in trace.spans] + [_landed(run, run.submitted_s) for run in trace.runs]
    return max(times, default=0.0)


def _slice(name: str, start_s: float, end_s: float, track: int, **more: Any) -> dict[str, Any]:
    start, end = round(start_s * 1e9), round(end_s * 1e9)
    return {**_event("X", name, start_s, track), "dur": (end - start) / 1e3, **more}


def _event(phase: str, name: str, time_s: float, track: int, **more: Any) -> dict[str, Any]:
    return {"ph": phase, "name": name, "ts": round(time_s * 1e9) / 1e3, "pid": _PROCESS, "tid": track, **more}
