"""Measures the simulator on this machine: event rate beside bare SimPy, a sweep, growth with tokens and stages, memory.

``python -m analysis.simulator_speed -o docs/simulator-speed.md``
"""

import argparse
import datetime
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import simpy

from analysis.pages import fill, markdown_table
from pipesim.cli.common import check_outputs, diagnostic
from pipesim.recorder import Recorder
from pipesim.scenario import Scenario
from pipesim.scenario_file import build_scenario
from pipesim.simulation.links import LinkModel
from pipesim.simulation.pipeline import Simulation, evaluate, simulate

PENDING = 32
"""Events that wait in bare SimPy's list at once, about as many as in a simulation of 8 stages."""


def scenario(stages: int = 8, tokens: int = 128, policy: str = "pipeinfer", seed: int = 0) -> Scenario:
    """Equal stages of 10 ms and 1 ms per token, links of 0.5 ms and 1 Gbit/s, 70 % of drafted tokens right."""
    return build_scenario(
        {
            "model": {"name": "benchmark", "layers": stages, "hidden": 4096},
            "cluster": {
                "stages": [{"repeat": stages, "cost": {"kind": "linear", "constant_ms": 10, "per_token_ms": 1}}],
                "drafter": {"level_ms": 2},
                "head": {"overhead_ms": 0.1},
                "links": {"latency_ms": 0.5, "bandwidth_gbps": 1},
            },
            "workload": {"prompt_tokens": 128, "max_new_tokens": tokens},
            "policy": {"name": policy},
            "acceptance": {"kind": "iid", "rate": 0.7},
            "seed": seed,
        }
    )


@dataclass(frozen=True, slots=True)
class Counts:
    """What happens in one simulation. ``events``: a message arrives, a run or draft is done, the head decides.

    ``calls`` is how many of them went through the event list; the others were known when they were caused.
    """

    events: int
    calls: int


def count(one: Scenario) -> Counts:
    """Counts what happens, in a simulation of its own that nobody times."""
    send = LinkModel.send
    names = [plan.name for plan in one.stages()]
    recorder = Recorder(one.scheduler(), one.seed, names, ticks_per_s=1e9)
    with mock.patch.object(LinkModel, "send", autospec=True, side_effect=send) as sent:
        simulation = Simulation(one, recorder)
        simulation.run()
    trace = recorder.trace()
    heard = sum(run.returned_s is not None for run in trace.runs) + sum(draft.tokens > 0 for draft in trace.drafts)
    events = sent.call_count + len(trace.spans) + len(trace.drafts) + heard
    return Counts(events, next(simulation.clock._eid))


def bare_simpy_s(events: int) -> float:
    """CPU seconds in which SimPy carries out so many timeouts, each with one callback that asks for the next."""
    environment = simpy.Environment()
    left = events - PENDING

    def again(_: simpy.Event) -> None:
        nonlocal left
        if left > 0:
            left -= 1
            environment.timeout(PENDING).callbacks.append(again)

    for delay in range(PENDING):
        environment.timeout(delay).callbacks.append(again)
    began = time.process_time()
    environment.run()
    return time.process_time() - began


def evaluate_s(one: Scenario) -> float:
    """CPU seconds of a simulation with all metrics."""
    began = time.process_time()
    evaluate(one)
    return time.process_time() - began


@dataclass(frozen=True, slots=True)
class Rates:
    """CPU seconds of a simulation and of bare SimPy with as many events: the least of several rounds, in turns."""

    counts: Counts
    simulated_s: float
    bare_s: float

    @property
    def ratio(self) -> float:
        """Events per second of the simulation over those of bare SimPy."""
        return self.bare_s / self.simulated_s


def event_rates(one: Scenario, rounds: int) -> Rates:
    """Simulation and bare event list in turns."""
    counts = count(one)
    pairs = [(evaluate_s(one), bare_simpy_s(counts.events)) for _ in range(rounds)]
    return Rates(counts, min(simulated for simulated, _ in pairs), min(bare for _, bare in pairs))


