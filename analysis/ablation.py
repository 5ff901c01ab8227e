"""What each of PipeInfer's mechanisms is worth: all of them, all but one, and the baselines.

``python -m analysis.ablation -o docs/ablation.md``
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from analysis.statistics import confidence_95
from pipesim.errors import InvariantError
from pipesim.metrics import Metrics, compute_metrics
from pipesim.scenario import Scenario
from pipesim.scenario_file import load_scenario
from pipesim.simulation.pipeline import simulate

SIZES = range(1, 9)
"""Micro-batch sizes tried for each speculating policy: a fair comparison gives each its best one."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table: ``scale * value`` of each generation, with ``digits`` after the point."""

    title: str
    attribute: str
    scale: float
    digits: int

    def values(self, generations: Sequence[Metrics]) -> list[float]:
        """The figure of each generation."""
        found = []
        for metrics in generations:
            value: object = metrics
            for part in self.attribute.split("."):
                value = getattr(value, part)
            figure = sum(value) / len(value) if isinstance(value, tuple) else value
            if not isinstance(figure, float):
                raise ValueError(f"{self.attribute} is {figure!r} and has no mean")
            found.append(self.scale * figure)
        return found


COLUMNS = (
    Column("tokens/s", "tokens_per_second", 1.0, 2),
    Column("TTFT, ms", "ttft_s", 1e3, 1),
    Column("ITL p95, ms", "itl_s.p95", 1e3, 1),
    Column("utilisation, %", "stage_utilization", 100.0, 1),
    Column("bubbles, %", "bubble_fraction", 100.0, 1),
    Column("wasted compute, %", "wasted_compute_fraction.total", 100.0, 1),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: a policy, and what it did with each seed."""

    name: str
    generations: list[Metrics]
    texts: list[tuple[int, ...]]


def measure(name: str, scenario: Scenario, policy: dict[str, object], seeds: Sequence[int]) -> Row:
    """Simulates ``scenario`` under ``policy`` (name and settings) once per seed."""
    plain = scenario.model_dump()
    traces = [simulate(Scenario.model_validate({**plain, "policy": policy, "seed": seed})) for seed in seeds]
    return Row(name, [compute_metrics(trace) for trace in traces], [trace.tokens for trace in traces])


def best_size(scenario: Scenario, policy: dict[str, object], key: str, seeds: Sequence[int]) -> int:
    """The value of setting ``key`` with the highest mean speed."""
    speeds = {}
    for size in SIZES:
        row = measure(f"{key} {size}", scenario, {**policy, key: size}, seeds)
        speeds[size] = fmean(COLUMNS[0].values(row.generations))
    return max(speeds, key=lambda size: speeds[size])


def ablate(scenario: Scenario, seeds: Sequence[int]) -> list[Row]:
    """All rows of the table; the first one is PipeInfer with everything on."""
    size = best_size(scenario, {"name": "pipeinfer"}, "micro_batch", seeds)
    nodes = best_size(scenario, {"name": "speculative"}, "max_nodes", seeds)
    complete: dict[str, object] = {"name": "pipeinfer", "micro_batch": size}
    variants: list[tuple[str, dict[str, object]]] = [
        (f"pipeinfer (micro-batch {size})", complete),
        ("without cancellation", {**complete, "cancellation": False}),
        ("without continuous speculation", {**complete, "continuous": False}),
        ("without asynchronous speculation", {**complete, "asynchronous": False}),
        ("without multibuffering", {**complete, "multibuffering": False}),
        ("with redundant canonical runs", {**complete, "always_canonical": True}),
        (f"speculative ({nodes} tokens)", {"name": "speculative", "max_nodes": nodes}),
        ("autoregressive", {"name": "autoregressive"}),
    ]
    rows = [measure(name, scenario, policy, seeds) for name, policy in variants]
    for row in rows:
        if row.texts != rows[0].texts:
            raise InvariantError(f"{row.name} generates another text than {rows[0].name} (I3)")
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; speed is also given relative to the first row, paired by seed."""
    titles = ["policy", *(column.title for column in COLUMNS[:1]), "relative speed"]
    titles += [column.title for column in COLUMNS[1:]]
    lines = [f"| {' | '.join(titles)} |", f"|---{'|---:' * (len(titles) - 1)}|"]
    reference = COLUMNS[0].values(rows[0].generations)
    for row in rows:
        speeds = COLUMNS[0].values(row.generations)
        ratios = [speed / whole for speed, whole in zip(speeds, reference, strict=True)]
        cells = [_cell(speeds, COLUMNS[0].digits), _cell(ratios, 3)]
        cells += [_cell(column.values(row.generations), column.digits) for column in COLUMNS[1:]]
        lines.append(f"| {' | '.join([row.name, *cells])} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    mean, half = confidence_95(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def page(path: Path, scenario: Scenario, seeds: Sequence[int]) -> str:
    """The whole document."""
    stages, tokens, sizes = len(scenario.stages()), scenario.workload.max_new_tokens, f"{SIZES[0]} to {SIZES[-1]}"
    return f"""# What each mechanism is worth

Simulated, not measured: `{path}`, {stages} stages, {tokens} new tokens per generation.
Mean and 95 % confidence interval over {len(seeds)} seeds. All policies meet the same text and the same lucky
and unlucky positions, so relative speeds are paired by seed; every row generated the same text. Micro-batch and tree
sizes are the best of {sizes} for PipeInfer with everything on and for synchronous speculation, chosen on these seeds.

{table(ablate(scenario, seeds))}

Bubbles: share of all stages' time, until the user has all tokens, in which a stage stood idle. Wasted compute: share of
all stage time that brought no text, whatever the cause. Made by `python -m analysis.ablation -o docs/ablation.md`.
"""


def main(
    output: Annotated[Path, typer.Option("-o", help="Markdown file to write.")],
    scenario: Annotated[Path, typer.Option(help="Scenario file.")] = Path("scenarios/ablation.yaml"),
    seeds: Annotated[int, typer.Option(min=2, help="Generations per row.")] = 30,
) -> None:
    """Write the ablation table."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(scenario, load_scenario(scenario), range(1, seeds + 1)), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
