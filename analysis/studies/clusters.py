"""What studies of real machines share: both kinds of speculation at their best, and costs that rise with every row."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from analysis import tuning
from analysis.laboratory import Settings, figures, with_settings
from analysis.pages import between, markdown_table
from analysis.studies.bench import PIPELINED, PLAIN, SYNCHRONOUS, Bench, Key, Table
from pipesim.scenario import Scenario
from pipesim.scenario.plans import SLOPE_ROWS, StagePlan
from pipesim.scheduling.runs import RunKind
from pipesim.statistics import Interval

POLICIES = {"pipelined": PIPELINED, "synchronous": SYNCHRONOUS}
MEASURED_SLOPE = 0.1
"""About what public measurements of real kernels say where the roofline says 0 (docs/hardware.md: 0.11 to 0.12)."""
SLOPE_METHOD = (
    "The roofline lets further rows of a run cost nothing while reading the weights takes longer than computing. Real "
    "kernels pay earlier (docs/hardware.md: c = 0.11 and 0.12 on an RTX 3090). Where a c other than 0 is given, a run "
    "of r rows takes the roofline's time, but at least 1 + c (r - 1) times its time for one row."
)

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)


def compared(
    bench: Bench,
    cases: Mapping[Key, Scenario],
    fixed: Mapping[str, Settings] | None = None,
    policies: Mapping[str, Settings] = POLICIES,
    kin: Callable[[Key], Sequence[Key]] | None = None,
) -> dict[Key, Table]:
    """Each case under ``policies`` at their best for it, under ``fixed`` ones as they are, and ``plain`` decoding.

    ``kin``: cases so alike that the settings found for them are tried, too, lest a search that got stuck decides.
    """
    tuned = bench.tuned(cases, policies)
    if kin:
        tuned = _exchanged(bench, cases, tuned, kin)
    also = {**(fixed or {}), "plain": PLAIN}
    as_they_are = {
        key: {name: with_settings(one.model_dump_json(), policy=policy) for name, policy in also.items()}
        for key, one in cases.items()
    }
    return bench.measure_all({key: {**tuned[key], **as_they_are[key]} for key in cases})


def _exchanged(
    bench: Bench,
    cases: Mapping[Key, Scenario],
    tuned: Mapping[Key, Mapping[str, Scenario]],
    kin: Callable[[Key], Sequence[Key]],
) -> dict[Key, dict[str, Scenario]]:
    """Each case with its own settings, or with those of its kin that are faster for it on the seeds of the climb."""
    _, seeds = tuning.SEEDS
    tries = {
        (key, name): [
            with_settings(one.model_dump_json(), policy=tuned[near][name].policy.model_dump())
            for near in (key, *kin(key))
        ]
        for key, one in cases.items()
        for name in tuned[key]
    }
    jobs = [(one.model_dump_json(), seed) for some in tries.values() for one in some for seed in seeds]
    speeds = (float(one["tokens/s"]) for one in bench.map(figures, jobs))
    found: dict[Key, dict[str, Scenario]] = {key: {} for key in cases}
    for (key, name), some in tries.items():
        means = [fmean(next(speeds) for _ in seeds) for _ in some]
        found[key][name] = some[means.index(max(means))]
    return found


def gain(table: Table) -> Interval:
    """Speed of pipelined speculation, synchronous speculation at its best = 1."""
    return table.ratio("pipelined", "synchronous")


def with_slope(scenario: Scenario, slope: float) -> Scenario:
    """The scenario with stages on which every row of a run costs at least the share ``slope`` of a one-row run."""
    if slope == 0:
        return scenario
    context = scenario.prompt_length() + scenario.workload.max_new_tokens / 2
    chunk = scenario.cluster.prefill_chunk
    stages = [
        {"device": plan.device, "layers": plan.layers, "cost": _at_least(plan, slope, context, chunk)}
        for plan in scenario.stages()
    ]
    plain = scenario.model_dump(mode="json")
    return with_settings(scenario.model_dump_json(), cluster={**plain["cluster"], "stages": stages})


def _at_least(plan: StagePlan, slope: float, context: float, chunk: int) -> dict[str, Any]:
    cost = plan.cost_model()
    one = 1e3 * cost.seconds(RunKind.CANONICAL, 1, context)
    rows_ms = {
        rows: max(1e3 * cost.seconds(RunKind.CANONICAL, rows, context), one * (1 + slope * (rows - 1)))
        for rows in _ROWS
    }
    prefill = 1e3 * cost.seconds(RunKind.PREFILL, chunk, context) / chunk
    return {"kind": "table", "rows_ms": rows_ms, "prefill_per_token_ms": prefill}


def stage_table(cases: Mapping[str, Scenario]) -> str:
    """What the stages of each case are, in figures: layers, time of a one-row run, slope c as reported, drafting."""
    rows = []
    for name, scenario in cases.items():
        stages = scenario.stage_summaries()
        layers = [one.layers for one in stages]
        rows.append(
            [
                name,
                len(stages),
                _span(layers, "d"),
                _span([one.run_ms for one in stages], ".1f"),
                _span([one.slope_c for one in stages], ".2f"),
                f"{scenario.drafter(1).level_ms:.2f}",
            ]
        )
    titles = ["", "stages", "layers", "one row, ms", f"c ({SLOPE_ROWS} rows)", "one drafted token, ms"]
    return markdown_table(titles, rows)


def _span(values: Sequence[float], digits: str) -> str:
    low, high = f"{min(values):{digits}}", f"{max(values):{digits}}"
    return low if low == high else f"{low} to {high}"


def gain_rows(
    tables: Mapping[tuple[Any, ...], Table],
    lines: Mapping[tuple[Any, ...], str],
    columns: Sequence[Any],
    baseline: str = "synchronous",
) -> str:
    """Gains over a baseline with intervals: one line per entry of ``lines``; tables' keys are ``(*line, column)``."""
    rows = [
        [label, *(between(tables[(*held, one)].ratio("pipelined", baseline)) for one in columns)]
        for held, label in lines.items()
    ]
    return markdown_table(["", *map(str, columns)], rows)