@dataclass(frozen=True, slots=True)
class Sweep:
    """Wall seconds for all scenarios on ``jobs`` processes, and the CPU seconds of each scenario."""

    wall_s: float
    cpu_s: Sequence[float]
    jobs: int

    @property
    def free_s(self) -> float:
        """Wall seconds where each process has a core to itself."""
        return sum(self.cpu_s) / self.jobs


def sweep(scenarios: Sequence[Scenario], jobs: int) -> Sweep:
    """Evaluates all scenarios."""
    with ProcessPoolExecutor(jobs) as pool:
        list(pool.map(evaluate_s, scenarios[:jobs]))  # the workers are up
        began = time.perf_counter()
        each = list(pool.map(evaluate_s, scenarios, chunksize=10))
        return Sweep(time.perf_counter() - began, each, jobs)


@dataclass(frozen=True, slots=True)
class Growth:
    """One size: CPU seconds, and MiB by which the process grew."""

    tokens: int
    stages: int
    seconds: float
    mebibytes: float


def growth(sizes: Iterable[tuple[int, int]], traced: bool = False) -> list[Growth]:
    """Measures each (tokens, stages) in a fresh process, with or without a trace."""
    context = multiprocessing.get_context("spawn")
    grown = []
    for tokens, stages in sizes:
        with context.Pool(1) as pool:
            grown.append(pool.apply(_grow, (tokens, stages, traced)))
        diagnostic(f"{grown[-1]}")
    return grown


def _grow(tokens: int, stages: int, traced: bool) -> Growth:
    one = scenario(stages, tokens)
    evaluate(scenario(stages, 10))
    before = _peak_kibibytes()
    began = time.process_time()
    simulate(one) if traced else evaluate(one)
    seconds = time.process_time() - began
    return Growth(tokens, stages, seconds, (_peak_kibibytes() - before) / 1024)


def _peak_kibibytes() -> int:
    """The most memory this process ever had (Linux; ``getrusage`` would go on from its parent's peak)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


RATES = (("pipeinfer", 8, 600), ("pipeinfer", 32, 400), ("pipeinfer", 128, 200))
RATES += (("autoregressive", 8, 1000), ("autoregressive", 128, 150), ("speculative", 8, 1000))
AIM = 0.5
"""Of bare SimPy's event rate, with all metrics on."""
TOKENS = (100, 1_000, 10_000, 100_000)
STAGES = (2, 8, 32, 128)


def rates_table(rounds: int) -> tuple[str, int]:
    """Event rates as ratios, and how many of them reach the aim."""
    rows = []
    reached = 0
    for policy, stages, tokens in RATES:
        rates = event_rates(scenario(stages, tokens, policy), rounds)
        counts = rates.counts
        reached += rates.ratio >= AIM
        diagnostic(f"{policy}, {stages} stages: {rates.ratio:.2f} of bare SimPy")
        rows.append(
            (
                f"{policy}, {stages} stages",
                f"{counts.events / tokens:.0f}",
                f"{counts.calls / counts.events:.0%}",
                f"{counts.events / rates.simulated_s / 1e3:.0f}",
                f"{counts.events / rates.bare_s / 1e3:.0f}",
                f"{rates.ratio:.2f}",
            )
        )
    titles = ("scenario", "events per token", "through the list", "1000 events/s", "bare SimPy", "ratio")
    return markdown_table(titles, rows), reached


def growth_table(grown: Iterable[Growth]) -> str:
    """Time and memory by size."""
    return markdown_table(
        ("tokens", "stages", "CPU s", "us per token", "MiB more", "bytes per token"),
        [
            (
                f"{one.tokens:,}",
                one.stages,
                f"{one.seconds:.2f}",
                f"{one.seconds / one.tokens * 1e6:.0f}",
                f"{one.mebibytes:.1f}",
                f"{one.mebibytes * 2**20 / one.tokens:.0f}",
            )
            for one in grown
        ],
    )


