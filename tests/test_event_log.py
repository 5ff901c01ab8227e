import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_builder import build

from pipesim.errors import BadInputError
from pipesim.event_log import EventLogWriter, decode, encode, replay, replay_log
from pipesim.scheduling.commands import CancelRuns, Command, EndRun, FinishGeneration, FinishReason, Outcome, SubmitRun
from pipesim.scheduling.events import (
    DraftReturned,
    Event,
    GenerationAborted,
    GenerationStarted,
    PipelineRestored,
    RunReturned,
    StageLost,
    StopStringMet,
)
from pipesim.scheduling.runs import END, Run, RunKind, SequenceCopy, SequenceRemove
from pipesim.scheduling.tree import DraftTree
from pipesim.simulation.pipeline import simulate

sets = st.integers(1, 2**9000)
runs = st.builds(
    lambda kind, row, operations: Run(7, 1, kind, (5, 6), (1, 2), row, 1, tuple(operations)),
    st.sampled_from(RunKind),
    st.tuples(sets, sets),
    st.lists(
        st.one_of(
            st.builds(SequenceCopy, st.integers(0, 9), sets, st.just(3), st.just(END)),
            st.builds(SequenceRemove, sets, st.just(0), st.just(4)),
        ),
        max_size=3,
    ),
)
events = st.one_of(
    st.builds(RunReturned, st.integers(0, 2**70), st.none() | st.lists(st.integers(0, 2**40)).map(tuple)),
    st.just(DraftReturned(3, DraftTree((4, 5), (-1, 0), (0.25, 0.1)))),
    st.builds(StageLost, st.integers(0, 9), st.text()),
    st.just(PipelineRestored()),
    st.builds(GenerationAborted, st.text()),
    st.builds(StopStringMet, st.integers(1, 9)),
)
commands = st.one_of(
    runs.map(SubmitRun),
    st.builds(EndRun, st.integers(0, 9), st.sampled_from(Outcome), st.integers(0, 9)),
    st.builds(FinishGeneration, st.sampled_from(FinishReason)),
    st.builds(CancelRuns, st.lists(st.integers(0, 9)).map(tuple)),
)


@settings(max_examples=200)
@given(events, st.lists(commands))
def test_events_and_commands_survive_json(event: Event, given_commands: list[Command]) -> None:
    text = json.dumps([encode(event), encode(tuple(given_commands))])
    event_json, commands_json = json.loads(text)
    assert decode(Event, event_json) == event
    assert decode(tuple[Command, ...], commands_json) == tuple(given_commands)
    for number in _numbers([event_json, commands_json]):
        assert abs(number) <= 2**53, "exact in any JSON reader"


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in _numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    with path.open("w") as stream:
        simulate(build("policy.branches=3", "policy.p_split=0.05"), stream)
    return path


@pytest.mark.parametrize(
    "sets", [["policy.name=autoregressive"], ["policy.name=speculative"], ["cluster.kv_cells=60"], ["seed=9"]]
)
def test_a_fresh_scheduler_gives_the_logged_commands(tmp_path: Path, sets: list[str]) -> None:
    path = tmp_path / "events.jsonl"
    with path.open("w") as stream:
        trace = simulate(build(*sets), stream)
    assert replay(path) is None
    lines = path.read_text().splitlines()
    header = json.loads(lines[0])
    assert (header["format"], header["version"], header["policy"]["name"]) == ("pipesim-events", 1, trace.policy)
    assert len(lines) == 1 + 1 + len(trace.runs) + sum(1 for draft in trace.drafts if draft.tokens)


def tamper(path: Path, line: int, change: Any) -> None:
    lines = path.read_text().splitlines()
    content = json.loads(lines[line - 1])
    change(content)
    lines[line - 1] = json.dumps(content)
    path.write_text("\n".join(lines) + "\n")


def test_the_first_difference_is_found_and_both_commands_are_shown(log: Path) -> None:
    def other_token(content: dict[str, Any]) -> None:
        content["commands"][0]["tokens"][0] = 12345

    at = next(
        number
        for number, line in enumerate(log.read_text().splitlines()[1:], start=2)
        if json.loads(line)["commands"] and json.loads(line)["commands"][0]["type"] == "EmitTokens"
    )
    tamper(log, at, other_token)
    tamper(log, at + 3, lambda content: content["commands"].clear())
    difference = replay(log)
    assert difference is not None
    assert difference.line == at
    assert difference.logged != difference.replayed
    text = str(difference)
    assert f"line {at}" in text
    assert "logged:   EmitTokens" in text
    assert "12345" in text
    assert "replayed: EmitTokens" in text


