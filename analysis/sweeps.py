"""What a sweep says: which key is what in table and figure, means with intervals, and where policies cross."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations, pairwise, product, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.pages import fill, markdown_table
from pipesim.errors import BadInputError
from pipesim.statistics import Interval, bootstrap_interval, mean_interval, significant
from pipesim.sweep import Axis

_UNITS = {"gbps": "Gbit/s", "ms": "ms", "us": "µs", "s": "s", "bytes": "bytes"}
_METRICS = {"tokens_per_second": ("speed", "tokens/s"), "itl_s.mean": ("mean gap between tokens", "s")}
_NAMES = {
    "ttft": "time to first token",
    "itl": "gap between tokens",
    "e2e": "time to last token",
    "links": "link",
    "stages": "stage",
    "hops": "hop",
    "policy": "",
}


@dataclass(frozen=True, slots=True)
class Quantity:
    """A key or metric as people read it: ``value * scale`` is in ``unit``."""

    name: str
    unit: str = ""
    scale: float = 1.0

    @property
    def label(self) -> str:
        """For an axis: ``speed (tokens/s)``."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def text(self, value: Any) -> str:
        """A value with its unit."""
        if isinstance(value, bool) or not isinstance(value, int | float | Interval):
            return f"{value}"
        if isinstance(value, Interval):
            shown = str(Interval(*(self.scale * one for one in (value.estimate, value.low, value.high))))
        else:
            shown = significant(self.scale * value)
        return f"{shown} {self.unit}".rstrip()


def quantity(path: str, values: Sequence[Any] = ()) -> Quantity:
    """Name and unit of a dotted path; bandwidths up to 1 Gbit/s are told in Mbit/s."""
    if path in _METRICS:
        return Quantity(*_METRICS[path])
    words, unit, parts = [], "", path.split(".")
    for part in parts[-3 if parts[-2:-1] and parts[-2].isdecimal() else -2 :]:
        stem, _, ending = part.rpartition("_")
        if stem and ending in _UNITS:
            part, unit = stem, _UNITS[ending]
        words.append(_NAMES.get(part, part.replace("_", " ")))
    if unit == "Gbit/s" and values and max(values) <= 1:
        return Quantity(" ".join(words).strip(), "Mbit/s", 1000.0)
    return Quantity(" ".join(words).strip(), unit)


@dataclass(frozen=True)
class Layout:
    """Which varied key is what: ``x`` axis, one ``line`` per value, one ``panel`` per value; ``rest`` has no place.

    ``x`` is the first key with numbers, the lines are policies if these are varied, else the second key. Seeds are what
    means are taken over.
    """

    axes: tuple[Axis, ...]
    repeats: int
    metric: str
    x: Axis | None
    line: Axis | None
    panel: Axis | None
    rest: tuple[Axis, ...]

    @classmethod
    def of(cls, axes: Sequence[Axis], repeats: int, metric: str) -> "Layout":
        """The layout of a sweep over ``axes``."""
        open_axes = [axis for axis in axes if axis.key != "seed" and len(axis.values) > 1]
        policies = [axis for axis in open_axes if axis.key in ("policy", "policy.name")]
        x = next((axis for axis in open_axes if _numeric(axis)), None)
        others = [axis for axis in open_axes if axis not in (x, *policies)]
        ranked = [*policies, *others]
        line, panel = [*ranked[:2], None, None][:2]
        return cls(tuple(axes), repeats, metric, x, line, panel, tuple(ranked[2:]))

    def check_plot(self) -> None:
        """Raises BadInputError for a sweep that does not fit one figure."""
        if self.x is None:
            raise BadInputError("--plot: no key with several numbers is varied, there is no axis to draw along")
        if self.rest:
            keys = ", ".join(axis.key for axis in self.rest)
            raise BadInputError(f"--plot: three keys at most fit a figure, without a place: {keys}; draw from the rows")

    @cached_property
    def metric_quantity(self) -> Quantity:
        """The metric as people read it."""
        return quantity(self.metric)

    @cached_property
    def lines(self) -> list[str]:
        """What each line is called."""
        return _labels(self.line) if self.line else [self.metric_quantity.name]

    @cached_property
    def panels(self) -> list[str]:
        """What each panel is called: the values of all keys that are neither ``x`` nor ``line``."""
        return [", ".join(names) for names in product(*map(_labels, self._panel_axes()))]

    def _panel_axes(self) -> list[Axis]:
        return [axis for axis in (self.panel, *self.rest) if axis]

    def series(self, frame: pd.DataFrame) -> dict[tuple[str, str], NDArray[np.float64]]:
        """The metric by panel and line: ``[seeds, values of x]`` in the order of the axes, nan where a row failed.

        Raises:
            BadInputError: the metric is no column of numbers.
        """
        if self.metric not in frame or not pd.api.types.is_numeric_dtype(frame[self.metric]):
            numbers = ", ".join(frame.select_dtypes("number").columns)
            raise BadInputError(f"--metric {self.metric}: no column of numbers; there are {numbers}")
        sizes = [len(axis.values) for axis in self.axes]
        values = frame[self.metric].to_numpy(np.float64).reshape([*sizes, self.repeats])
        roles = (self._panel_axes(), [self.line] if self.line else [], [self.x] if self.x else [])
        panels, lines, xs = ([self.axes.index(axis) for axis in role] for role in roles)
        seeds = [i for i in range(len(sizes)) if i not in {*panels, *lines, *xs}]  # and keys with a single value
        cube = values.transpose([*panels, *lines, *seeds, len(sizes), *xs]).reshape(
            [len(self.panels), len(self.lines), -1, len(self.x.values) if self.x else 1]
        )
        return {(panel, line): cube[i, j] for i, panel in enumerate(self.panels) for j, line in enumerate(self.lines)}


