"""One simulated stage by itself: 10 layers of 10 ms each, whatever the rows."""

import random
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipesim.scenario import LinearCost, StagePlan
from pipesim.scheduling.runs import Run, RunKind
from pipesim.simulation.devices import Clock, Device
from pipesim.simulation.links import Passage
from pipesim.simulation.stage import Frame, StageServer

MS = 1_000_000


def on_the_wire(until_ms: float) -> Passage:
    """A message that arrives then."""
    return 0, 0, round(until_ms * MS)


class Bench:
    """Feeds frames and cancellations to a stage; collects spans and what leaves."""

    def __init__(self, cores: int = 1, stage_ms: float = 100, own: bool = False) -> None:
        self.clock = Clock()
        self.device = Device("d", cores)
        self.spans: list[tuple[Any, ...]] = []
        self.left: list[tuple[int, float, bool]] = []
        observer: Any = SimpleNamespace(stage_span=lambda *span: self.spans.append(span))
        plan = StagePlan("stage 0", 0, 10, None, LinearCost(kind="linear", constant_ms=stage_ms))
        self.stage = StageServer(self.clock, 0, plan, None if own else self.device, observer, self.leave)

    def leave(self, frame: Frame) -> None:
        self.left.append((frame.run_id, self.clock.now / MS, frame.void))

    def arrive(self, run_id: int, at_ms: float, void: bool = False) -> None:
        frame = Frame(Run(run_id, 0, RunKind.SPECULATIVE, (1,), (1,), (1,)), 4)
        frame.void = void
        self.stage.arrive(on_the_wire(at_ms), frame)

    def cancel(self, run_id: int, at_ms: float) -> None:
        self.stage.cancel(on_the_wire(at_ms), (run_id,))

    def run(self) -> list[tuple[int, float, bool]]:
        self.clock.run_calls()
        return self.left


def test_runs_are_computed_one_after_the_other_in_order_of_arrival() -> None:
    bench = Bench(cores=2)
    bench.arrive(0, 0)
    bench.arrive(1, 30)
    assert bench.run() == [(0, 100, False), (1, 200, False)]
    assert bench.spans == [(0, 0, 0, 100 * MS, False), (0, 1, 100 * MS, 200 * MS, False)]


@pytest.mark.parametrize(("died_ms", "left_ms"), [(50.001, 60), (60, 60), (0, 0), (99, 100)])
def test_a_run_that_dies_while_it_is_computed_stops_after_the_layer(died_ms: float, left_ms: float) -> None:
    bench = Bench()
    bench.arrive(0, 0)
    bench.arrive(1, 1)
    bench.cancel(0, died_ms)
    assert bench.run() == [(0, left_ms, True), (1, max(1, left_ms) + 100, False)]


def test_a_run_that_died_while_it_waited_costs_nothing_and_stays_in_order() -> None:
    bench = Bench()
    for run_id in range(3):
        bench.arrive(run_id, run_id)
    bench.cancel(1, 50)
    assert bench.run() == [(0, 100, False), (1, 100, True), (2, 200, False)]
    assert [span[1] for span in bench.spans] == [0, 2]


def test_a_cancellation_may_come_before_the_run() -> None:
    bench = Bench()
    bench.cancel(3, 0)
    bench.arrive(3, 10)
    assert bench.run() == [(3, 10, True)]


def test_a_cancellation_that_comes_too_late_is_forgotten() -> None:
    bench = Bench()
    bench.arrive(0, 0)
    bench.cancel(0, 150)
    assert bench.run() == [(0, 100, False)]
    assert not bench.stage._dead


@given(
    arrivals=st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=8),
    cancellations=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400), st.integers(0, 7)), max_size=6),
)
def test_a_stage_on_its_own_machine_does_as_one_on_a_device_that_nobody_else_uses(
    arrivals: list[tuple[int, bool]], cancellations: list[tuple[int, int, int]]
) -> None:
    """Alone, it plans ahead: a cancellation may come while a run that it has planned is still on the wire."""
    benches = [Bench(own=own) for own in (True, False)]
    for bench in benches:
        at_ms = 0
        for run_id, (gap_ms, void) in enumerate(arrivals):
            at_ms += gap_ms
            bench.arrive(run_id, at_ms, void)
        for sent_ms, flight_ms, run_id in cancellations:
            later = sent_ms + flight_ms
            bench.clock.at(sent_ms * MS, lambda _, b=bench, i=run_id, at=later: b.cancel(i, at))
        bench.run()
    assert benches[0].left == benches[1].left
    assert benches[0].spans == benches[1].spans


