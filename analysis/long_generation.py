"""One request of thousands of tokens: memory of every process, speed and acceptance along the way, and the figure.

``python -m analysis.long_generation -o docs/long-generation.md`` generates with Gemma-3-270M past 10,000 tokens and
with SmolLM2-135M up to its context limit.
"""

import argparse
import asyncio
import os
import platform
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch

from analysis.pages import fill, markdown_table
from analysis.style import CYCLE, STYLE, panels
from backends.cluster import ClusterPlan, DrafterPart, running_pipeline, stage_parts
from backends.head import Head
from backends.models.finding import DEFAULT_MODEL, GEMMA
from backends.models.loading import open_model
from backends.models.stage_model import StageModel
from backends.pipeline import Pipeline
from backends.placement import split_layers
from backends.sampling import Sampling
from backends.tokenizer import open_tokenizer
from pipesim.cli.common import check_outputs, diagnostic
from pipesim.recorder import TextMeter
from pipesim.scheduling.commands import EndRun
from pipesim.scheduling.events import GenerationStarted
from pipesim.scheduling.policy import make_policy
from pipesim.scheduling.runs import END, Run, RunKind, SequenceRemove
from pipesim.scheduling.scheduler import Scheduler
from pipesim.summary import Summary

SAMPLED_EVERY_S = 2.0
WARM_UP = 1000
"""Tokens after which memory should be flat."""
_STAGES = 2
_STRETCHES, _RUNS_EACH = 64, 32
"""Of so many stretches of the text, the stage time of so many one-row runs is kept."""
_PROMPT = "The history of the lighthouse, told from its beginning to the present day.\n\n"
_POLICY = {"micro_batch": 4, "partitions": 4}


@dataclass(frozen=True, slots=True)
class Sample:
    """The state after ``tokens``: seconds since the start, MiB of each process by name, drafted tokens so far."""

    time_s: float
    tokens: int
    memory_mib: dict[str, float]
    verified: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A long generation: samples along the way, stage time of one-row runs by KV length, the same of bare passes."""

    model: str
    dtype: str
    summary: Summary
    samples: tuple[Sample, ...]
    stage_ms: tuple[tuple[int, float], ...]
    bare_ms: tuple[tuple[int, float], ...]
    temperature: float


def memory_mib(pid: int) -> float:
    """Anonymous memory: without files, whose pages count in part for each process of the machine that maps them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"process {pid} has no Pss_Anon")


