import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_builder import build

from pipesim.errors import InvariantError
from pipesim.recorder import Meter, Observer, Recorder, TextMeter
from pipesim.scenario import Scenario
from pipesim.scheduling.commands import Command, EndRun, FinishReason, Outcome, ReleaseSession
from pipesim.scheduling.events import Event, GenerationAborted, GenerationStarted, RunReturned, StopStringMet
from pipesim.scheduling.policy import make_policy
from pipesim.scheduling.runs import RunKind
from pipesim.scheduling.scheduler import Scheduler
from pipesim.simulation.pipeline import Simulation, simulate
from pipesim.summary import summarise
from pipesim.trace import DraftSpan, Emission, Latency, PaceSample, RunRecord, StageSpan


def started(now: float = 100.0) -> Recorder:
    recorder = Recorder(Scheduler(make_policy("autoregressive")), seed=5, stages=["a"])
    recorder.handle(GenerationStarted((1, 2), max_new_tokens=2), now)
    return recorder


def test_times_count_from_the_first_event_on_whatever_clock() -> None:
    recorder = started(100.0)
    recorder.stage_span(0, 0, 100.25, 100.5, False)
    recorder.draft_span(4, 100.5, 100.75, 3)
    recorder.handle(RunReturned(0, (7,)), 101.0)
    recorder.handle(RunReturned(1, (8,)), 103.0)
    trace = recorder.trace()
    assert trace.spans == (StageSpan(0, 0, 0.25, 0.5, False),)
    assert trace.drafts == (DraftSpan(4, 0.5, 0.75, 3),)
    assert trace.emissions == (Emission(1.0, 2, (7,)), Emission(3.0, 3, (8,)))
    assert trace.runs == (
        RunRecord(0, RunKind.PREFILL, 2, 0.0, 1.0, Outcome.ACCEPTED, 2),
        RunRecord(1, RunKind.CANONICAL, 1, 1.0, 3.0, Outcome.ACCEPTED, 1),
    )
    assert (trace.finished_s, trace.drained_s) == (3.0, 3.0)
    assert (trace.policy, trace.seed, trace.stages, trace.prompt_tokens) == ("autoregressive", 5, ("a",), 2)
    assert trace.tokens == (7, 8)
    assert trace.complete


def test_an_unfinished_generation_leaves_an_honest_trace() -> None:
    trace = started().trace()
    assert (trace.finished_s, trace.drained_s, trace.finish_reason, trace.complete) == (None, None, None, False)
    assert trace.runs[0].outcome is None
    assert trace.runs[0].returned_s is None


def test_a_generation_that_did_not_bring_all_its_tokens_has_no_figures() -> None:
    meter = Meter(Scheduler(make_policy("autoregressive")), 0, 1)
    for now, event in enumerate((GenerationStarted((1, 2), 3), RunReturned(0, (7,)), GenerationAborted("it is late"))):
        meter.handle(event, now)
        with pytest.raises(InvariantError, match="did not bring all its tokens"):
            meter.metrics()


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_what_followed_a_stop_string_is_no_text(tokens: int) -> None:
    recorder = Recorder(Scheduler(make_policy("autoregressive")), 0, ["stage 0"])
    recorder.handle(GenerationStarted((1, 2), 3), 0.0)
    for run, token in enumerate((7, 8, 9)):
        recorder.handle(RunReturned(run, (token,)), 1.0 + run)
    recorder.handle(StopStringMet(tokens), 5.0)
    trace = recorder.trace()
    assert trace.tokens == (7, 8, 9)[:tokens]
    assert trace.complete
    assert trace.finish_reason is FinishReason.STOP, "even where the length would have ended it as well"


def drive(observer: Observer, stop: int | None) -> None:
    """A generation of three tokens on a clock in seconds; the text may end at a stop string."""
    observer.handle(GenerationStarted((1, 2), 3), 100.1)
    for run, token in enumerate((7, 8, 9)):
        observer.stage_span(0, run, 100.2 + run, 100.9 + run, False)
        observer.handle(RunReturned(run, (token,)), 101.3 + run)
        observer.link_sent("x", 3)
    observer.draft_span(0, 102.0, 102.5, 4)
    if stop is not None:
        observer.handle(StopStringMet(stop), 104.1)
    observer.paced([PaceSample("stage 0", 0.0, 1.0, 1.5, False)])