def _labels(axis: Axis) -> list[str]:
    """What each value of an axis is called; a policy's settings only where its name does not tell."""
    if all(isinstance(value, dict) for value in axis.values):
        names = [str(value.get("name", "")) for value in axis.values]
        if len(set(names)) == len(names):
            return names
        return [", ".join([str(v) if k == "name" else f"{k} {v}" for k, v in one.items()]) for one in axis.values]
    if axis.key in ("policy.name", "model.name"):
        return [str(value) for value in axis.values]
    known = quantity(axis.key, axis.values if _numeric(axis) else ())
    return [f"{known.name} {known.text(value)}" for value in axis.values]


def _numeric(axis: Axis) -> bool:
    return len(axis.values) > 1 and all(type(value) in (int, float) for value in axis.values)


# -- where lines cross ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Crossing:
    """``lower`` falls below ``upper`` on one side of ``at``: ``under`` it, or else over it.

    ``value``: the metric there. The interval of ``at`` is nan with fewer than five seeds.
    """

    panel: str
    lower: str
    upper: str
    under: bool
    at: Interval
    value: float


def crossings(layout: Layout, series: Mapping[tuple[str, str], NDArray[np.float64]]) -> Iterator[Crossing]:
    """Where the lines of each panel cross, beyond chance.

    Lines are compared by differences paired by seed. Two neighbouring values of ``x`` at which the mean difference has
    opposite signs, both with 95 % confidence (values between where it has no sure sign are skipped), enclose a
    crossing. It lies where the mean difference, interpolated on the scale of ``x``, is zero; its interval is the
    bootstrap's over seeds, if they are five at least. With a single seed signs are taken as they are.
    """
    if layout.x is None:
        return
    order = np.argsort(layout.x.values)
    xs = np.array(layout.x.values, dtype=np.float64)[order]
    scale, back = (np.log(xs), np.exp) if layout.x.log else (xs, _same)
    for panel in layout.panels:
        for earlier, later in combinations(layout.lines, 2):
            one, other = (series[panel, line][:, order] for line in (earlier, later))
            differences = other - one
            good = np.asarray(~np.isnan(differences).any(axis=0))
            for low, high in _sign_changes(differences, good):
                span = slice(low, high + 1)
                use = good[span]
                zero = bootstrap_interval(differences[:, span][:, use], partial(_zero, scale[span][use]))
                at = Interval(*(float(back(end)) for end in (zero.estimate, zero.low, zero.high)))
                value = float(np.interp(zero.estimate, scale[good], one[:, good].mean(axis=0)))
                rises = differences[:, low].mean() < 0
                yield Crossing(panel, later, earlier, bool(rises), at, value)


