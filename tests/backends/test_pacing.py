"""Whatever a real machine does too late or too slowly shows in the pace, and nothing else does: time is a fake here."""

import asyncio
from dataclasses import dataclass

import pytest
from scenario_builder import build

from backends.emulation import PacedHead, emulated_parts
from backends.frames import ResultFrame, RunFrame, Session, StageStamp
from backends.pacing import HeadPace, StagePace, _Pace
from backends.pipeline import News
from pipesim.pace import Pace, judge
from pipesim.scheduling.runs import Run, RunKind

MODELLED_MS, LINK_MS = 11.0, 0.5


@dataclass
class Clock:
    """Nanoseconds since the prompt, in every process alike; who sleeps wakes up ``oversleeps`` later."""

    now: int = 0
    oversleeps: float = 0.0

    def pass_by(self, ms: float) -> None:
        self.now += round(1e6 * ms)

    def pause(self, seconds: float) -> None:
        self.pass_by(1e3 * seconds + self.oversleeps)


def emulated(
    clock: Clock,
    transport_ms: float = 0.0,
    compute_ms: float = 5.0,
    home_ms: float = 0.0,
    called_off: bool = False,
    at_once: int = 1,
) -> Pace:
    """Twenty runs, so many at once, through a stage whose real messages and computation take so long."""
    scenario = build("cluster.stages=[{cost: {kind: linear, constant_ms: 10, per_token_ms: 1}}]")
    part, inbox = emulated_parts(scenario)[0][0], asyncio.Queue[News]()
    stage, head = StagePace(part, 0.0), HeadPace(PacedHead(scenario), inbox, 0.0)
    session = Session(b"", 1, 0)
    for first in range(0, 20, at_once):
        runs = [Run(number, 0, RunKind.CANONICAL, (7,), (number,), (1,)) for number in range(first, first + at_once)]
        frames = [RunFrame(session, run, hops=(head.model.submit(run),)) for run in runs]
        if called_off:
            stage.cancel(range(first, first + at_once), head.model.cancel(at_once)[0])
        clock.pass_by(transport_ms)
        received = 1e-9 * clock.now
        for frame in frames:
            stage.begin(frame, received)
            clock.pass_by(compute_ms)
            start, end, void, hops = stage.leave(1, clock.pause, lambda: False)
            clock.pass_by(home_ms)
            stamps = (StageStamp(0, start, end, void, 1),)
            inbox.put_nowait((ResultFrame(session, frame.run.run_id, None if void else (7,), stamps, hops), 1))
            clock.now = max(clock.now, head.model.due(hops[-1].arrival, drafted=False))
            asyncio.run(head.next())
    pace = judge(head.samples)
    assert pace
    return pace


@pytest.mark.parametrize(
    ("trouble", "problems"),
    [
        ({}, []),
        ({"transport_ms": LINK_MS + 3}, []),  # it hides behind a computation that is shorter than modelled
        ({"at_once": 4}, []),  # nor does a run compute while it waits for its turn
        ({"transport_ms": LINK_MS + 3, "compute_ms": MODELLED_MS - 0.1}, ["stage 0: one in", "head: one in"]),
        ({"compute_ms": MODELLED_MS + 0.2}, ["stage 0: 100% of 20 really took longer"]),
        ({"home_ms": LINK_MS + 2.5}, ["head: one in twenty was 2.5 ms late"]),
    ],
)
def test_the_pace_says_whose_fault_it_is(
    trouble: dict[str, float], problems: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(_Pace, "now", lambda _: clock.now)
    found = emulated(clock, **trouble).problems  # type: ignore[arg-type]
    assert len(found) == len(problems)
    assert all(one.startswith(start) for one, start in zip(found, problems, strict=True)), found


def test_a_stage_that_oversleeps_does_not_keep_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(oversleeps=3.0)
    monkeypatch.setattr(_Pace, "now", lambda _: clock.now)
    assert "stage 0: one in twenty was 3.0 ms late" in emulated(clock).problems[0]


def test_what_was_called_off_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(_Pace, "now", lambda _: clock.now)
    pace = emulated(clock, transport_ms=3, home_ms=3, called_off=True)
    late = {part.part for part in pace.parts if part.late_ms[0] > 2}
    assert {"stage 0, called off", "head, called off"} <= late
    assert pace.kept
