"""What each of PipeInfer's mechanisms is worth: all of them, all but one, and the baselines, each at its best settings.

``python -m analysis.ablation -o docs/ablation.md``
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from analysis import tuning
from analysis.laboratory import Laboratory, Settings, laboratory, with_settings
from analysis.pages import fill, plus_minus, settings_list
from analysis.tuning import tune
from pipesim.cli.common import check_outputs, diagnostic
from pipesim.errors import BadInputError, PipesimError
from pipesim.scenario import Scenario, TraceAcceptance
from pipesim.scenario_file import load_scenario

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


def variants(laboratory: Laboratory, scenario: Scenario) -> dict[str, dict[str, Any]]:
    """The table's rows, as :func:`tune` found them; the first one is PipeInfer with everything on."""
    asked: dict[str, Settings] = {"pipeinfer": {"name": "pipeinfer"}, "speculative": {"name": "speculative"}}
    asked |= {f"{name}, retuned": {"name": "pipeinfer", **one} for name, one in MECHANISMS.items()}
    jobs = [(scenario.model_dump_json(), fixed) for fixed in asked.values()]
    tuned = dict(zip(asked, laboratory.map(tune, jobs), strict=True))
    places = {name: row["place"] for name, row in tuned.items()}
    again = [(*job, _starts(place, places.values())) for job, place in zip(jobs, places.values(), strict=True)]
    tuned = dict(zip(asked, laboratory.map(tune, again), strict=True))
    rows = {"pipeinfer": tuned["pipeinfer"]}
    for name, one in MECHANISMS.items():
        rows[name] = {"settings": {**tuned["pipeinfer"]["settings"], **one}, "ends": [], "tried": 0}
        rows[f"{name}, retuned"] = tuned[f"{name}, retuned"]
    rows["speculative"] = tuned["speculative"]
    rows["autoregressive"] = {"settings": {"name": "autoregressive"}, "ends": [], "tried": 0}
    return rows


def _starts(own: Settings, found: Iterable[Settings]) -> list[Settings]:
    """What each search found, but with the row's own partitions. Policies' axes stand in the same order."""
    return [{**own, **dict(zip(list(own)[:4], other.values(), strict=False))} for other in found]


def relative_to(frame: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Speeds in relation to those of ``variant`` with the same seed: one column per variant, one line per seed."""
    speeds = frame.pivot(index="seed", columns="variant", values="tokens/s")
    return speeds.div(speeds[variant], axis=0)


def table(frame: pd.DataFrame) -> str:
    """Mean and confidence interval of every column as a Markdown table; speeds are relative to the first row's."""
    names = list(frame["variant"].unique())
    ratios = relative_to(frame, names[0])
    lines = [f"| policy | {' | '.join(DIGITS)} |", f"|---{'|---:' * len(DIGITS)}|"]
    for name in names:
        columns = frame[frame["variant"] == name].set_index("seed").assign(**{"relative speed": ratios[name]})
        cells = [plus_minus(columns[title], digits) for title, digits in DIGITS.items()]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def page(laboratory: Laboratory, path: Path, scenario: Scenario, seeds: Sequence[int]) -> str:
    """The whole document.

    Raises:
        BadInputError: the scenario's generations cannot differ by seed, or have no speed.
    """
    if isinstance(scenario.acceptance, TraceAcceptance):
        raise BadInputError("acceptance.kind: a recorded trace is the same with every seed, use kind: iid")
    rows = variants(laboratory, scenario)
    plain = scenario.model_dump_json()
    policies = {name: with_settings(plain, policy=row["settings"]) for name, row in rows.items()}
    frame = laboratory.measure(policies, seeds)
    paragraphs = [
        "# What each mechanism is worth",
        f"Simulated, not measured: `{path}`, {len(scenario.stages())} stages, {scenario.workload.max_new_tokens} new "
        "tokens per generation.",
        *conclusions(frame),
        table(frame),
        fill(
            f"Mean and 95 % confidence interval over {len(seeds)} seeds. All policies meet the same text and the same "
            "lucky and unlucky positions, so relative speeds are paired by seed; every row generated the same text. "
            "A row with one mechanism changed has the other settings of the first row; *retuned*, those that are best "
            "for itself."
        ),
        fill(
            "Bubbles: share of all stages' time, until the user has all tokens, in which a stage stood idle. Wasted "
            "compute: share of all stage time that brought no text, whatever the cause."
        ),
        "## Settings",
        fill(f"{tuning.METHOD} Every search climbed once more from what each of the others found. Chosen were:"),
        settings_list(rows),
        "Made by `python -m analysis.ablation -o docs/ablation.md`.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def conclusions(frame: pd.DataFrame) -> Iterator[str]:
    """What the table says in words: the gain over the baselines, and what becomes of it without each mechanism."""
    gains = [plus_minus(relative_to(frame, baseline)["pipeinfer"], 2) for baseline in ("speculative", "autoregressive")]
    yield fill(
        f"PipeInfer is **{gains[0]} times as fast as synchronous speculation** and {gains[1]} times as fast as plain "
        "decoding, each at its own best settings."
    )
    ratios = relative_to(frame, "pipeinfer")
    losses = []
    for name in MECHANISMS:
        same, retuned = (plus_minus(100 * (ratios[row] - 1), 1) for row in (name, f"{name}, retuned"))
        losses.append(f"* {name}: {same} % at the same settings, {retuned} % retuned")
    yield "PipeInfer's speed changes"
    yield "\n".join(losses)
    yield fill(
        "What is lost after retuning is what a mechanism adds to all that settings can do; the rest is the price of "
        "settings that rely on it."
    )


def main(
    output: Annotated[Path, typer.Option("-o", help="Markdown file to write.")],
    scenario: Annotated[Path, typer.Option(help="Scenario file.")] = Path("scenarios/ablation.yaml"),
    seeds: Annotated[int, typer.Option(min=2, max=1000, help="Generations per row.")] = 30,
) -> None:
    """Tune every policy, and write the ablation table."""
    try:
        check_outputs(output)
        with laboratory() as bench:
            text = page(bench, scenario, load_scenario(scenario), range(1, seeds + 1))
        output.write_text(text, encoding="utf-8")
    except (PipesimError, OSError) as problem:
        diagnostic(f"error: {problem}")
        raise typer.Exit(2 if isinstance(problem, BadInputError) else 1) from None


if __name__ == "__main__":
    typer.run(main)