@pytest.mark.parametrize("stop", [None, 1, 2, 3])
def test_a_text_meter_says_what_a_trace_says(stop: int | None) -> None:
    recorder = Recorder(Scheduler(make_policy("autoregressive")), 7, ["stage 0"])
    meter = TextMeter(Scheduler(make_policy("autoregressive")), 7, 1)
    for observer in (recorder, meter):
        drive(observer, stop)
    assert meter.summary() == summarise(recorder.trace())
    assert meter.summary().complete


class Both(Recorder):
    """Tells a text meter, on a clock in seconds, all that it hears but latencies, of which real heads know nothing."""

    def __init__(self, scenario: Scenario, stop: tuple[int, int] | None) -> None:
        super().__init__(scenario.scheduler(), scenario.seed, ["a", "b", "c"], ticks_per_s=1e9)
        self.meter = TextMeter(scenario.scheduler(), scenario.seed, 3)
        self._stop = stop

    def handle(self, event: Event, now: float) -> list[Command]:
        self.meter.handle(event, now / 1e9)
        commands = super().handle(event, now)
        if self._stop and len(self.meter.tokens) >= self._stop[0]:
            (tokens, back), self._stop = self._stop, None
            commands += self.handle(StopStringMet(max(1, tokens - back)), now)
        return commands

    def stage_span(self, stage: int, run_id: int, start: float, end: float, void: bool) -> None:
        self.meter.stage_span(stage, run_id, start / 1e9, end / 1e9, void)
        super().stage_span(stage, run_id, start, end, void)

    def draft_span(self, request_id: int, start: float, end: float, tokens: int) -> None:
        self.meter.draft_span(request_id, start / 1e9, end / 1e9, tokens)
        super().draft_span(request_id, start, end, tokens)

    def link_sent(self, link: str, size_bytes: int) -> None:
        self.meter.link_sent(link, size_bytes)
        super().link_sent(link, size_bytes)

    def latency(self, latency: Latency) -> None:
        pass


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["autoregressive", "speculative", "pipeinfer"]),
    st.floats(0, 1),
    st.none() | st.tuples(st.integers(0, 2), st.integers(1, 800), st.integers(1, 50), st.integers(0, 100)),
    st.none() | st.tuples(st.integers(1, 40), st.integers(0, 3)),
)
def test_a_text_meter_says_what_the_trace_of_the_same_generation_says(
    policy: str, rate: float, crash: tuple[int, ...] | None, stop: tuple[int, int] | None
) -> None:
    """Also where a stage is lost, and where a stop string turns up after so many tokens, a few before the newest."""
    names = ("stage", "start_ms", "detect_ms", "restart_ms")
    faults = [{"kind": "crash", **dict(zip(names, crash, strict=True))}] if crash else []
    scenario = build(f"policy.name={policy}", f"acceptance.rate={rate}", f"faults={faults}")
    both = Both(scenario, stop)
    Simulation(scenario, both).run()
    assert both.meter.summary() == summarise(both.trace())


def test_an_aborted_generation_is_not_complete() -> None:
    recorder = started()
    recorder.handle(GenerationAborted("ctrl-c"), 101.0)
    recorder.handle(RunReturned(0, None), 102.0)
    trace = recorder.trace()
    assert not trace.complete
    assert trace.drained_s == 2.0


def test_a_run_that_ends_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = started()
    monkeypatch.setattr(recorder.scheduler, "handle", lambda event, now: [EndRun(0, Outcome.ACCEPTED, 1)] * 2)
    with pytest.raises(InvariantError, match="I1"):
        recorder.handle(RunReturned(0, (7,)), 101.0)


def test_a_session_that_is_released_with_a_run_on_its_way_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = started()
    monkeypatch.setattr(recorder.scheduler, "handle", lambda event, now: [ReleaseSession()])
    with pytest.raises(InvariantError, match=r"runs \[0\] have not ended \(I1\)"):
        recorder.handle(RunReturned(0, (7,)), 101.0)


def test_link_bytes_add_up() -> None:
    recorder = started()
    recorder.link_sent("x", 3)
    recorder.link_sent("x", 4)
    assert recorder.trace().link_bytes == {"x": 7}


def test_a_run_whose_tokens_were_there_already_is_redundant() -> None:
    trace = simulate(build("policy.always_canonical=true"))
    assert any(run.redundant for run in trace.runs)
    assert not any(run.redundant for run in simulate(build()).runs)