class Witness(TextMeter):
    """Takes the stages' times of some one-row runs along the way, for a text of up to ``longest`` tokens.

    ``stage_ms``: KV length, and what all stages together took, in ms.
    """

    def __init__(self, scheduler: Scheduler, seed: int, stages: int, longest: int) -> None:
        super().__init__(scheduler, seed, stages)
        self.stage_ms: list[tuple[int, float]] = []
        self._stretch = -(-longest // _STRETCHES)
        self._taken: Counter[int] = Counter()
        self._spent: dict[int, tuple[int, list[float]]] = {}  # run in flight -> KV length, seconds on each stage

    def _submitted(self, run: Run, now: float) -> None:
        super()._submitted(run, now)
        if run.rows == 1 and run.kind is not RunKind.PREFILL:
            self._spent[run.run_id] = run.positions[0], []

    def stage_span(self, stage: int, run_id: int, start: float, end: float, void: bool) -> None:
        """As the base's."""
        super().stage_span(stage, run_id, start, end, void)
        if run_id in self._spent and not void:
            self._spent[run_id][1].append(end - start)

    def _ended(self, end: EndRun, now: float) -> None:
        super()._ended(end, now)
        length, spent = self._spent.pop(end.run_id, (0, []))
        stretch = length // self._stretch
        if len(spent) == _STAGES and self._taken[stretch] < _RUNS_EACH:
            self._taken[stretch] += 1
            self.stage_ms.append((length, 1e3 * sum(spent)))


async def generate(
    pipeline: Pipeline, started: GenerationStarted, sampling: Sampling, say: str
) -> tuple[Witness, list[Sample]]:
    """One generation, sampled every other second by a thread of its own."""
    scheduler = Scheduler(make_policy("pipeinfer", _POLICY))
    longest = len(started.prompt) + started.max_new_tokens
    witness = Witness(scheduler, sampling.seed, len(pipeline.stages), longest)
    names = {"head": os.getpid()}
    names |= {f"stage {i}": node.process.pid for i, node in enumerate(pipeline.stages) if node.process}
    if pipeline.drafter and pipeline.drafter.process:
        names["drafter"] = pipeline.drafter.process.pid
    samples: list[Sample] = []
    tokens, done, began = 0, threading.Event(), time.monotonic()

    def count(new: tuple[int, ...]) -> None:
        nonlocal tokens
        tokens += len(new)

    def watch() -> None:
        while not done.wait(SAMPLED_EVERY_S):
            seen = scheduler.statistics
            memory = {name: memory_mib(pid) for name, pid in names.items()}
            now = time.monotonic() - began
            samples.append(Sample(now, tokens, memory, seen.drafted_verified, seen.drafted_accepted))
            if len(samples) % 20 == 0:
                diagnostic(f"{say}: {tokens} tokens after {now:.0f} s, {sum(memory.values()):.0f} MiB")

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        await Head(pipeline, witness, count).generate(started, sampling)
    finally:
        done.set()
        thread.join()
    return witness, samples


async def measure(model: str, dtype: str, new_tokens: int | None, temperature: float) -> Measured:
    """A pipeline of two stages and an n-gram drafter generates ``new_tokens`` (None: up to the context limit)."""
    source = open_model(model)
    prompt = tuple(open_tokenizer(source).encode(_PROMPT))
    limit = source.config.max_context
    new_tokens = limit - len(prompt) if new_tokens is None else new_tokens
    plan = ClusterPlan(
        model,
        stage_parts(split_layers(source.config, _STAGES)),
        DrafterPart("ngram", source.config.vocabulary, limit),
        dtype,
    )
    async with running_pipeline(plan) as pipeline:
        sampling = Sampling(temperature=temperature, seed=1)
        witness, samples = await generate(pipeline, GenerationStarted(prompt, new_tokens), sampling, model)
    total = len(prompt) + new_tokens
    lengths = sorted({*range(0, total, max(1, total // 8)), total - 1} - {0})
    whole = StageModel(source, 0, source.config.layers, getattr(torch, dtype))
    bare = tuple((length, bare_forward_ms(whole, length, total + 1)) for length in lengths)
    return Measured(model, dtype, witness.summary(), tuple(samples), tuple(witness.stage_ms), bare, temperature)


def bare_forward_ms(whole: StageModel, length: int, cells: int) -> float:
    """One row's forward pass in one process behind ``length`` cells of zeros; median of nine, in ms."""
    session = 1
    whole.open_session(session, cells, 1, Sampling())
    for start in range(0, length, 64):
        at = tuple(range(start, min(start + 64, length)))
        whole.admit(session, Run(0, 0, RunKind.PREFILL, (1,) * len(at), at, (1,) * len(at)))
    times = []
    for _ in range(9):
        run = Run(1, 0, RunKind.CANONICAL, (1,), (length,), (1,), 0, (SequenceRemove(1, length, END),))
        began = time.perf_counter()
        whole.forward(session, run, None, whole.admit(session, run))
        times.append(1e3 * (time.perf_counter() - began))
    whole.close_session(session)
    return statistics.median(times)


def windowed(measured: Measured, windows: int = 24) -> list[tuple[int, float, float]]:
    """By window of tokens: where it ends, tokens/s, and the acceptance rate within it."""
    samples, found = measured.samples, []
    ends = np.linspace(0, len(samples) - 1, windows + 1).astype(int)
    for first, last in pairwise(ends):
        a, b = samples[first], samples[last]
        if b.time_s > a.time_s:
            rate = (b.accepted - a.accepted) / max(1, b.verified - a.verified)
            found.append((b.tokens, (b.tokens - a.tokens) / (b.time_s - a.time_s), rate))
    return found


def distinct(tokens: Sequence[int]) -> float:
    """The share of different sequences of four tokens: near 0, a text repeats itself for ever."""
    fours = list(zip(*(tokens[start:] for start in range(4)), strict=False))
    return len(set(fours)) / max(1, len(fours))


def growth_kib(measured: Measured, name: str) -> float:
    """KiB per token by which a process grows after the warm-up: the slope of a straight line."""
    late = [(one.tokens, one.memory_mib[name]) for one in measured.samples if one.tokens >= WARM_UP]
    return 1024 * float(np.polyfit(*zip(*late, strict=True), 1)[0]) if len(late) > 2 else float("nan")


def draw(all_measured: Sequence[Measured], file: Path) -> None:
    """Memory, speed with acceptance, and stage time against the KV length: a row for each model."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(3, len(all_measured))
        for row, measured in zip(axes, all_measured, strict=True):
            memory, speed, stage = row
            tokens = [one.tokens for one in measured.samples]
            for name, colour in zip(measured.samples[0].memory_mib, CYCLE, strict=False):
                memory.plot(tokens, [one.memory_mib[name] for one in measured.samples], label=name, color=colour)
            memory.set(ylabel="anonymous memory, MiB", title=f"{measured.model}, {measured.dtype}", ylim=(0, None))
            memory.legend()
            ends, rates, accepted = zip(*windowed(measured), strict=True)
            speed.plot(ends, rates, "o-", color=CYCLE[0])
            speed.set(ylabel="tokens/s", ylim=(0, None), title="speed (dots), acceptance (dashes)")
            right = speed.twinx()
            right.grid(visible=False)
            right.plot(ends, accepted, "--", color=CYCLE[1])
            right.set(ylim=(0, 1.02), ylabel="accepted of drafted")
            lengths, times = zip(*measured.stage_ms, strict=True)
            stage.plot(lengths, times, ".", color=CYCLE[4], markersize=2, alpha=0.4, label="both stages, one-row runs")
            stage.plot(*zip(*measured.bare_ms, strict=True), "o-", color=CYCLE[1], label="bare forward pass")
            stage.set(ylabel="ms", ylim=(0, 2.5 * statistics.median(times)), title="one row, by KV length")
            stage.legend()
            for one in row:
                one.set_xlabel("tokens")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130)


def page(all_measured: Sequence[Measured], figure: str) -> str:
    """The page as Markdown."""
    speeds, memories = [], []
    for one in all_measured:
        tokens, metrics = one.summary.tokens, one.summary.metrics
        windows = windowed(one, 4)
        ratios = [_stage_ratio(one, length, bare) for length, bare in one.bare_ms]
        told = " / ".join(f"{ratio:.2f}" for ratio in (ratios[0], ratios[len(ratios) // 2], ratios[-1]))
        quarters = " / ".join(f"{speed:.1f}" for _, speed, _ in windows)
        bare = f"{one.bare_ms[0][1]:.1f} .. {one.bare_ms[-1][1]:.1f}"
        speed, rate = f"{metrics.tokens_per_second or 0:.1f}", f"{metrics.acceptance_rate or 0:.0%}"
        new = f"{distinct(tokens[len(tokens) // 2 :]):.0%}"
        speeds.append([one.model, one.dtype, len(tokens), speed, quarters, rate, new, bare, told])
        for name in one.samples[0].memory_mib:
            warm = next((s for s in one.samples if s.tokens >= WARM_UP), one.samples[-1]).memory_mib[name]
            end, growth = one.samples[-1].memory_mib[name], growth_kib(one, name)
            memories.append([f"{one.model}, {name}", f"{warm:.1f}", f"{end:.1f}", f"{growth:.2f}"])
    titles = [
        "model",
        "dtype",
        "tokens",
        "tokens/s",
        "by quarter",
        "accepted",
        "distinct",
        "bare pass, ms",
        "stages : bare",
    ]
    parts = [
        "# Long generations",
        "One request each, two stages and an n-gram drafter as processes on one machine "
        f"({platform.machine()}, {os.cpu_count()} cores), policy pipeinfer, one "
        f"thread per stage, end tokens ignored, sampled at temperature {all_measured[0].temperature:g}.",
        f"![memory, speed and stage time]({figure})",
        markdown_table(titles, speeds),
        "*by quarter*: tokens/s in each quarter of the time. *distinct*: different sequences of four tokens, among "
        "all in the text's second half; where there are few, the model repeats itself, which the drafter foresees, and "
        "speed and acceptance rise for that reason. *bare pass*: one row through the whole model in one "
        "process behind so much text, at the shortest and at the longest measured KV length. *stages : bare*: what "
        "both stages together took for one-row runs at about that length (median), at the beginning, in the middle and "
        "at the end: as long as it does not rise, nothing but attention slows the text down.",
        markdown_table(["process", f"MiB after {WARM_UP} tokens", "at the end", "KiB per token"], memories),
        "Memory is what no file stands behind: libraries, and the file of weights, are shared with whoever else maps "
        "them. KV cells and weights are there from the start. *KiB per token* is the slope of a straight line after "
        "the warm-up. What must grow is counted in `tests/backends/test_flat_memory.py`: the head's text, its table of "
        "KV cells, one number per token for percentiles (0.11 KiB per token); the drafter's text and its index of "
        "n-grams (0.03). A trace is kept only where it is asked for (`--trace`, `--plot`, `compare`): it costs the "
        "head 0.6 KiB more per token.",
        "Made by `python -m analysis.long_generation -o docs/long-generation.md`.",
    ]
    return "\n\n".join(part if part.startswith("|") else fill(part) for part in parts) + "\n"


def _stage_ratio(measured: Measured, length: int, bare_ms: float) -> float:
    near = sorted(measured.stage_ms, key=lambda one: abs(one[0] - length))[:_RUNS_EACH]
    return statistics.median(ms for _, ms in near) / bare_ms


def main() -> None:
    """Generates, draws and writes."""
    parser = argparse.ArgumentParser(prog="python -m analysis.long_generation", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="Markdown file to write")
    parser.add_argument("--tokens", type=int, help="so many with each model, for a trial")
    parser.add_argument("--models", nargs="+", default=[GEMMA, DEFAULT_MODEL])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 soon repeats itself for ever")
    options = parser.parse_args()
    check_outputs(options.output)
    lengths = {GEMMA: 10_240}
    all_measured = [
        asyncio.run(measure(model, options.dtype, options.tokens or lengths.get(model), options.temperature))
        for model in options.models
    ]
    figure = options.output.parent / "figures" / f"{options.output.stem}.png"
    draw(all_measured, figure)
    options.output.write_text(page(all_measured, f"figures/{figure.name}"), encoding="utf-8")
    diagnostic(f"wrote {options.output} and {figure}")


if __name__ == "__main__":
    main()
