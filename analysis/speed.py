"""Measures real generations with SmolLM2-135M on this machine: tokens/s by prompt, policy and stages; cost of a hop.

``python -m analysis.speed -o docs/speed.md`` starts one pipeline for each number of stages and generates on it again
and again, prompts and policies in turns, so that a slower minute of the machine hits all of them. It writes a page with
medians and spreads.
"""

import argparse
import asyncio
import os
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise, product
from pathlib import Path

import pandas as pd

from analysis.prompts import PROMPTS, Prompt
from backends.cluster import ClusterPlan, DrafterPart, running_pipeline, stage_parts
from backends.head import Head
from backends.models.finding import DEFAULT_MODEL
from backends.models.loading import open_model
from backends.pipeline import Pipeline
from backends.placement import split_layers
from backends.sampling import Sampling
from backends.tokenizer import open_tokenizer
from pipesim.cli.real import LOOK_UP_SETTINGS
from pipesim.metrics import compute_metrics
from pipesim.recorder import Recorder
from pipesim.scheduling.events import GenerationStarted
from pipesim.scheduling.policy import make_policy
from pipesim.scheduling.scheduler import Scheduler
from pipesim.trace import Trace

TOKENS = 80
STAGES = (1, 2)
PLAIN = "autoregressive"
POLICIES = (PLAIN, "speculative", "pipeinfer")
SEED = 1


class Bench:
    """Generations of ``tokens`` tokens on pipelines of ``dtype``, with the n-gram drafter."""

    def __init__(self, dtype: str, tokens: int = TOKENS) -> None:
        self._source = open_model(DEFAULT_MODEL)
        self._tokenizer = open_tokenizer(self._source)
        self._dtype, self._tokens = dtype, tokens

    def plan(self, stages: int) -> ClusterPlan:
        """A pipeline of so many processes here, one thread each, and a drafter beside them."""
        config = self._source.config
        parts = stage_parts(split_layers(config, stages))
        return ClusterPlan(
            DEFAULT_MODEL, parts, DrafterPart("ngram", config.vocabulary, config.max_context), self._dtype
        )

    async def generate(self, pipeline: Pipeline, prompt: Prompt, policy: str) -> Trace:
        """One generation, its text made and thrown away as it comes."""
        encoded = (
            self._tokenizer.encode_chat([{"role": "user", "content": prompt.text}])
            if prompt.chat
            else self._tokenizer.encode(prompt.text)
        )
        started = GenerationStarted(tuple(encoded), self._tokens, self._tokenizer.eos_ids)
        scheduler = Scheduler(make_policy(policy, LOOK_UP_SETTINGS.get(policy)))
        recorder = Recorder(scheduler, SEED, [f"stage {index}" for index in range(len(pipeline.stages))])
        stream = self._tokenizer.stream()

        def on_tokens(tokens: tuple[int, ...]) -> None:
            stream.feed(tokens)

        sampling = Sampling(temperature=prompt.temperature, seed=SEED)
        await Head(pipeline, recorder, on_tokens).generate(started, sampling)
        return recorder.trace()


def hops_ms(trace: Trace) -> list[float]:
    """Gaps between the end of each run on a stage and its start on the next one."""
    visits = defaultdict(list)
    for span in trace.spans:
        visits[span.run_id].append((span.start_s, span.end_s))
    return [1e3 * (after[0] - before[1]) for spans in visits.values() for before, after in pairwise(sorted(spans))]


async def measure(
    dtype: str, stages: Iterable[int], repeats: int, prompts: Sequence[Prompt] = PROMPTS
) -> tuple[pd.DataFrame, list[float]]:
    """Rows of (prompt, policy, stages, tokens_per_second, text), and all hops of plain decoding on the most stages.

    Raises ValueError if two policies or pipelines give different texts.
    """
    bench = Bench(dtype)
    rows, hops = [], defaultdict[int, list[float]](list)
    for count in stages:
        async with running_pipeline(bench.plan(count)) as pipeline:
            for repeat, prompt, policy in product(range(repeats), prompts, POLICIES):
                trace = await bench.generate(pipeline, prompt, policy)
                speed = compute_metrics(trace).tokens_per_second
                rows.append((prompt.name, policy, count, speed, trace.tokens))
                print(f"{count} stages, {repeat}: {prompt.name}, {policy}: {speed:.1f} tokens/s", file=sys.stderr)
                if policy == PLAIN:
                    hops[count] += hops_ms(trace)
    results = pd.DataFrame(rows, columns=["prompt", "policy", "stages", "tokens_per_second", "tokens"])
    if (results.groupby("prompt")["tokens"].nunique() > 1).any():
        raise ValueError("the texts differ: this must never happen")
    return results, hops[max(hops)]


