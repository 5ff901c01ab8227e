"""What each of PipeInfer's mechanisms is worth: all of them, all but one, and the baselines, each at its best settings.

``python -m analysis.ablation -o docs/ablation.md``
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from pipesim.cli.common import check_outputs, diagnostic
from pipesim.errors import BadInputError, InvariantError, PipesimError
from pipesim.metrics import Metrics, compute_metrics
from pipesim.scenario import IidAcceptance, Scenario
from pipesim.scenario_file import load_scenario
from pipesim.simulation.pipeline import simulate
from pipesim.statistics import mean_interval

Settings = Mapping[str, Any]
"""A policy's section of a scenario: its name and settings."""

HEATS = ((range(1001, 1003), 12), (range(1003, 1015), 1))
"""Tuning: seeds, and how many of the settings tried on them go on. The table is made with other seeds: 1, 2, ..."""
SPLITS = (0.1, 0.15, 0.2)
CUTOFFS = (0.0, 0.5, 0.6, 0.7)

MECHANISMS: Mapping[str, Settings] = {
    "without cancellation": {"cancellation": False},
    "without continuous speculation": {"continuous": False},
    "without asynchronous speculation": {"asynchronous": False},
    "without multibuffering": {"multibuffering": False},
    "with redundant canonical runs": {"always_canonical": True},
}
DIGITS = {
    "tokens/s": 2,
    "relative speed": 3,
    "TTFT, ms": 1,
    "ITL p95, ms": 1,
    "utilisation, %": 1,
    "bubbles, %": 1,
    "wasted compute, %": 1,
}


def speculative_grid() -> Iterator[Settings]:
    """Synchronous speculation: everything that it can be set to."""
    for nodes, cutoff in product(range(1, 17), CUTOFFS):
        plain = {"name": "speculative", "max_nodes": nodes, "cutoff": cutoff}
        yield {**plain, "branches": 1}
        for branches, split in product((2, 4, 8), SPLITS):
            if branches <= nodes:
                yield {**plain, "branches": branches, "split": split}


def pipeinfer_grid(mechanism: Settings) -> Iterator[Settings]:
    """PipeInfer with ``mechanism`` changed. A single buffer has a single partition."""
    partitions = (1,) if mechanism.get("multibuffering") is False else (4, 6, 8, 16)
    for size, p_accept, count in product((1, 2, 3, 4, 6, 8), CUTOFFS, partitions):
        plain = {"name": "pipeinfer", **mechanism, "micro_batch": size, "partitions": count, "p_accept": p_accept}
        yield {**plain, "branches": 1}
        if size > 1:
            yield from ({**plain, "branches": 2, "p_split": split} for split in SPLITS)


def figures(metrics: Metrics) -> dict[str, float]:
    """The table's columns of one generation, without the relative speed."""
    itl, waste = metrics.itl_s, metrics.wasted_compute_fraction
    speed, ttft, bubbles = metrics.tokens_per_second, metrics.ttft_s, metrics.bubble_fraction
    if itl is None or waste is None or speed is None or ttft is None or bubbles is None:
        raise BadInputError("workload.max_new_tokens: generations of a single token have no speed, use more")
    return {
        "tokens/s": speed,
        "TTFT, ms": 1e3 * ttft,
        "ITL p95, ms": 1e3 * itl.p95,
        "utilisation, %": 100 * (1 - bubbles),
        "bubbles, %": 100 * bubbles,
        "wasted compute, %": 100 * waste.total,
    }


def generate(scenario: Scenario, job: tuple[Settings, int]) -> tuple[dict[str, float], tuple[int, ...]]:
    """Simulates ``scenario`` under a policy with a seed: the figures and the text."""
    policy, seed = job
    trace = simulate(Scenario.model_validate({**scenario.model_dump(), "policy": policy, "seed": seed}))
    return figures(compute_metrics(trace)), trace.tokens


@dataclass(frozen=True, slots=True)
class Laboratory:
    """Simulates one scenario under many policies, on all cores."""

    scenario: Scenario
    pool: ProcessPoolExecutor

    def measure(self, policies: Mapping[str, Settings], seeds: Sequence[int]) -> pd.DataFrame:
        """One line per policy and seed, in order: ``policy``, ``seed``, and the figures.

        Raises:
            InvariantError: two policies generated different texts with one seed (I3).
        """
        jobs = [(name, seed) for name in policies for seed in seeds]
        settings = [(policies[name], seed) for name, seed in jobs]
        results = self.pool.map(partial(generate, self.scenario), settings, chunksize=8)
        lines: list[dict[str, Any]] = []
        texts: dict[int, tuple[int, ...]] = {}
        for (name, seed), (found, text) in zip(jobs, results, strict=True):
            if texts.setdefault(seed, text) != text:
                raise InvariantError(f"{name} generates another text than {jobs[0][0]} with seed {seed} (I3)")
            lines.append({"policy": name, "seed": seed, **found})
        return pd.DataFrame(lines)

    def tune(self, grid: Iterable[Settings]) -> Settings:
        """The settings with the highest mean speed, found in ``HEATS``."""
        entrants = {str(settings): settings for settings in grid}
        for seeds, places in HEATS:
            speeds = self.measure(entrants, seeds).groupby("policy", sort=False)["tokens/s"].mean()
            entrants = {name: entrants[name] for name in speeds.nlargest(places).index}
        (best,) = entrants.values()
        return best


