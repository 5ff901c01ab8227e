"""Memory, acceptance, speed and KV cells over a long generation."""

import hashlib
import tracemalloc
from itertools import pairwise
from typing import Any

from analysis.laboratory import with_settings
from analysis.pages import between, fill, markdown_table
from analysis.studies.bench import PLAIN, Bench, Finding
from analysis.style import COLOURS, line, panels
from pipesim.errors import InvariantError
from pipesim.recorder import Meter
from pipesim.scheduling.commands import Command
from pipesim.scheduling.events import Event
from pipesim.simulation.pipeline import Simulation
from pipesim.statistics import Interval, mean_interval, paired_difference

WINDOWS = 10
SEEDS = 6


class Watcher(Meter):
    """Looks at the scheduler each time that another window of text is complete."""

    def __init__(self, *args: Any, window: int) -> None:
        super().__init__(*args)
        self.window = window
        self.seen: list[dict[str, float]] = []

    def handle(self, event: Event, now: float) -> list[Command]:
        """Passes on, then looks. Raises InvariantError if cells were lost or held twice (I5)."""
        commands = super().handle(event, now)
        generation, statistics = self.scheduler.generation, self.scheduler.statistics
        written = generation.frontier - generation.prompt_length
        if written >= len(self.seen) * self.window and written:
            generation.cells.check()
            self.seen.append(
                {
                    "tokens": written,
                    "seconds": now / 1e9,
                    "verified": statistics.drafted_verified,
                    "accepted": statistics.drafted_accepted,
                    "cells": 0 if self.scheduler.finished else generation.cells.allocated - generation.frontier,
                }
            )
        return commands


def watched(scenario: str, seed: int, window: int) -> dict[str, Any]:
    """One generation: what was seen at each window's end, and the text's digest.

    Raises:
        InvariantError: cells were lost, held twice, or are not free at the end (I5).
    """
    resolved = with_settings(scenario, seed=seed)
    watcher = Watcher(resolved.scheduler(), seed, len(resolved.stages()), window=window)
    Simulation(resolved, watcher).run()
    generation = watcher.scheduler.generation
    if generation.cells.allocated:
        raise InvariantError(f"{generation.cells.allocated} KV cells are not free at the end (I5)")
    return {"text": hashlib.blake2b(repr(generation.text).encode(), digest_size=8).hexdigest(), "seen": watcher.seen}


def peak_memory(scenario: str, seed: int, tokens: int) -> int:
    """Peak of what one generation of so many tokens allocates, in bytes."""
    resolved = with_settings(scenario, seed=seed)
    workload = resolved.workload.model_copy(update={"max_new_tokens": tokens})
    resolved = resolved.model_copy(update={"workload": workload})
    tracemalloc.start()
    try:
        Simulation(resolved, Meter(resolved.scheduler(), seed, len(resolved.stages()))).run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def study(bench: Bench) -> Finding:
    """Long generations, looked at window by window."""
    scenario = bench.scenario()
    length = scenario.workload.max_new_tokens
    window, seeds = length // (2 if bench.quick else WINDOWS), range(1, 3 if bench.quick else SEEDS + 1)
    plain = scenario.model_dump_json()
    runs = bench.map(watched, [(plain, seed, window) for seed in seeds])
    texts = bench.map(watched, [(with_settings(plain, policy=PLAIN).model_dump_json(), seed, window) for seed in seeds])
    for seed, run, text in zip(seeds, runs, texts, strict=True):
        if run["text"] != text["text"]:
            raise InvariantError(f"another text than plain decoding's with seed {seed} (I3)")
    lengths = [length // 10, length // 3, length]
    peaks = bench.map(peak_memory, [(plain, 1, tokens) for tokens in lengths])

    def windows(run: dict[str, Any], counted: str, per: str) -> list[float]:
        return [
            (after[counted] - before[counted]) / max(after[per] - before[per], 1e-9)
            for before, after in pairwise(run["seen"])
        ]

    count = min(len(run["seen"]) for run in runs) - 1
    rates = [windows(run, "accepted", "verified")[:count] for run in runs]
    speeds = [windows(run, "tokens", "seconds")[:count] for run in runs]
    plain_speeds = [windows(run, "tokens", "seconds")[:count] for run in texts]
    held = [[one["cells"] for one in run["seen"][1 : count + 1]] for run in runs]

    def over_seeds(values: list[list[float]]) -> list[Interval]:
        return [mean_interval(column) for column in zip(*values, strict=True)]

    at = [window * (index + 1) for index in range(count)]
    figure, axes = panels(3, width=3.8)
    line(axes[0, 0], at, over_seeds(rates), "pipelined", COLOURS["pipelined"])
    axes[0, 0].set(ylabel="acceptance rate of the window", ylim=(0, 1))
    line(axes[0, 1], at, over_seeds(speeds), "pipelined", COLOURS["pipelined"])
    line(axes[0, 1], at, over_seeds(plain_speeds), "plain", COLOURS["plain"])
    axes[0, 1].set(ylabel="tokens per second of the window", ylim=(0, None))
    axes[0, 1].legend()
    axes[0, 2].plot(lengths, [peak / 1e6 for peak in peaks], "o-", color=COLOURS["pipelined"])
    axes[0, 2].set(ylabel="peak memory of the simulation, MB", ylim=(0, None))
    for place in axes[0]:
        place.set(xlabel="tokens")

    drift = paired_difference([one[-1] for one in rates], [one[0] for one in rates])
    slope = (peaks[-1] - peaks[0]) / (lengths[-1] - lengths[0])
    ratio = [a[-1] / a[0] for a in speeds], [a[-1] / a[0] for a in plain_speeds]
    most = max(max(one) for one in held)
    return Finding(
        f"Yes: {len(runs)} generations of {length:,} tokens wrote plain decoding's text, all KV cells were free at "
        f"the end, and never more than {most:.0f} were held beyond the text's. The acceptance rate does not drift: "
        f"last window less first {between(drift, 3)}. The simulation's memory grows by {slope:.0f} bytes per token, "
        "text included.",
        [
            "By windows of the text:",
            markdown_table(
                ["tokens", "acceptance rate", "tokens/s", "tokens/s, plain", "cells beyond the text"],
                [
                    [
                        f"{at[index]:,}",
                        between(mean_interval([one[index] for one in rates]), 3),
                        between(mean_interval([one[index] for one in speeds])),
                        between(mean_interval([one[index] for one in plain_speeds])),
                        between(mean_interval([one[index] for one in held]), 0),
                    ]
                    for index in range(count)
                ],
            ),
            fill(
                f"From the first window to the last, speed falls to {between(mean_interval(ratio[0]))} of its value, "
                f"plain decoding's to {between(mean_interval(ratio[1]))}: runs take longer with the context, by 0.5 "
                "ms per row, stage and thousand cells."
            ),
        ],
        [
            f"Means over seeds 1 to {len(runs)}. Passages of 20 easy and 10 hard tokens on average take turns "
            "(acceptance 0.85 and 0.4), so that a window's rate varies; a drift would be one of the bookkeeping, "
            "since the drafter knows no age. Cells are counted in the scheduler's table. Memory is what Python "
            "allocated at the peak (tracemalloc), seed 1.",
            "It is the simulation and the scheduler that are shown to be sound, and with them the head of a real "
            "pipeline, which is the same object; not that a real draft model stays as good over a long text.",
        ],
        figure,
    )