def _sign_changes(differences: NDArray[np.float64], good: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Neighbours among the places where the sign is sure, at which it is not the same."""
    signs = {index: _sure_sign(differences[:, index].tolist()) for index in np.flatnonzero(good).tolist()}
    sure = [index for index, sign in signs.items() if sign]
    return ((one, other) for one, other in pairwise(sure) if signs[one] != signs[other])


def _sure_sign(differences: list[float]) -> int:
    mean = mean_interval(differences)
    if math.isnan(mean.low):
        return int(np.sign(mean.estimate))
    return 1 if mean.low > 0 else -1 if mean.high < 0 else 0


def _zero(places: NDArray[np.float64], differences: NDArray[np.float64]) -> float:
    """Where the mean of ``differences`` ``[seeds, places]`` is 0; the middle one of several, nan if there is none."""
    means = differences.mean(axis=0)
    zeros = [
        places[i] - means[i] * (places[i + 1] - places[i]) / (means[i + 1] - means[i])
        for i in range(len(places) - 1)
        if means[i] * means[i + 1] <= 0 and means[i] != means[i + 1]
    ]
    return float(zeros[len(zeros) // 2]) if zeros else math.nan


def _same(value: Any) -> Any:
    return value


def sentences(layout: Layout, found: Sequence[Crossing]) -> list[str]:
    """Each crossing in words: ``pipeinfer falls below speculative under 23 [19, 28] Mbit/s``."""
    if layout.x is None:
        return []
    x = quantity(layout.x.key, layout.x.values)
    lines = []
    for one in found:
        at = x.text(one.at.estimate if math.isnan(one.at.low) else one.at)
        where = f"{one.panel}: " if one.panel else ""
        lines.append(f"{where}{one.lower} falls below {one.upper} {'under' if one.under else 'over'} {at}")
    return lines


# -- the summary ------------------------------------------------------------------------------------------------------


def summary(frame: pd.DataFrame, layout: Layout, scenario: Path, command: str, plot: Path | None) -> str:
    """The sweep as a Markdown page: the scenario's question, the command, the table, the crossings, the figure."""
    series = layout.series(frame)
    seeds = len(next(iter(series.values())))
    metric = layout.metric_quantity
    spread = f"mean and half the width of its 95 % confidence interval (Student's t) over {seeds} seeds"
    paragraphs = [f"# {scenario.stem.replace('-', ' ').capitalize()}", question(scenario)]
    if plot:
        paragraphs.append(f"![{metric.name}]({plot.name})")
    if layout.x and layout.line:
        found = list(crossings(layout, series))
        said = sentences(layout, found)
        paragraphs.append("\n".join(f"* {one}." for one in said) if said else "No two lines cross beyond chance.")
        if said and seeds > 1:
            brackets = not math.isnan(found[0].at.low)
            paragraphs.append(fill(CROSSING_METHOD + (BRACKETS if brackets else "")))
    paragraphs += [
        f"{metric.label[0].upper()}{metric.label[1:]}: {spread if seeds > 1 else 'one seed'}.",
        _table(layout, series),
        "Simulated, not measured. Made by",
        f"    {command}",
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


CROSSING_METHOD = (
    "Policies are compared by differences paired by seed. A crossing lies between two places at which they differ in "
    "opposite directions with 95 % confidence, where the interpolated mean difference is zero."
)
BRACKETS = " The brackets are its 95 % bootstrap interval over seeds."


def question(scenario: Path) -> str:
    """The comment at the top of a scenario file."""
    head = takewhile(lambda line: line.startswith("#"), scenario.read_text(encoding="utf-8").splitlines())
    return "\n".join(line.removeprefix("#").strip() for line in head)


def _table(layout: Layout, series: Mapping[tuple[str, str], NDArray[np.float64]]) -> str:
    """A row per panel and value of x, a column per line."""
    x = quantity(layout.x.key, layout.x.values) if layout.x else Quantity("")
    panels = layout.panels if layout.panels != [""] else []
    titles = [*(["where"] if panels else []), *([x.label] if layout.x else []), *layout.lines]
    rows = []
    for panel, (index, value) in product(layout.panels, enumerate(layout.x.values if layout.x else [0.0])):
        cells = [_cell(series[panel, line][:, index]) for line in layout.lines]
        rows.append([*([panel] if panels else []), *([significant(x.scale * value)] if layout.x else []), *cells])
    return markdown_table(titles, rows)


def _cell(values: NDArray[np.float64]) -> str:
    """Mean over the seeds that have the figure, and how many, if not all have."""
    known = values[~np.isnan(values)]
    if not known.size:
        return "-"
    mean = mean_interval(known.tolist())
    fewer = f" ({known.size} of {values.size})" if known.size < values.size else ""
    if math.isnan(mean.low):
        return significant(mean.estimate, 4) + fewer
    rounding = mean.half_width < 1e-9 * abs(mean.estimate)
    return f"{significant(mean.estimate, 4)} ± {0 if rounding else significant(mean.half_width, 2)}{fewer}"
