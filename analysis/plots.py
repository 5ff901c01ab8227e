"""Pictures of one generation.

docs/figures/timeline.png, each policy at its best settings there (docs/ablation.md): ``python -m analysis.plots
scenarios/ablation.yaml --window 0.5:1.5 -o docs/figures/timeline.png --policy autoregressive --policy "{name:
speculative, max_nodes: 15, cutoff: 0.6, branches: 4, split: 0.2}" --policy pipeinfer``
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pipesim.cli.common import SetOption, WindowOption, check_outputs, parse_window
from pipesim.scenario_file import load_scenario
from pipesim.simulation.pipeline import simulate
from pipesim.trace import DraftSpan, Fate, StageSpan, Trace

Window = tuple[float, float]
"""From when to when to draw, in seconds."""

FATES: Mapping[Fate, tuple[str, str]] = {
    Fate.PREFILL: ("prefill", "#999999"),
    Fate.CANONICAL: ("canonical", "#0072B2"),
    Fate.ACCEPTED: ("speculative, accepted", "#009E73"),
    Fate.REDUNDANT: ("redundant", "#56B4E9"),
    Fate.REJECTED: ("rejected", "#D55E00"),
    Fate.CANCELLED: ("cancelled", "#E69F00"),
    Fate.DRAINED: ("drained", "#CC79A7"),
}
"""What became of a run: label and colour (Okabe and Ito's colour-blind-safe palette)."""
DRAFT, VAIN_DRAFT, BUBBLE = "#444444", "#AAAAAA", "#EEEEEE"

_BAR = 0.78
_COUNTED = 60  # more emissions have no room for numbers
_RIM, _DIGIT = 0.004, 0.006  # shares of the width that a run's number needs in its bar
_LIGHT = (Fate.PREFILL, Fate.REDUNDANT, Fate.CANCELLED)


def plot_timeline(trace: Trace, path: Path, window: Window | None = None) -> None:
    """Draws stages and drafter over time; runs are coloured by their fate, a bubble shows the row's pale ground.

    Ticks on top are tokens at the user, with their number where there are several. The file's ending (png, pdf, svg)
    chooses the format. ``window``: draws only this stretch; where bars are wide enough, with the numbers of runs.

    Raises:
        OSError: the file cannot be written.
        ValueError: matplotlib does not know the file's ending.
    """
    _save([(trace, _title(trace))], path, window)


def plot_timelines(traces: Mapping[str, Trace], path: Path, window: Window | None = None) -> None:
    """Draws several timelines one above the other, on one axis; ``traces`` by what their titles begin with.

    Raises:
        OSError, ValueError: as :func:`plot_timeline`.
    """
    titled = []
    for name, trace in traces.items():
        title = _title(trace)
        titled.append((trace, title if title.startswith(name) else f"{name}, {title}"))
    _save(titled, path, window)


def _save(titled: Sequence[tuple[Trace, str]], path: Path, window: Window | None) -> None:
    ends = [span.end_s for trace, _ in titled for span in trace.spans]
    ends += [draft.end_s for trace, _ in titled for draft in trace.drafts]
    start, end = window or (0.0, 1.003 * max([*ends, 1e-9]))
    scale, unit = (1e3, "ms") if end - start < 2.0 else (1.0, "s")
    with matplotlib.rc_context({"font.size": 8, "font.family": "sans-serif", "svg.hashsalt": "pipesim"}):
        rows = [len(trace.stages) + 1 + bool(trace.drafts) for trace, _ in titled]
        figure = Figure(figsize=(10.0, 0.9 + sum(0.35 + 0.25 * count for count in rows)), layout="constrained")
        parts = figure.subplots(len(titled), 1, squeeze=False, sharex=True, height_ratios=rows)[:, 0]
        parts[0].set_xlim(start * scale, end * scale)
        legend: dict[str, Patch | Line2D] = {}
        for axes, (trace, title) in zip(parts, titled, strict=True):
            legend |= _draw_timeline(axes, trace, (start, end), scale)
            axes.set_title(title, fontsize=9, loc="left")
        parts[-1].set_xlabel(f"time since the prompt was submitted ({unit})")
        order = [label for label, _ in FATES.values()]
        ranked = sorted(legend, key=lambda label: order.index(label) if label in order else len(order))
        handles = [legend[label] for label in ranked]
        figure.legend(handles, ranked, loc="outside lower center", ncols=-(-len(ranked) // 2), frameon=False)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None  # same trace, same file
        figure.savefig(path, dpi=200, metadata=metadata)


def _draw_timeline(axes: Axes, trace: Trace, window: Window, scale: float) -> dict[str, Patch | Line2D]:
    """One row for tokens, stages and drafter each; returns what the legend has to explain."""
    rows = ["tokens", *trace.stages, *(["drafter"] if trace.drafts else [])]
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    legend: dict[str, Patch | Line2D] = {}
    active = trace.finished_s if trace.finished_s is not None else window[1]
    for stage in range(len(trace.stages)):
        axes.broken_barh([(0.0, active * scale)], (stage + 1 - _BAR / 2, _BAR), color=BUBBLE, zorder=0, linewidth=0)
    _draw_tokens(axes, trace, window, scale)
    for label, colour in (_draw_runs(axes, trace, window, scale) | _draw_drafts(axes, trace, window, scale)).items():
        legend[label] = Patch(color=colour)
    legend["bubble"] = Patch(facecolor=BUBBLE, edgecolor="#999999", linewidth=0.5)
    legend["tokens at the user"] = Line2D([], [], color="black", marker="|", markersize=7, linestyle="none")
    if trace.finished_s is not None and window[0] <= trace.finished_s <= window[1]:
        axes.axvline(trace.finished_s * scale, color="black", linewidth=0.8, linestyle=":")
        legend["all tokens at the user"] = Line2D([], [], color="black", linestyle=":", linewidth=0.8)
    return legend


def _seen(one: StageSpan | DraftSpan, window: Window) -> bool:
    return one.start_s < window[1] and one.end_s > window[0] and one.end_s > one.start_s


def _title(trace: Trace) -> str:
    tokens = len(trace.tokens)
    took = f" in {trace.finished_s:.3g} s" if trace.finished_s is not None else ""
    return f"{trace.policy}: {tokens} tokens after a prompt of {trace.prompt_tokens}{took}"


def _draw_tokens(axes: Axes, trace: Trace, window: Window, scale: float) -> None:
    """One tick per emission; several tokens at once are a bolder one with their number."""
    shown = [emission for emission in trace.emissions if window[0] <= emission.time_s <= window[1]]
    widths = [0.7 if len(emission.tokens) == 1 else 1.4 for emission in shown]
    axes.vlines([emission.time_s * scale for emission in shown], -0.1, 0.4, color="black", linewidth=widths)
    for emission in shown if len(shown) <= _COUNTED else ():
        if len(emission.tokens) > 1:
            text = f"{len(emission.tokens)}"
            axes.text(emission.time_s * scale, -0.12, text, ha="center", va="bottom", fontsize=6.5)


def _draw_runs(axes: Axes, trace: Trace, window: Window, scale: float) -> dict[str, str]:
    """One bar per run and stage, with the run's number if most have room for it; returns labels and colours."""
    fates = {run.run_id: run.fate for run in trace.runs}
    seen = [span for span in trace.spans if _seen(span, window)]
    digits = len(str(max((span.run_id for span in seen), default=0)))
    room = (_RIM + _DIGIT * digits) * (window[1] - window[0])
    numbered = statistics.median([0.0] if not seen else [span.end_s - span.start_s for span in seen]) > room
    bars: dict[tuple[int, Fate], list[tuple[float, float]]] = defaultdict(list)
    for span in seen:
        fate = fates[span.run_id]
        bars[span.stage, fate].append((span.start_s * scale, (span.end_s - span.start_s) * scale))
        left, right = max(span.start_s, window[0]), min(span.end_s, window[1])
        if numbered and right - left > room:
            where, ink = ((left + right) / 2 * scale, span.stage + 1), "black" if fate in _LIGHT else "white"
            axes.text(*where, str(span.run_id), ha="center", va="center", fontsize=6, color=ink)
    for (stage, fate), extents in bars.items():
        _draw_bars(axes, stage + 1, extents, FATES[fate][1])
    return dict(FATES[fate] for fate in {fate for _, fate in bars})


def _draw_drafts(axes: Axes, trace: Trace, window: Window, scale: float) -> dict[str, str]:
    """One bar per draft; returns labels and colours."""
    shown = {}
    for label, colour, useful in (("drafting", DRAFT, True), ("drafting in vain", VAIN_DRAFT, False)):
        drafts = [draft for draft in trace.drafts if bool(draft.tokens) is useful and _seen(draft, window)]
        if drafts:
            shown[label] = colour
            extents = [(one.start_s * scale, (one.end_s - one.start_s) * scale) for one in drafts]
            _draw_bars(axes, len(trace.stages) + 1, extents, colour)
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


def main(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="Scenario file (YAML).")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="PNG, PDF or SVG.")],
    policies: Annotated[
        list[str], typer.Option("--policy", metavar="YAML", help="Name, or {name: .., settings}; may be repeated.")
    ],
    overrides: SetOption = None,
    window: WindowOption = None,
) -> None:
    """Simulate a scenario under several policies and draw their timelines one above the other.

    The scenario's own policy, given by its name alone, keeps its settings.

    Example: python -m analysis.plots scenarios/demo.yaml --policy autoregressive --policy pipeinfer -o timeline.pdf
    """
    check_outputs(plot=output)
    stretch, own = parse_window(window), load_scenario(scenario).policy.name
    traces: dict[str, Trace] = {}
    for policy in policies:
        named = policy if "{" in policy else f"{{name: {policy}}}"
        sets = [*([] if policy == own else [f"policy={named}"]), *(overrides or ())]
        trace = simulate(load_scenario(scenario, sets))
        traces[trace.policy if trace.policy not in traces else policy] = trace
    plot_timelines(traces, output, stretch)


if __name__ == "__main__":
    typer.run(main)
