"""Measures real generations with SmolLM2-135M on this machine: tokens/s by policy and stages, and the cost of a hop.

``python -m analysis.speed -o docs/speed.md`` runs ``pipesim generate`` again and again, the settings in turns, so that
a slower minute of the machine hits all of them, and writes a page with medians and spreads.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

PROMPT = "Count from one to twenty."
TOKENS = 64
STAGES = (1, 2, 4)
POLICIES = {
    "autoregressive": ["--policy", "autoregressive"],
    "speculative, n-gram drafter": ["--policy", "speculative", "--drafter", "ngram"],
    "pipeinfer, n-gram drafter": ["--policy", "pipeinfer", "--drafter", "ngram", "--set", "policy.p_accept=0.3"],
    "speculative, planted drafter, 80 % right": ["--policy", "speculative", "--drafter", "planted"],
    "pipeinfer, planted drafter, 80 % right": ["--policy", "pipeinfer", "--drafter", "planted"],
}


def generate(options: list[str], stages: int, trace: Path) -> dict[str, Any]:
    """One generation by the command line; its JSON object. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-c", "from pipesim.cli import main; main()", "generate", PROMPT, "--json"]
    command += ["--stages", str(stages), "--max-new-tokens", str(TOKENS), "--trace", str(trace)]
    command += ["--set", "workload.ignore_eos=true", *options]
    printed: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return printed


def hops_ms(trace: Path) -> list[float]:
    """Gaps between the end of each run on a stage and its start on the next one."""
    spans = defaultdict(list)
    for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]:
        if event["ph"] == "X" and event["cat"] == "stage":
            spans[event["args"]["run"]].append((event["ts"], event["ts"] + event["dur"]))
    return [(after[0] - before[1]) / 1e3 for visits in spans.values() for before, after in pairwise(sorted(visits))]


def measure(repeats: int) -> tuple[pd.DataFrame, list[float]]:
    """Rows of (policy, stages, tokens_per_second, tokens), and all hops of plain decoding on the most stages."""
    rows, hops = [], []
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        for repeat in range(repeats):
            for name, options in POLICIES.items():
                for stages in STAGES:
                    printed = generate(options, stages, trace)
                    speed = printed["metrics"]["tokens_per_second"]
                    rows.append((name, stages, speed, tuple(printed["tokens"])))
                    print(f"repeat {repeat}, {stages} stages, {name}: {speed:.1f} tokens/s", file=sys.stderr)
                    if name == "autoregressive" and stages == max(STAGES):
                        hops += hops_ms(trace)
    return pd.DataFrame(rows, columns=["policy", "stages", "tokens_per_second", "tokens"]), hops


def page(results: pd.DataFrame, hops: list[float], repeats: int) -> str:
    """The page as Markdown. Raises ValueError if the texts differ."""
    if results["tokens"].nunique() != 1:
        raise ValueError("the texts differ: this must never happen")
    heading = " | ".join(f"{stages} stage{'s' * (stages > 1)}" for stages in STAGES)
    lines = [f"| policy | {heading} |", "|---|" + "---:|" * len(STAGES)]
    for name in POLICIES:
        cells = []
        for stages in STAGES:
            speeds = results[(results["policy"] == name) & (results["stages"] == stages)]["tokens_per_second"]
            cells.append(f"{speeds.median():.1f} ({speeds.min():.1f} .. {speeds.max():.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    deciles = statistics.quantiles(hops, n=10)
    return f"""# How fast real generations are

SmolLM2-135M in float32, one thread per stage, all processes on one machine
({platform.machine()}, {os.cpu_count()} cores). Tokens per second of decoding, (n - 1) / (last - first), wall clock at
the output stream; median of {repeats} runs of {TOKENS} tokens (lowest .. highest), the settings in turns. All texts
were equal.

{table}

Stages, head and drafter share the cores. The planted drafter knows the text and errs on purpose: it costs nothing,
so it shows what a policy makes of good drafts, not what drafting costs.

A hop between two stages, from the end of a run's computation on one to its start on the next (gRPC over loopback,
serialisation, two thread changes): median {statistics.median(hops):.2f} ms, 10th to 90th percentile
{deciles[0]:.2f} .. {deciles[-1]:.2f} ms, over {len(hops)} hops of plain decoding on {max(STAGES)} stages.

Made by `python -m analysis.speed -o docs/speed.md`.
"""


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each setting")
    arguments = parser.parse_args()
    results, hops = measure(arguments.repeats)
    arguments.output.write_text(page(results, hops, arguments.repeats), encoding="utf-8")


if __name__ == "__main__":
    main()
