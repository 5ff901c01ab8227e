"""One look for all figures made of many generations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipesim.statistics import Interval

COLOURS = {
    "plain": "#999999",
    "synchronous": "#E69F00",
    "pipelined": "#0072B2",
}
"""Of plain decoding, synchronous and pipelined speculation (Okabe and Ito's colour-blind-safe palette)."""
POLICIES = {
    "autoregressive": COLOURS["plain"],
    "speculative": COLOURS["synchronous"],
    "pipeinfer": COLOURS["pipelined"],
}
"""The same by the policy's name."""
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def panels(
    columns: int, rows: int = 1, *, width: float = 4.2, height: float = 3.2, share_y: bool = False
) -> tuple[Figure, NDArray[np.object_]]:
    """A figure and its axes ``[rows, columns]``."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=share_y)


def line(axes: Axes, x: Sequence[float], y: Sequence[Interval], label: str, colour: str, style: str = "o-") -> None:
    """A line with its confidence band."""
    axes.plot(x, [one.estimate for one in y], style, label=label, color=colour)
    axes.fill_between(x, [one.low for one in y], [one.high for one in y], color=colour, alpha=0.15, linewidth=0)


def doubling(axes: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic x axis with plain numbers at ``ticks``."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
