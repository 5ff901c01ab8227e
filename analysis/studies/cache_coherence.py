"""Text equality and conservation of KV cells, checked after every event."""

import hashlib
from itertools import product
from typing import Any

from analysis.laboratory import with_settings
from analysis.pages import between, markdown_table
from analysis.studies.bench import Bench, Finding
from analysis.style import CYCLE, doubling, line, panels
from pipesim.errors import InvariantError
from pipesim.metrics import compute_metrics
from pipesim.recorder import Recorder
from pipesim.scheduling.commands import Command
from pipesim.scheduling.events import Event
from pipesim.simulation.pipeline import Simulation
from pipesim.statistics import mean_interval

PARTITIONS = (1, 4, 16, 64)
RATES = (0.3, 0.8, 0.98)
SPARE = {"no spare cells": 1, "16 spare cells": 16, "enough": None}
"""KV cells beyond prompt and new tokens."""
SEEDS = 6


class Watcher(Recorder):
    """Counts all KV cells after every event of the scheduler."""

    checks = most_in_flight = 0
    least_free = 2**63

    def handle(self, event: Event, now: float) -> list[Command]:
        """Passes on, then counts. Raises InvariantError if cells were lost or held twice (I5)."""
        commands = super().handle(event, now)
        generation = self.scheduler.generation
        generation.cells.check()
        self.checks += 1
        self.most_in_flight = max(self.most_in_flight, len(generation.in_flight))
        self.least_free = min(self.least_free, generation.cells.free)
        return commands


def watched(scenario: str, seed: int) -> dict[str, Any]:
    """One generation under a watcher's eyes. Raises InvariantError, also if not all cells are free at the end (I5)."""
    resolved = with_settings(scenario, seed=seed)
    names = [plan.name for plan in resolved.stages()]
    watcher = Watcher(resolved.scheduler(), seed, names, ticks_per_s=1e9)
    Simulation(resolved, watcher).run()
    held = watcher.scheduler.generation.cells.allocated
    if held:
        raise InvariantError(f"{held} KV cells are not free at the end (I5)")
    trace = watcher.trace()
    metrics = compute_metrics(trace)
    return {
        "text": hashlib.blake2b(repr(trace.tokens).encode(), digest_size=8).hexdigest(),
        "checks": watcher.checks,
        "in flight": watcher.most_in_flight,
        "least free": watcher.least_free,
        "cancelled": metrics.runs.cancelled,
        "tokens/s": metrics.tokens_per_second,
    }


def study(bench: Bench) -> Finding:
    """Every number of partitions with every size of the cache, against the text of plain decoding."""
    partitions, rates, seeds = bench.some(PARTITIONS), bench.some(RATES), bench.seeds[:SEEDS]
    workload = bench.scenario().workload
    text = (workload.prompt_tokens or 0) + workload.max_new_tokens
    cases, jobs = [], []
    for rate, (spare, cells), count, cancel in product(rates, SPARE.items(), partitions, (True, False)):
        size = "null" if cells is None else text + cells
        scenario = bench.scenario(
            f"acceptance.rate={rate}",
            f"cluster.kv_cells={size}",
            f"policy.partitions={count}",
            f"policy.cancellation={cancel}",
        ).model_dump_json()
        for seed in seeds:
            cases.append((rate, spare, count, cancel, seed))
            jobs.append((scenario, seed))
    found = dict(zip(cases, bench.map(watched, jobs), strict=True))
    plain = {
        (rate, seed): bench.map(
            watched, [(bench.scenario(f"acceptance.rate={rate}", "policy.name=autoregressive").model_dump_json(), seed)]
        )[0]["text"]
        for rate in rates
        for seed in seeds
    }
    for (rate, spare, count, cancel, seed), result in found.items():
        if result["text"] != plain[rate, seed]:
            raise InvariantError(
                f"another text than plain decoding's at acceptance {rate}, {spare}, {count} partitions, "
                f"cancellation {cancel}, seed {seed} (I3)"
            )

    figure, axes = panels(len(rates), width=3.4)
    for place, rate in zip(axes[0], rates, strict=True):
        for spare, colour in zip(SPARE, CYCLE, strict=False):
            speeds = [
                mean_interval([found[rate, spare, count, True, seed]["tokens/s"] for seed in seeds])
                for count in partitions
            ]
            line(place, partitions, speeds, spare, colour)
        doubling(place, partitions)
        place.set(title=f"acceptance {rate}", xlabel="partitions", ylim=(0, None))
    axes[0, 0].set_ylabel("tokens per second")
    axes[0, -1].legend()

    def row(rate: float, spare: str, count: int) -> list[object]:
        results = [found[rate, spare, count, True, seed] for seed in seeds]
        return [
            f"{rate}, {spare}, {count}",
            max(result["in flight"] for result in results),
            min(result["least free"] for result in results),
            between(mean_interval([result["cancelled"] for result in results]), 0),
            between(mean_interval([result["tokens/s"] for result in results])),
        ]

    checks = sum(result["checks"] for result in found.values())
    most = max(result["in flight"] for result in found.values())
    least = min(result["least free"] for result in found.values())
    ends = (partitions[0], partitions[-1])
    return Finding(
        f"Yes: {len(found)} generations, each with the text of plain decoding. After each of {checks:,} events the "
        f"cells added up, and all were free at the end, with up to {most} runs in flight, with and without "
        f"cancellation, and with as few as {least} free.",
        [
            "With cancellation; most runs in flight and fewest free cells of any seed:",
            markdown_table(
                ["acceptance, KV cells, partitions", "in flight", "free cells", "cancelled runs", "tokens/s"],
                [row(rate, spare, count) for rate in rates for spare in SPARE for count in ends],
            ),
        ],
        [
            f"Means over seeds 1 to {SEEDS}. Counted is the scheduler's cell table, which allocates for every stage. "
            "No interval belongs to a count of violations: a single one would have ended the study with an error. "
            "`tests/scheduling/test_properties.py` searches for violations over arbitrary policies, settings and "
            "orders of events, and `tests/backends` compares real stages' text with plain decoding's.",
            "Links, stages and drafter are invented, such that many runs are in flight.",
        ],
        figure,
    )
