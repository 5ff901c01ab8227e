"""What a study works with, and what it has to deliver."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from matplotlib.figure import Figure

from analysis.laboratory import Job, Laboratory, Settings, with_settings
from analysis.tuning import tune
from pipesim.scenario import Scenario
from pipesim.scenario_file import load_scenario
from pipesim.statistics import Interval, mean_interval, paired_ratio

Key = TypeVar("Key")
Value = TypeVar("Value")

SYNCHRONOUS, PIPELINED, PLAIN = {"name": "speculative"}, {"name": "pipeinfer"}, {"name": "autoregressive"}


@dataclass(frozen=True)
class Finding:
    """The answer to a study's question.

    Attributes:
        answer: one or two sentences with the interval; stands in the index, too.
        body: paragraphs and tables in Markdown.
        method: how it was obtained: what was varied, tuned, assumed or invented.
        picture: the figure.
    """

    answer: str
    body: Sequence[str]
    method: Sequence[str]
    picture: Figure


@dataclass(frozen=True)
class Bench:
    """One study's scenario file and the laboratory to simulate it in.

    ``quick``: a test of the study rather than the study: its smallest form, with few seeds.
    """

    laboratory: Laboratory
    path: Path
    quick: bool = False
    notes: dict[str, str] = field(default_factory=dict)
    """What every page has to tell: where a search for settings ended at the end of a ladder."""

    @cached_property
    def seeds(self) -> range:
        """The seeds of results."""
        return range(1, 3 if self.quick else 13)

    def some(self, values: Sequence[Value]) -> Sequence[Value]:
        """All values; in the quick form the first and the last."""
        return [values[0], values[-1]] if self.quick and len(values) > 1 else values

    def scenario(self, *overrides: str) -> Scenario:
        """The study's scenario with ``overrides`` such as ``"acceptance.rate=0.7"``."""
        quick = ["workload.max_new_tokens=12"] if self.quick else []
        return load_scenario(self.path, [*quick, *overrides])

    def map(self, function: Callable[..., Any], jobs: Iterable[Job]) -> list[Any]:
        """As :meth:`Laboratory.map`."""
        return self.laboratory.map(function, jobs)

    def measure(self, variants: Mapping[str, Scenario]) -> "Table":
        """Every variant with every seed; all of them meet the same model pair."""
        return self.measure_all({"": variants})[""]

    def measure_all(self, groups: Mapping[Key, Mapping[str, Scenario]]) -> dict[Key, "Table"]:
        """As :meth:`measure` for each group of variants, all at once."""
        frames = self.laboratory.measure_all(groups.values(), self.seeds)
        return {key: Table(frame, groups[key]) for key, frame in zip(groups, frames, strict=True)}

    def tuned(
        self, scenarios: Mapping[Any, Scenario], policies: Mapping[str, Settings]
    ) -> dict[Any, dict[str, Scenario]]:
        """Each scenario under each policy at its best settings: keyed as ``scenarios``, then as ``policies``."""
        cases = [(key, name) for key in scenarios for name in policies]
        jobs = [(scenarios[key].model_dump_json(), policies[name]) for key, name in cases]
        found: dict[Key, dict[str, Scenario]] = {key: {} for key in scenarios}
        for (key, name), (scenario, _), best in zip(cases, jobs, self.map(tune, jobs), strict=True):
            found[key][name] = with_settings(scenario, policy=best["settings"])
            self.note_ends(f"{key}, {name}", best)
        return found

    def note_ends(self, case: str, best: Mapping[str, Any]) -> None:
        """Keeps for the page that a search ended where it could go no further."""
        if best["ends"] and not self.quick:
            self.notes[case] = f"{case}: {', '.join(best['ends'])}"


@dataclass(frozen=True)
class Table:
    """Measured variants: one line per variant and seed."""

    frame: pd.DataFrame
    variants: Mapping[str, Scenario]

    def values(self, variant: str, column: str = "tokens/s") -> list[float]:
        """One value per seed."""
        return [float(value) for value in self.frame.loc[self.frame["variant"] == variant, column]]

    def mean(self, variant: str, column: str = "tokens/s") -> Interval:
        """Mean over the seeds."""
        return mean_interval(self.values(variant, column))

    def ratio(self, variant: str, baseline: str, column: str = "tokens/s") -> Interval:
        """How many times as large as the baseline, paired by seed."""
        return paired_ratio(self.values(variant, column), self.values(baseline, column))

    def settings(self, variant: str) -> str:
        """The variant's policy settings in short: counts, and confidence bars where they matter."""
        chosen = self.variants[variant].policy.model_extra or {}
        words = [f"{_SHORT[name]}{value:g}" for name, value in chosen.items() if name in _SHORT]
        return " ".join(words)


_SHORT = {
    "max_nodes": "tokens ",
    "micro_batch": "tokens ",
    "branches": "branches ",
    "cutoff": "bar ",
    "p_accept": "bar ",
    "split": "fork ",
    "p_split": "fork ",
    "partitions": "runs ",
}
