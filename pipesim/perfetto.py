"""Writes a trace in Chrome's trace event format, which ui.perfetto.dev and chrome://tracing open.

One track per stage with a slice per run, one for the drafter, one for the head with the tokens it showed; the flight
of each run from submission to return stands above them as an asynchronous slice.
"""

import json
from collections.abc import Iterator
from typing import Any, TextIO

from pipesim.trace import Trace

_PROCESS = 1
_HEAD = 0


def write_perfetto(trace: Trace, stream: TextIO) -> None:
    """Writes ``trace`` as one JSON object; times become microseconds."""
    json.dump({"traceEvents": list(_events(trace)), "displayTimeUnit": "ms"}, stream)


def _events(trace: Trace) -> Iterator[dict[str, Any]]:
    drafter = len(trace.stages) + 1
    yield _event("M", "process_name", 0.0, _HEAD, args={"name": f"pipesim {trace.policy}, seed {trace.seed}"})
    for track, name in enumerate(["head", *trace.stages, "drafter"]):
        yield _event("M", "thread_name", 0.0, track, args={"name": name})
        yield _event("M", "thread_sort_index", 0.0, track, args={"sort_index": track})
    runs = {run.run_id: run for run in trace.runs}
    for span in trace.spans:
        run = runs[span.run_id]
        facts = {"run": span.run_id, "rows": run.rows, "outcome": run.outcome, "void": span.void}
        yield _event(
            "X", f"{run.kind} {span.run_id}", span.start_s, span.stage + 1, span.end_s, cat="stage", args=facts
        )
    for draft in trace.drafts:
        facts = {"request": draft.request_id, "tokens": draft.tokens}
        yield _event("X", f"draft {draft.request_id}", draft.start_s, drafter, draft.end_s, cat="draft", args=facts)
    for emission in trace.emissions:
        shown = {"position": emission.position, "tokens": list(emission.tokens)}
        yield _event("i", f"{len(emission.tokens)} tokens", emission.time_s, _HEAD, cat="emit", s="t", args=shown)
    for run in trace.runs:
        if run.returned_s is not None:
            name, facts = f"{run.kind} {run.run_id}", {"rows": run.rows, "useful_rows": run.useful_rows}
            yield _event("b", name, run.submitted_s, _HEAD, cat="run", id=run.run_id, args=facts)
            yield _event("e", name, run.returned_s, _HEAD, cat="run", id=run.run_id)


def _event(
    phase: str, name: str, start_s: float, track: int, end_s: float | None = None, **more: Any
) -> dict[str, Any]:
    event = {"ph": phase, "name": name, "ts": start_s * 1e6, "pid": _PROCESS, "tid": track, **more}
    if end_s is not None:
        event["dur"] = (end_s - start_s) * 1e6
    return event
