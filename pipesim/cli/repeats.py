"""How one scenario's results under several seeds are shown together."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pipesim.cli.common import early_end, printing, result, show, stages_table
from pipesim.scenario.plans import StageSummary
from pipesim.statistics import Interval, mean_interval, significant
from pipesim.summary import Summary
from pipesim.sweep import flatten

if TYPE_CHECKING:
    from pipesim.simulation.bound import Bound


def report_repeats(
    outcomes: Iterable[tuple[Summary, "Bound"]], stages: Sequence[StageSummary], *, as_json: bool
) -> list[str]:
    """Shows means and intervals of all figures; returns what is wrong with generations that ended early."""
    shown: dict[str, Any] = {}
    figures, seeds, problems = [], [], []
    for summary, bound in outcomes:
        one = result(summary, stages=stages, bound=bound)
        shown = shown or one
        figures.append({**one["metrics"], "bound": one["bound"]})
        seeds.append(summary.seed)
        if problem := early_end(summary):
            problems.append(f"seed {summary.seed}: {problem}")
    with printing():
        if as_json:
            means = over_seeds(figures, _mean)
            shown |= {"bound": means.pop("bound"), "metrics": means}
            print(json.dumps({**shown, "intervals_95": over_seeds(figures, _limits), "seeds": seeds}, allow_nan=False))
        else:
            title = f"{shown['policy']}, seeds {seeds[0]} to {seeds[-1]}: means and their 95 % confidence intervals"
            show(_table(title, flatten(over_seeds(figures, mean_interval))))
            show(stages_table(stages))
    return problems


def over_seeds(values: Sequence[Any], figure: Callable[[Sequence[float]], Any]) -> Any:
    """Nested figures of several seeds as one: ``figure`` of each. None is left out; what is None always, stays so."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], dict):
        return {key: over_seeds([one[key] for one in known], figure) for key in known[0]}
    if isinstance(known[0], list | tuple):
        return [over_seeds(entries, figure) for entries in zip(*known, strict=True)]
    return figure(known)


def _mean(values: Sequence[float]) -> float:
    return mean_interval(values).estimate


def _limits(values: Sequence[float]) -> list[float] | None:
    mean = mean_interval(values)
    return None if math.isnan(mean.low) else [mean.low, mean.high]


def _table(title: str, figures: dict[str, Interval | None]) -> Table:
    table = Table(title=title, box=None, header_style="")
    table.add_column("figure", style="bold")
    table.add_column("mean", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, one in figures.items():
        if one is None:
            table.add_row(name, "-", "")
        else:
            limits = "" if math.isnan(one.low) else f"[{significant(one.low, 4)}, {significant(one.high, 4)}]"
            table.add_row(name, significant(one.estimate, 4), rf"\{limits}" if limits else "")
    return table
