"""What a prober would see of a simulated pipeline: its own costs, exactly."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

from pipesim.acceptance_trace import FORMAT, AcceptanceTrace
from pipesim.calibration import DraftSample, FloodSample, HeadSample, Observations, RunSample
from pipesim.recorder import Observer
from pipesim.scenario import Scenario
from pipesim.scheduling.runs import Run, RunKind
from pipesim.simulation.devices import Clock
from pipesim.simulation.faults import stage_pace
from pipesim.simulation.links import Passage
from pipesim.simulation.sharing import FairDevice, LocalLink
from pipesim.simulation.stage import Frame, StageServer

ACCEPTANCE = AcceptanceTrace(
    format=FORMAT,
    prompt_tokens=tuple(range(1, 9)),
    tokens=tuple(range(100, 140)),
    candidates=tuple((((100 + i) if i % 4 else 5, 0.9),) for i in range(40)),
)
_BYTES = {1: 300, 2: 600, 4: 1200, 8: 2400, 16: 40_000, 64: 150_000}


def observe(scenario: Scenario, rounds: int = 4, noise: float = 0.0, cores: int = 2) -> Observations:
    """Measurements with a relative error of ``noise`` that alternates in sign from round to round."""
    costs = [plan.cost_model() for plan in scenario.stages()]
    hops, head, drafter = scenario.hops(), scenario.cluster.head, scenario.drafter(1)
    runs, floods, drafts = [], [], []
    for number in range(rounds):
        off = 1 + noise * (-1) ** number
        sizes = [(RunKind.SPECULATIVE, rows) for rows in (1, 2, 4, 8, 16)]
        sizes += [(RunKind.PREFILL, rows) for rows in (1, 16, 64)]
        for kind, rows in sizes:
            for context in (8, 48, 500):
                cells = context + (rows - 1) / 2 + 1
                way = tuple(
                    (_BYTES[rows], 1e-3 * link.latency_ms + 8e-9 * _BYTES[rows] / (link.bandwidth_gbps or float("inf")))
                    for link in hops
                )
                times = tuple(off * cost.seconds(kind, rows, cells) for cost in costs)
                runs.append(RunSample(number, kind, rows, cells, False, times, way))
        runs.append(RunSample(number, RunKind.SPECULATIVE, 4, 9.0, True, (1e-4,) * len(costs), runs[0].hops))
        for rows in (1, 4) if scenario.cluster.devices else ():
            floods.append(FloodSample(number, rows, 20, 6, off * flood(scenario, rows, 6, cores)))
        for levels in (1, 2, 4, 8):
            for context, new in ((8, 0), (8, 8), (500, 0)):
                level = drafter.level_ms + drafter.cell_ms * context
                ms = drafter.request_ms + levels * level + new * drafter.prefill_per_token_ms
                drafts.append(DraftSample(number, levels, context, new, off * 1e-3 * ms, 2e-3 * hops[0].latency_ms))
    drafted = head.overhead_ms if head.draft_overhead_ms is None else head.draft_overhead_ms
    handled = [HeadSample(False, 1e-3 * head.overhead_ms), HeadSample(True, 1e-3 * drafted)] * 3
    return Observations(tuple(runs), tuple(floods), tuple(handled), tuple(drafts))


def flood(scenario: Scenario, rows: int, runs: int, cores: int, void: bool = False) -> float:
    """Seconds until runs are home that are all sent at once, through simulated stages and links of one fair device."""
    clock, home = Clock(), list[int]()
    device = FairDevice(clock, "box", cores, scenario.cluster.devices[0].contention)
    unseen = cast(Observer, SimpleNamespace(stage_span=lambda *_: None))
    links = [LocalLink("a hop", link, device) for link in scenario.hops()]

    def leave_to(hop: int, arrive: Callable[[Passage, Frame], None]) -> Callable[[Frame], None]:
        return lambda frame: links[hop].send(clock.now, 0, arrive, frame)

    leave = leave_to(len(links) - 1, lambda *_: home.append(clock.now))
    for index, plan in reversed(list(enumerate(scenario.stages()))):
        pace = stage_pace(scenario.faults, index)
        stage = StageServer(clock, index, plan, device, unseen, leave, pace)
        leave = leave_to(index, stage.arrive)
    for number in range(runs):
        frame = Frame(Run(number, 0, RunKind.SPECULATIVE, (1,) * rows, (19,) * rows, (1,) * rows), 0)
        frame.void = void
        leave(frame)
    clock.run_calls()
    return home[-1] / 1e9