def test_a_void_frame_passes_through_unpaid() -> None:
    bench = Bench()
    bench.arrive(0, 0, void=True)
    assert bench.run() == [(0, 0, True)]
    assert not bench.spans


def test_a_run_that_dies_while_it_waits_for_a_core_never_begins() -> None:
    bench = Bench()
    bench.device.acquire(lambda: None)  # somebody else's work
    bench.arrive(0, 0)
    bench.cancel(0, 10)
    bench.clock.at(40 * MS, lambda _: bench.device.release())
    assert bench.run() == [(0, 40, True)]
    assert not bench.spans


def test_a_stage_that_drops_everything_frees_its_core_and_starts_afresh() -> None:
    bench = Bench()
    for run_id in range(3):
        bench.arrive(run_id, run_id * 10)
    bench.cancel(5, 20)
    bench.clock.at(30 * MS, lambda _: bench.stage.drop_everything())
    bench.clock.at(40 * MS, lambda _: bench.arrive(5, 45))
    assert bench.run() == [(5, 145, False)]
    assert bench.spans == [(0, 0, 0, 30 * MS, True), (0, 5, 45 * MS, 145 * MS, False)]


def test_a_stage_that_drops_everything_does_not_wait_for_a_core_any_more() -> None:
    bench = Bench()
    bench.device.acquire(lambda: None)  # somebody else's work
    bench.arrive(0, 0)
    bench.clock.at(10 * MS, lambda _: bench.stage.drop_everything())
    bench.clock.at(20 * MS, lambda _: bench.arrive(1, 25))
    bench.clock.at(40 * MS, lambda _: bench.device.release())
    assert bench.run() == [(1, 140, False)]


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_random_arrivals_wait_as_long_as_the_m_d_1_queue_says(load: float) -> None:
    """Mean wait of Poisson arrivals at a stage of constant time 1: load / (2 (1 - load)) (Pollaczek-Khinchine)."""
    bench, chance, now = Bench(stage_ms=1), random.Random(3), 0.0
    arrivals = []
    for run_id in range(20_000):
        now += chance.expovariate(load)
        arrivals.append(round(now * MS))
        bench.arrive(run_id, arrivals[-1] / MS)
    bench.run()
    waits = [(start - arrival) / MS for (_, _, start, _, _), arrival in zip(bench.spans, arrivals, strict=True)]
    assert fmean(waits) == pytest.approx(load / (2 * (1 - load)), rel=0.07)


def test_a_run_takes_at_least_a_nanosecond() -> None:
    """Or a world of such stages would go on for ever at one instant."""
    bench = Bench(stage_ms=1e-9)
    bench.arrive(0, 0)
    assert bench.run() == [(0, 1 / MS, False)]


@pytest.mark.parametrize("own", [False, True])
def test_what_is_dropped_leaves_the_time_that_it_cost_and_no_more(own: bool) -> None:
    bench = Bench(own=own)
    bench.arrive(0, 0)
    bench.arrive(1, 30)
    bench.clock.at(40 * MS, lambda _: bench.stage.drop_everything())
    assert bench.run() == []
    assert bench.spans == [(0, 0, 0, 40 * MS, True)]
    bench.arrive(2, 200)
    assert bench.run() == [(2, 300, False)]


@pytest.mark.parametrize("own", [False, True])
def test_what_is_dropped_on_the_wire_costs_nothing(own: bool) -> None:
    bench = Bench(own=own)
    bench.arrive(0, 50)
    bench.clock.at(40 * MS, lambda _: bench.stage.drop_everything())
    assert (bench.run(), bench.spans) == ([], [])


def test_the_plans_for_what_was_dropped_are_void() -> None:
    """The core is taken until 150; at 100 nothing arrives any more."""
    bench = Bench()
    bench.device.acquire(lambda: None)
    bench.clock.at(150 * MS, lambda _: bench.device.release())
    bench.arrive(0, 100)
    bench.clock.at(10 * MS, lambda _: bench.stage.drop_everything())
    bench.clock.at(20 * MS, lambda _: [bench.arrive(run_id, 20) for run_id in (1, 2)])
    assert bench.run() == [(1, 250, False), (2, 350, False)]
