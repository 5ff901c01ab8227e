"""One simulated stage by itself: 10 layers of 10 ms each, whatever the rows."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipesim.scenario import LinearCost, StagePlan
from pipesim.scheduling.runs import Run, RunKind
from pipesim.simulation.devices import Clock, Device
from pipesim.simulation.stage import Frame, StageServer

MS = 1_000_000


class Bench:
    """Feeds frames and cancellations to a stage; collects spans and what leaves."""

    def __init__(self, cores: int = 1, stage_ms: float = 100) -> None:
        self.clock = Clock()
        self.device = Device("d", cores)
        self.spans: list[tuple[Any, ...]] = []
        self.left: list[tuple[int, float, bool]] = []
        observer: Any = SimpleNamespace(stage_span=lambda *span: self.spans.append(span))
        plan = StagePlan("stage 0", 0, 10, None, LinearCost(kind="linear", constant_ms=stage_ms))
        self.stage = StageServer(self.clock, 0, plan, self.device, observer, self.leave)

    def leave(self, frame: Frame) -> None:
        self.left.append((frame.run_id, self.clock.now / MS, frame.void))

    def arrive(self, run_id: int, at_ms: float, void: bool = False) -> None:
        frame = Frame(Run(run_id, 0, RunKind.SPECULATIVE, (1,), (1,), (1,)), 4)
        frame.void = void
        self.stage.arrive(round(at_ms * MS), frame)

    def cancel(self, run_id: int, at_ms: float) -> None:
        self.stage.cancel(round(at_ms * MS), (run_id,))

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


def test_a_run_takes_at_least_a_nanosecond() -> None:
    """Or a world of such stages would go on for ever at one instant."""
    bench = Bench(stage_ms=1e-9)
    bench.arrive(0, 0)
    assert bench.run() == [(0, 1 / MS, False)]
