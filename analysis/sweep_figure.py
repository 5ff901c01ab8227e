"""The figure of a sweep: a metric against a key, a line per policy, a panel per value of a third key."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from numpy.typing import NDArray

from analysis.style import CYCLE, POLICIES, STYLE
from analysis.sweeps import Crossing, Layout, Quantity, crossings, quantity, sentences
from pipesim.statistics import mean_interval, significant

_MARKERS = "osD^vP*X"


def plot_sweep(frame: pd.DataFrame, layout: Layout, path: Path) -> None:
    """Draws a sweep's means with 95 % confidence bands over seeds; circles mark where lines cross.

    Raises:
        BadInputError: the sweep does not fit a figure.
        OSError: the file cannot be written.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "pipesim"}):
        draw_sweep(frame, layout).savefig(path, dpi=200)


def draw_sweep(frame: pd.DataFrame, layout: Layout) -> Figure:
    """The figure itself. Raises BadInputError if the sweep does not fit one."""
    layout.check_plot()
    series = layout.series(frame)
    found = list(crossings(layout, series)) if layout.line else []
    columns = math.ceil(math.sqrt(len(layout.panels)))
    rows = math.ceil(len(layout.panels) / columns)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "pipesim"}):
        figure = Figure(figsize=(max(5.5, 3.9 * columns), 3.0 * rows + 0.9 + 0.17 * len(found)), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(layout.panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, layout.panels, strict=False):
            _draw_panel(axes, layout, panel, series, [one for one in found if one.panel == panel])
        for axes in grid[:, 0]:
            axes.set_ylabel(layout.metric_quantity.label)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        ncols = _legend_columns(labels, figure.get_figwidth())
        figure.legend(handles, labels, loc="outside upper center", ncols=ncols)
        figure.supxlabel(_caption(layout, found, series), fontsize=8, x=0.01, ha="left")
        return figure


def _draw_panel(
    axes: Axes,
    layout: Layout,
    panel: str,
    series: Mapping[tuple[str, str], NDArray[np.float64]],
    found: Sequence[Crossing],
) -> None:
    assert layout.x is not None
    x = quantity(layout.x.key, layout.x.values)
    places = x.scale * np.array(layout.x.values, dtype=np.float64)
    order = np.argsort(places)
    if layout.x.log:
        _logarithmic(axes, places)
    for line, (colour, marker) in _looks(layout.lines).items():
        means = [mean_interval(column[~np.isnan(column)]) if not np.isnan(column).all() else None
                 for column in series[panel, line].T[order]]  # fmt: skip
        known = [(place, mean) for place, mean in zip(places[order], means, strict=True) if mean]
        at = [place for place, _ in known]
        axes.plot(at, [mean.estimate for _, mean in known], color=colour, marker=marker, label=line)
        axes.fill_between(
            at, [mean.low for _, mean in known], [mean.high for _, mean in known], color=colour, alpha=0.25, linewidth=0
        )
    _mark(axes, x, found)
    axes.set_title(panel, fontsize=9, loc="left")
    axes.set_xlabel(x.label)
    axes.xaxis.set_tick_params(labelbottom=True)
    axes.set_ylim(bottom=0)


def _mark(axes: Axes, x: Quantity, found: Sequence[Crossing]) -> None:
    """A circle where lines cross, with the interval of its place."""
    for number, one in enumerate(found):
        at = x.scale * one.at.estimate
        ends = None if math.isnan(one.at.low) else [[at - x.scale * one.at.low], [x.scale * one.at.high - at]]
        axes.errorbar(
            [at], [one.value], xerr=ends, fmt="o", color="black", mfc="white", ms=6, capsize=2, zorder=3,
            label=None if number else "crossing, with its 95 % interval",
        )  # fmt: skip


def _logarithmic(axes: Axes, places: NDArray[np.float64]) -> None:
    axes.set_xscale("log")
    decades = math.log10(places.max() / places.min())
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 1.5 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value)))
    axes.xaxis.set_minor_formatter("")


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """How many labels stand side by side on a figure that is so many inches wide: all of them, if they fit."""
    inches = [0.065 * len(label) + 0.6 for label in labels]
    return len(labels) if sum(inches) <= width else max(1, int(width / max(inches)))


def _looks(lines: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each line; policies have theirs everywhere."""
    taken = {colour for name, colour in POLICIES.items() if name in lines}
    free = [colour for colour in CYCLE if colour not in taken]
    others = [line for line in lines if line not in POLICIES]
    colours = POLICIES | {line: free[index % len(free)] for index, line in enumerate(others)}
    return {line: (colours[line], _MARKERS[index % len(_MARKERS)]) for index, line in enumerate(lines)}


def _caption(layout: Layout, found: Sequence[Crossing], series: Mapping[tuple[str, str], NDArray[np.float64]]) -> str:
    seeds = len(next(iter(series.values())))
    bands = f"Simulated; bands: 95 % confidence over {seeds} seeds." if seeds > 1 else "Simulated with one seed."
    said = sentences(layout, found)
    if layout.line and not said:
        bands += " No two lines cross beyond chance."
    return "\n".join([bands, *said])
