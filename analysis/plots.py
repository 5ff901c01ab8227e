"""Pictures of one generation."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pipesim.scheduling.commands import Outcome
from pipesim.scheduling.runs import RunKind
from pipesim.trace import RunRecord, Trace

_BAR = 0.78


class Fate(Enum):
    """What became of a run, with its colour (Okabe and Ito's colour-blind-safe palette)."""

    PREFILL = ("prefill", "#999999")
    CANONICAL = ("canonical", "#0072B2")
    ACCEPTED = ("speculative, accepted", "#009E73")
    REDUNDANT = ("redundant", "#56B4E9")
    REJECTED = ("rejected", "#D55E00")
    CANCELLED = ("cancelled", "#E69F00")
    DRAINED = ("drained", "#CC79A7")


_DRAFT, _VAIN_DRAFT, _BUBBLE = "#444444", "#AAAAAA", "#EEEEEE"


def fate(run: RunRecord) -> Fate:
    """What became of a run, as the plot tells it."""
    if run.outcome is Outcome.REJECTED:
        return Fate.REJECTED
    if run.outcome is Outcome.CANCELLED:
        return Fate.CANCELLED
    if run.outcome is not Outcome.ACCEPTED:
        return Fate.DRAINED
    if run.redundant:
        return Fate.REDUNDANT
    return {RunKind.PREFILL: Fate.PREFILL, RunKind.CANONICAL: Fate.CANONICAL}.get(run.kind, Fate.ACCEPTED)


def plot_timeline(trace: Trace, path: Path) -> None:
    """Draws stages and drafter over time; runs are coloured by their fate, a bubble shows the row's pale ground.

    Ticks on top are tokens at the user. The file's ending (png, pdf, svg) chooses the format.

    Raises:
        OSError: the file cannot be written.
        ValueError: matplotlib does not know the file's ending.
    """
    _save([(trace, _title(trace))], path)


def plot_timelines(traces: Mapping[str, Trace], path: Path) -> None:
    """Draws several timelines one above the other, on one scale; ``traces`` by what their titles begin with.

    Raises:
        OSError, ValueError: as :func:`plot_timeline`.
    """
    _save([(trace, f"{name}, {_title(trace)}") for name, trace in traces.items()], path)


def _save(titled: Sequence[tuple[Trace, str]], path: Path) -> None:
    ends = [span.end_s for trace, _ in titled for span in trace.spans]
    end = max([*ends, *(draft.end_s for trace, _ in titled for draft in trace.drafts), 1e-9])
    with matplotlib.rc_context({"font.size": 8, "font.family": "sans-serif", "svg.hashsalt": "pipesim"}):
        heights = [1.5 + 0.32 * (len(trace.stages) + 2) for trace, _ in titled]
        figure = Figure(figsize=(10.0, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(titled), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, (trace, title) in zip(parts, titled, strict=True):
            _draw_timeline(part, trace, title, end)
        figure.savefig(path, dpi=200)


def _draw_timeline(figure: SubFigure, trace: Trace, title: str, end: float) -> None:
    scale, unit = (1e3, "ms") if end < 2.0 else (1.0, "s")
    axes = figure.add_subplot()
    rows = ["tokens", *trace.stages, "drafter"]
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.003 * end * scale)
    axes.set_xlabel(f"time since the prompt was submitted ({unit})")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _draw_tokens(axes, trace, scale)
    shown = _draw_runs(axes, trace, scale, end)
    drafts = _draw_drafts(axes, trace, scale, len(rows) - 1)
    if trace.finished_s is not None:
        axes.axvline(trace.finished_s * scale, color="black", linewidth=0.8, linestyle=":")
    handles: list[Patch | Line2D] = [Patch(color=one.value[1], label=one.value[0]) for one in shown]
    handles += [Patch(color=colour, label=label) for label, colour in drafts.items()]
    handles.append(Patch(facecolor=_BUBBLE, edgecolor="#999999", linewidth=0.5, label="bubble"))
    handles.append(Line2D([], [], color="black", linestyle=":", linewidth=0.8, label="all tokens at the user"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    axes.set_title(title, fontsize=9, loc="left")


def _title(trace: Trace) -> str:
    tokens = len(trace.tokens)
    took = f" in {trace.finished_s:.3g} s" if trace.finished_s is not None else ""
    return f"{trace.policy}: {tokens} tokens after a prompt of {trace.prompt_tokens}{took}"


def _draw_tokens(axes: Axes, trace: Trace, scale: float) -> None:
    """One tick per emission, taller for more tokens at once."""
    most = max((len(emission.tokens) for emission in trace.emissions), default=1)
    times = [emission.time_s * scale for emission in trace.emissions]
    tops = [0.4 - _BAR * (0.35 + 0.65 * len(emission.tokens) / most) for emission in trace.emissions]
    axes.vlines(times, tops, 0.4, color="black", linewidth=0.7)


def _draw_runs(axes: Axes, trace: Trace, scale: float, end: float) -> list[Fate]:
    """One bar per run and stage; returns the fates that occur."""
    fates = {run.run_id: fate(run) for run in trace.runs}
    active = trace.finished_s if trace.finished_s is not None else end
    for stage in range(len(trace.stages)):
        axes.broken_barh([(0.0, active * scale)], (stage + 1 - _BAR / 2, _BAR), color=_BUBBLE, zorder=0, linewidth=0)
    bars: dict[tuple[int, Fate], list[tuple[float, float]]] = defaultdict(list)
    for span in trace.spans:
        if span.end_s > span.start_s:
            bars[span.stage, fates[span.run_id]].append((span.start_s * scale, (span.end_s - span.start_s) * scale))
    for (stage, one), extents in bars.items():
        _draw_bars(axes, stage + 1, extents, one.value[1])
    occurring = {one for _, one in bars}
    return [one for one in Fate if one in occurring]


def _draw_drafts(axes: Axes, trace: Trace, scale: float, row: int) -> dict[str, str]:
    """One bar per draft; returns the legend's labels and colours."""
    shown = {}
    for label, colour, useful in (("drafting", _DRAFT, True), ("drafting in vain", _VAIN_DRAFT, False)):
        drafts = [draft for draft in trace.drafts if bool(draft.tokens) is useful]
        if drafts:
            shown[label] = colour
            _draw_bars(axes, row, [(one.start_s * scale, (one.end_s - one.start_s) * scale) for one in drafts], colour)
    return shown


def _draw_bars(axes: Axes, row: int, extents: list[tuple[float, float]], colour: str) -> None:
    """Bars with a thin white rim, so that neighbours stay apart; those that the rim would hide get one of their own."""
    left, right = axes.get_xlim()
    hair = (right - left) / 1000
    place = (row - _BAR / 2, _BAR)
    wide = [extent for extent in extents if extent[1] >= hair]
    thin = [extent for extent in extents if extent[1] < hair]
    axes.broken_barh(wide, place, facecolor=colour, edgecolor="white", linewidth=0.25)
    axes.broken_barh(thin, place, facecolor=colour, edgecolor=colour, linewidth=0.4)
