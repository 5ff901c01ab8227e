import io
import json

from scenario_builder import build

from pipesim.perfetto import write_perfetto
from pipesim.simulation.pipeline import simulate


def test_stages_are_tracks_and_runs_are_slices() -> None:
    trace = simulate(build())
    stream = io.StringIO()
    write_perfetto(trace, stream)
    events = json.loads(stream.getvalue())["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert tracks == {0: "head", 1: "stage 0", 2: "stage 1", 3: "stage 2", 4: "drafter"}
    slices = [event for event in events if event["ph"] == "X" and event["cat"] == "stage"]
    assert len(slices) == len(trace.spans)
    first = trace.spans[0]
    assert (slices[0]["tid"], slices[0]["ts"], slices[0]["name"]) == (1, first.start_s * 1e6, "prefill 0")
    assert slices[0]["dur"] == (first.end_s - first.start_s) * 1e6
    shown = [event["args"]["tokens"] for event in events if event["ph"] == "i"]
    assert tuple(token for tokens in shown for token in tokens) == trace.tokens
    begun = [event["id"] for event in events if event["ph"] == "b"]
    ended = [event["id"] for event in events if event["ph"] == "e"]
    assert begun == ended == [run.run_id for run in trace.runs]