def speeds_of(results: pd.DataFrame, prompt: str, policy: str, stages: int) -> "pd.Series[float]":
    """Tokens per second, one for each repeat."""
    same = (results["prompt"] == prompt) & (results["policy"] == policy) & (results["stages"] == stages)
    return results[same]["tokens_per_second"]


def gain(results: pd.DataFrame, prompt: str, policy: str, stages: int) -> float:
    """How many times as fast as plain decoding on the same stages, medians of the repeats."""
    plain = speeds_of(results, prompt, PLAIN, stages).median()
    return float(speeds_of(results, prompt, policy, stages).median() / plain)


def table(results: pd.DataFrame, repeating: bool) -> str:
    """One row for each prompt of a kind and policy, one column for each number of stages."""
    counts = sorted(int(count) for count in results["stages"].unique())
    lines = [
        f"| prompt | policy | {' | '.join(f'{count} stage' + 's' * (count > 1) for count in counts)} |",
        "|---|---|" + "---:|" * len(counts),
    ]
    for prompt, policy in product((one for one in PROMPTS if one.repeats is repeating), POLICIES):
        cells = []
        for count in counts:
            speeds = speeds_of(results, prompt.name, policy, count)
            times = "" if policy == PLAIN else f", **{gain(results, prompt.name, policy, count):.2f}x**"
            cells.append(f"{speeds.median():.1f} ({speeds.min():.1f} .. {speeds.max():.1f}){times}")
        lines.append(f"| {prompt.name} | {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(results: pd.DataFrame, hops: list[float], dtype: str) -> str:
    """The page as Markdown."""
    repeats = results.groupby(["prompt", "policy", "stages"]).size().min()
    settings = "\n".join(
        f"* {policy}: " + ", ".join(f"{key} {value}" for key, value in chosen.items())
        for policy, chosen in LOOK_UP_SETTINGS.items()
    )
    deciles = statistics.quantiles(hops, n=10)
    stages = " ".join(map(str, sorted(results["stages"].unique())))
    return f"""# How fast real generations are

SmolLM2-135M in {dtype}, one thread per stage, n-gram drafter, all processes on one machine
({platform.machine()}, {os.cpu_count()} cores). Tokens per second of decoding, (n - 1) / (last - first), wall clock at
the output stream; median of {repeats} runs of up to {TOKENS} tokens (lowest .. highest), prompts and policies in turns;
then how many times as fast as plain decoding on the same stages. All texts were equal.

Answers that repeat text of the prompt, chosen before anything was tuned (`analysis/prompts.py`):

{table(results, repeating=True)}

Answers of which the drafter knows nothing, sampled at temperature 0.8:

{table(results, repeating=False)}

Stages, head and drafter share the cores. These settings are what `pipesim generate --drafter ngram` sets by default:

{settings}

A hop between two stages, from the end of a run's computation on one to its start on the next (gRPC over loopback,
serialisation): median {statistics.median(hops):.2f} ms, 10th to 90th percentile
{deciles[0]:.2f} .. {deciles[-1]:.2f} ms, over {len(hops)} hops of plain decoding on {results["stages"].max()} stages.

Made by `python -m analysis.speed --dtype {dtype} --stages {stages} -o docs/speed.md`.
"""


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES, help="numbers of stages")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each setting")
    arguments = parser.parse_args()
    results, hops = asyncio.run(measure(arguments.dtype, arguments.stages, arguments.repeats))
    arguments.output.write_text(page(results, hops, arguments.dtype), encoding="utf-8")


if __name__ == "__main__":
    main()