def page(rounds: int, scenarios: int) -> str:
    """Measures everything; the page as Markdown."""
    cores = os.cpu_count() or 1
    swept = sweep([scenario(seed=seed) for seed in range(scenarios)], jobs=2)
    diagnostic(f"{scenarios} scenarios: {swept.wall_s:.1f} s, on free cores {swept.free_s:.1f} s")
    rates, reached = rates_table(rounds)
    by_tokens = growth_table(growth((tokens, 8) for tokens in TOKENS))
    by_stages = growth_table(growth((300, stages) for stages in STAGES))
    traced = growth_table(growth([(1_000, 8), (10_000, 8)], traced=True))
    paragraphs = (
        f"Measured on {datetime.date.today()} with {platform.python_implementation()} {platform.python_version()}, "
        f"SimPy {simpy.__version__}, {platform.machine()}, {cores} cores that other work shared. Times are CPU times "
        "of one process except where wall time is said.",
        "An event is what a plain simulation would put on SimPy's list: a message arrives, a run or a draft is done, "
        "the head decides. *Through the list* is the share that really goes through it: a frame that is on its way to "
        "a stage, and a cancellation, are looked up when their turn comes. Bare SimPy is as many `Timeout`s, each "
        f"with a callback that asks for the next one, {PENDING} of them pending. Simulation (all metrics on, latency "
        f"decomposition included) and bare SimPy take turns, {rounds} rounds, the fastest of each counts.",
        f"{scenarios:,} scenarios of 8 stages, 128 tokens and `pipeinfer` that differ in their seed, on 2 processes: "
        f"**{swept.free_s:.1f} s** of CPU on each, which is the wall time on two free cores; here, beside other work, "
        f"{swept.wall_s:.1f} s passed. The median scenario takes {statistics.median(swept.cpu_s) * 1e3:.0f} ms.",
    )
    return f"""# How fast the simulator is

{fill(paragraphs[0])}

## Events

{fill(paragraphs[1])}

{rates}

The aim is a ratio of {AIM}: {reached} of {len(RATES)} scenarios reach it.

{fill(WHERE_IT_GOES.strip())}

{fill(WHAT_WAS_TRIED.strip())}

## A sweep

{fill(paragraphs[2])}

## Growth

`evaluate`: all metrics, no trace. Each line is a fresh process; memory is what its peak grew by.

{by_tokens}

{fill(WHAT_GROWS.strip())}

300 tokens:

{by_stages}

With few stages there are few runs in flight; from 8 on `pipeinfer` sends about as many runs per token whatever the
number of stages, and time grows with the stages that each of them passes.

For comparison `simulate`, which keeps the trace:

{traced}

Made by `python -m analysis.simulator_speed -o docs/simulator-speed.md`.
"""


WHERE_IT_GOES = """
Where the rest goes: an event of the list costs about what it costs in bare SimPy, where the heap is most of the
price. On top come the stages, links and latencies that each event moves, and the scheduler. It is the very object
that drives real pipelines, and works on each run and draft, not on each event: its share is largest where few stages
see many small runs.
"""
WHAT_WAS_TRIED = """
Tried and left: compiled by mypyc as they stand, the scheduler and the hot modules of the simulation took 19.1 ms where
CPython takes 27.9 (scenarios/ablation.yaml with 8 partitions, the fastest of 25 each, 2026-11-23). That is not worth
a compiler on every user's machine, and would not reach the aim either.
"""
WHAT_GROWS = """
What grows with the text is the text itself, the KV cells' table, which the scheduler keeps for every position, and
one number per token for exact percentiles.
"""


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--rounds", type=int, default=7, help="simulations of each scenario, the fastest counts")
    parser.add_argument("--scenarios", type=int, default=1000, help="scenarios of the sweep")
    arguments = parser.parse_args()
    check_outputs(arguments.output)
    arguments.output.write_text(page(arguments.rounds, arguments.scenarios), encoding="utf-8")


if __name__ == "__main__":
    main()