def test_a_missing_command_is_a_difference(log: Path) -> None:
    tamper(log, 2, lambda content: content["commands"].clear())
    difference = replay(log)
    assert "(no further command)" in str(difference)


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (1, lambda c: c.update(version=99), "version 99"),
        (1, lambda c: c.pop("kv_cells"), "lacks 'kv_cells'"),
        (1, lambda c: c["policy"].update(name="pipinfer"), "did you mean 'pipeinfer'"),
        (1, lambda c: c.update(prefill_chunk="many"), "int was expected, not 'many'"),
        (2, lambda c: c.pop("event"), "'event' is missing"),
        (2, lambda c: c.update(now="noon"), "float was expected, not 'noon'"),
        (2, lambda c: c["event"].update(type="Surprise"), "type 'Surprise' is none of GenerationStarted"),
        (2, lambda c: c["event"].update(prompt=7), "a list was expected, not 7"),
        (2, lambda c: c["event"].update(extra=7), "missing or unknown fields: extra"),
        (2, lambda c: c["commands"][0]["run"].update(kind="sideways"), "'sideways' is not a valid RunKind"),
        (2, lambda c: c["commands"][0]["run"].update(positions=[]), "one equal length"),
        (3, lambda c: c.update(now=math.inf), "Infinity is no number"),
        (3, lambda c: c.update(now=math.nan), "NaN is no number"),
        (3, lambda c: c.update(now=10**400), "too large"),
        (2, lambda c: c.update(commands=[3]), "an object with a type was expected, not 3"),
    ],
)
def test_a_malformed_line_is_refused_by_its_number(log: Path, line: int, change: Any, message: str) -> None:
    tamper(log, line, change)
    with pytest.raises(BadInputError) as caught:
        replay(log)
    assert str(caught.value).startswith(f"{log}, line {line}:")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("{\n", "line 1: not valid JSON"),
        ("[]\n", "line 1: a JSON object"),
        ("[" * 100_000 + "\n", "line 1: nested too deeply"),
    ],
)
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(BadInputError, match=message):
        replay(path)


def test_a_log_that_was_cut_off_is_refused_at_the_cut(log: Path) -> None:
    text = log.read_text()
    log.write_text(text[:-40])
    with pytest.raises(BadInputError, match=f"line {len(text.splitlines())}: not valid JSON"):
        replay(log)


def test_a_log_is_complete_up_to_a_crash(tmp_path: Path) -> None:
    """Lines are written as things happen, not at the end."""
    path = tmp_path / "events.jsonl"
    with path.open("w") as stream:
        simulate(build(), stream)
        assert replay(path) is None


def test_a_log_without_events_is_refused(log: Path) -> None:
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    with pytest.raises(BadInputError, match="no event in it"):
        replay(log)


def test_a_replay_counts_events_and_knows_whether_the_generation_ended(log: Path) -> None:
    lines = log.read_text().splitlines(keepends=True)
    whole = replay_log(log)
    assert (whole.events, whole.difference, whole.released) == (len(lines) - 1, None, True)
    log.write_text("".join(lines[:-1]))
    cut = replay_log(log)
    assert (cut.events, cut.difference, cut.released) == (len(lines) - 2, None, False)


def test_an_event_that_the_scheduler_refuses_is_a_difference(log: Path) -> None:
    tamper(log, 3, lambda content: content["event"].update(run_id=77))
    difference = replay(log)
    assert difference is not None
    assert difference.line == 3
    text = str(difference)
    assert "RunReturned(run_id=77" in text
    assert "logged:   EmitTokens" in text
    assert "replayed: refused, InvariantError: run 77 returned" in text


def test_a_number_beyond_all_bounds_is_no_time(log: Path) -> None:
    lines = log.read_text().splitlines()
    lines[2] = lines[2].replace(f'"now":{json.loads(lines[2])["now"]}', '"now":1e999')
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(BadInputError, match="line 3: float was expected, not inf"):
        replay(log)


def test_what_is_no_json_number_is_not_written(tmp_path: Path) -> None:
    scheduler = build().scheduler()
    scheduler.handle(GenerationStarted((1,), 4), 0.0)
    with (tmp_path / "x").open("w") as stream, pytest.raises(ValueError, match="not JSON compliant"):
        EventLogWriter(stream, scheduler, 1).write(math.nan, PipelineRestored(), [])
