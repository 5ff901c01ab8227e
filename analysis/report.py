"""One self-contained page of results: sweeps (Parquet), comparisons and generations (JSON). It needs no network."""

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from analysis.comparison_page import metrics_table, page
from analysis.style import CYCLE, POLICIES, STYLE, panels
from analysis.sweep_figure import draw_sweep
from analysis.sweeps import Layout, quantity
from pipesim.errors import BadInputError
from pipesim.statistics import mean_interval
from pipesim.sweep import Axis, flatten

_METRICS = ("tokens_per_second", "ttft_s", "itl_s.p50", "itl_s.p95", "acceptance_rate", "bubble_fraction")
_DRAWN = ("tokens_per_second", "ttft_s")


def report_page(results: Sequence[Path]) -> str:
    """The page as HTML, a section for each file; comparisons also get a figure of all predictions.

    Raises:
        BadInputError: a file cannot be read, or holds no results.
    """
    sections, comparisons = [], []
    for path in results:
        if path.suffix == ".parquet":
            sections.append(_sweep(path))
            continue
        for number, found in enumerate(_read_json(path), start=1):
            name = path.name if number == 1 else f"{path.name} ({number})"
            if "replays_identical" in found:
                comparisons.append(found)
            sections.append(_comparison(name, found) if "replays_identical" in found else _generation(name, found))
    if comparisons:
        sections.insert(0, f"<h2>Predicted against measured</h2>{svg(fidelity_figure(comparisons))}")
    return page("pipesim results", "<h1>pipesim results</h1>" + "\n".join(sections))


def _read_json(path: Path) -> list[dict[str, Any]]:
    """The objects that a file holds: one, a list, or one on each line."""
    try:
        text = path.read_text(encoding="utf-8")
        try:
            read = json.loads(text)
        except ValueError:
            read = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as problem:
        raise BadInputError(f"{path}: cannot be read as results: Parquet or JSON is expected ({problem})") from None
    found = read if isinstance(read, list) else [read]
    if not found or not all(isinstance(one, dict) and isinstance(one.get("metrics"), dict) for one in found):
        raise BadInputError(f"{path}: no results are in it: name what sweep -o, or --json of another command, wrote")
    return found


def _generation(name: str, found: Mapping[str, Any]) -> str:
    """What simulate or execute printed."""
    title = f"<h2>{html.escape(name)}: {html.escape(str(found.get('policy')))}, seed {found.get('seed')}</h2>"
    rows = [(key, _number(value)) for key, value in flatten(found["metrics"]).items()]
    return title + _table(("metric", "value"), rows)


def _comparison(name: str, found: Mapping[str, Any]) -> str:
    replays = f"{found['replays_identical']} of {found['repeats']} runs replayed with identical decisions"
    title = f"{html.escape(name)}: {html.escape(found['policy'])}, predicted and measured"
    shown = {key: figure for key, figure in found["metrics"].items() if key in _METRICS}
    rest = {key: figure for key, figure in found["metrics"].items() if key not in shown}
    more = f"<details><summary>all other metrics</summary>{metrics_table(rest)}</details>"
    return f"<h2>{title}</h2><p>{html.escape(found['scenario'])}; {replays}.</p>{metrics_table(shown)}{more}"


def _sweep(path: Path) -> str:
    """Figures and a table of a sweep's rows."""
    try:
        frame = pd.read_parquet(io.BytesIO(path.read_bytes()))
    except (OSError, ValueError) as problem:
        raise BadInputError(f"{path}: cannot be read as Parquet ({problem})") from None
    if not {"policy", "seed", "tokens_per_second"} <= set(frame.columns):
        raise BadInputError(f"{path}: no sweep's rows: the columns policy, seed and tokens_per_second are expected")
    keys = list(frame.columns[: list(frame.columns).index("tokens_per_second")])
    keys = [key for key in keys if key != "seed" and frame[key].nunique() > 1]
    if "policy.name" in keys:
        keys.remove("policy")
    axes = [Axis(key, tuple(frame[key].dropna().unique().tolist())) for key in keys]
    parts = [f"<h2>{html.escape(path.name)}</h2>"]
    failed = int(frame["error"].notna().sum()) if "error" in frame else 0
    if failed:
        parts.append(f"<p>{failed} of {len(frame)} rows failed; they are left out.</p>")
        frame = frame[frame["error"].isna()]
    repeats = max(1, frame["seed"].nunique())
    for metric in _DRAWN:
        layout = Layout.of(axes, repeats, metric)
        whole = math.prod(len(axis.values) for axis in axes) * repeats == len(frame)
        if layout.x is not None and not layout.rest and whole and not failed:
            parts.append(svg(draw_sweep(frame, layout)))
    parts.append(_means(frame, keys))
    return "\n".join(parts)


def _means(frame: pd.DataFrame, keys: Sequence[str]) -> str:
    """Means over seeds with 95 % confidence intervals, a row per point."""
    metrics = [metric for metric in _METRICS if metric in frame]
    groups = frame.groupby(list(keys), sort=False, dropna=False) if keys else [((), frame)]
    rows = []
    for point, group in groups:
        values = point if isinstance(point, tuple) else (point,)
        cells = [str(value) for value in values]
        for metric in metrics:
            known = group[metric].dropna()
            cells.append(str(mean_interval(known.tolist())) if len(known) > 1 else _number(known.mean()))
        rows.append(cells)
    titles = [*(quantity(key).label for key in keys), *(quantity(metric).label for metric in metrics)]
    return f"<p>Means over seeds with 95 % confidence intervals.</p>{_table(titles, rows)}"


def fidelity_figure(comparisons: Sequence[Mapping[str, Any]]) -> Figure:
    """Predicted against measured tokens/s with the range of the real runs, and the line where both are equal."""
    with matplotlib.rc_context(STYLE):
        figure, grid = panels(1, width=4.8, height=4.2)
        axes = grid[0, 0]
        highest = 0.0
        for index, policy in enumerate(dict.fromkeys(one["policy"] for one in comparisons)):
            points = [one["metrics"]["tokens_per_second"] for one in comparisons if one["policy"] == policy]
            points = [one for one in points if one["measured"] is not None and one["predicted"] is not None]
            measured = [one["measured"] for one in points]
            spread = [
                [one["measured"] - one["spread"][0] for one in points],
                [one["spread"][1] - one["measured"] for one in points],
            ]
            predicted = [one["predicted"] for one in points]
            colour = POLICIES.get(policy, CYCLE[index % len(CYCLE)])
            axes.errorbar(measured, predicted, xerr=spread, fmt="osD^vP*X"[index % 8], color=colour, label=policy)
            highest = max([highest, *measured, *predicted])
        ends = [0.0, 1.08 * highest]
        axes.plot(ends, ends, color="#000000", linewidth=0.8)
        axes.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="#000000", alpha=0.07)
        axes.set(xlim=ends, ylim=ends, xlabel="measured speed (tokens/s)", ylabel="predicted speed (tokens/s)")
        axes.legend()
        return figure


def svg(figure: Figure) -> str:
    """A figure as inline SVG, the same bytes for the same figure."""
    stream = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "pipesim", "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return "-" if value != value else f"{value:.4g}"
