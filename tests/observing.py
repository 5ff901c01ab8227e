"""What a prober would see of a simulated pipeline: its own costs, exactly."""

from pipesim.acceptance_trace import FORMAT, AcceptanceTrace
from pipesim.calibration import DraftSample, FloodSample, HeadSample, Observations, RunSample
from pipesim.calibration.fitting import flood_seconds
from pipesim.scenario import Scenario
from pipesim.scheduling.runs import RunKind

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
        for device in scenario.cluster.devices:
            for rows in (1, 4):
                works = [1e9 * cost.seconds(RunKind.CANONICAL, rows, 20) for cost in costs]
                one_row = [1e9 * cost.seconds(RunKind.CANONICAL, 1, 20) for cost in costs]
                latencies = [round(1e6 * link.latency_ms) for link in hops]
                taken = off * flood_seconds(works, one_row, 6, latencies, cores, device.contention)
                floods.append(FloodSample(number, rows, 20, 6, taken))
        for levels in (1, 2, 4, 8):
            for context, new in ((8, 0), (8, 8), (500, 0)):
                level = drafter.level_ms + drafter.cell_ms * context
                ms = drafter.request_ms + levels * level + new * drafter.prefill_per_token_ms
                drafts.append(DraftSample(number, levels, context, new, off * 1e-3 * ms, 2e-3 * hops[0].latency_ms))
    drafted = head.overhead_ms if head.draft_overhead_ms is None else head.draft_overhead_ms
    handled = [HeadSample(False, 1e-3 * head.overhead_ms), HeadSample(True, 1e-3 * drafted)] * 3
    return Observations(tuple(runs), tuple(floods), tuple(handled), tuple(drafts))