def variants(laboratory: Laboratory) -> dict[str, Settings]:
    """The table's rows; the first one is PipeInfer with everything on."""
    best = laboratory.tune(pipeinfer_grid({}))
    rows = {"pipeinfer": best}
    for name, mechanism in MECHANISMS.items():
        rows[name] = {**best, **mechanism}
        rows[f"{name}, retuned"] = laboratory.tune(pipeinfer_grid(mechanism))
    rows["speculative"] = laboratory.tune(speculative_grid())
    rows["autoregressive"] = {"name": "autoregressive"}
    return rows


def relative_to(frame: pd.DataFrame, policy: str) -> pd.DataFrame:
    """Speeds in relation to those of ``policy`` with the same seed: one column per policy, one line per seed."""
    speeds = frame.pivot(index="seed", columns="policy", values="tokens/s")
    return speeds.div(speeds[policy], axis=0)


def table(frame: pd.DataFrame) -> str:
    """Mean and confidence interval of every column as a Markdown table; speeds are relative to the first row's."""
    names = list(frame["policy"].unique())
    ratios = relative_to(frame, names[0])
    lines = [f"| policy | {' | '.join(DIGITS)} |", f"|---{'|---:' * len(DIGITS)}|"]
    for name in names:
        columns = frame[frame["policy"] == name].set_index("seed").assign(**{"relative speed": ratios[name]})
        cells = [interval(columns[title], digits) for title, digits in DIGITS.items()]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def interval(values: Iterable[float], digits: int) -> str:
    """Mean and 95 % confidence interval."""
    mean = mean_interval(list(values))
    return f"{mean.estimate:.{digits}f} ± {mean.half_width:.{digits}f}"


def settings_list(rows: Mapping[str, Settings]) -> str:
    """What was chosen for each row, as a Markdown list."""
    lines = []
    for name, settings in rows.items():
        chosen = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "name")
        if chosen:
            lines.append(f"* {name}: {chosen}")
    return "\n".join(lines)


def page(path: Path, scenario: Scenario, seeds: Sequence[int]) -> str:
    """The whole document.

    Raises:
        BadInputError: the scenario's generations cannot differ by seed, or have no speed.
    """
    if not isinstance(scenario.acceptance, IidAcceptance):
        raise BadInputError("acceptance.kind: a recorded trace is the same with every seed, use kind: iid")
    with ProcessPoolExecutor() as pool:
        laboratory = Laboratory(scenario, pool)
        rows = variants(laboratory)
        frame = laboratory.measure(rows, seeds)
    first, second = (len(seeds) for seeds, _ in HEATS)
    grids = len(list(speculative_grid())), len(list(pipeinfer_grid({})))
    paragraphs = [
        "# What each mechanism is worth",
        f"Simulated, not measured: `{path}`, {len(scenario.stages())} stages, {scenario.workload.max_new_tokens} new "
        "tokens per generation.",
        *conclusions(frame),
        table(frame),
        _fill(
            f"Mean and 95 % confidence interval over {len(seeds)} seeds. All policies meet the same text and the same "
            "lucky and unlucky positions, so relative speeds are paired by seed; every row generated the same text. "
            "A row with one mechanism changed has the other settings of the first row; *retuned*, those that are best "
            "for itself."
        ),
        _fill(
            "Bubbles: share of all stages' time, until the user has all tokens, in which a stage stood idle. Wasted "
            "compute: share of all stage time that brought no text, whatever the cause."
        ),
        "## Settings",
        _fill(
            f"All were tuned alike: every setting of a grid on {first} seeds, the {HEATS[0][1]} fastest on {second} "
            "others, and the fastest of those went into the table, which has seeds of its own. The grid has "
            f"{grids[0]} entries for synchronous speculation (tokens, branches, both confidence bars) and {grids[1]} "
            "for PipeInfer (the same, and partitions). Chosen were:"
        ),
        settings_list(rows),
        "Made by `python -m analysis.ablation -o docs/ablation.md`.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def conclusions(frame: pd.DataFrame) -> Iterator[str]:
    """What the table says in words: the gain over the baselines, and what becomes of it without each mechanism."""
    gains = [interval(relative_to(frame, baseline)["pipeinfer"], 2) for baseline in ("speculative", "autoregressive")]
    yield _fill(
        f"PipeInfer is **{gains[0]} times as fast as synchronous speculation** and {gains[1]} times as fast as plain "
        "decoding, each at its own best settings."
    )
    ratios = relative_to(frame, "pipeinfer")
    losses = []
    for name in MECHANISMS:
        same, retuned = (interval(100 * (ratios[row] - 1), 1) for row in (name, f"{name}, retuned"))
        losses.append(f"* {name}: {same} % at the same settings, {retuned} % retuned")
    yield "PipeInfer's speed changes"
    yield "\n".join(losses)
    yield _fill(
        "What is lost after retuning is what a mechanism adds to all that settings can do; the rest is the price of "
        "settings that rely on it."
    )


def _fill(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def main(
    output: Annotated[Path, typer.Option("-o", help="Markdown file to write.")],
    scenario: Annotated[Path, typer.Option(help="Scenario file.")] = Path("scenarios/ablation.yaml"),
    seeds: Annotated[int, typer.Option(min=2, max=1000, help="Generations per row.")] = 30,
) -> None:
    """Tune every policy, and write the ablation table."""
    try:
        check_outputs(output)
        text = page(scenario, load_scenario(scenario), range(1, seeds + 1))
        output.write_text(text, encoding="utf-8")
    except (PipesimError, OSError) as problem:
        diagnostic(f"error: {problem}")
        raise typer.Exit(2 if isinstance(problem, BadInputError) else 1) from None


if __name__ == "__main__":
    typer.run(main)
