"""The page of a comparison: both timelines on one axis, every metric with its verdict, how it was measured.

It is one file that needs no network: the timelines are inline SVG, a few lines of script zoom and pan them together.
"""

import html
import json
from collections.abc import Mapping
from typing import Any

from analysis.plots import BUBBLE, DRAFT, FATES, VAIN_DRAFT
from pipesim.trace import Trace

_ROW, _BAR, _LEFT, _WIDTH = 22, 16, 90, 1100
_VERDICTS = {"agrees": "#009E73", "within": "#0072B2", "deviates": "#D55E00", "too noisy": "#999999", "-": "#999999"}
"""Okabe and Ito's colour-blind-safe palette; the words stand beside the colours."""
_MAIN = ("tokens_per_second", "ttft_s", "itl_s.p50", "itl_s.p95", "e2e_s", "acceptance_rate", "bubble_fraction")

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 1.8em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2em .8em; border-bottom: 1px solid #e6e6e6; text-align: right } th { font-weight: 600 }
th:first-child, td:first-child { text-align: left }
svg { display: block; width: 100%; height: auto; touch-action: none } svg text { font: 11px system-ui, sans-serif }
figure { margin: 0 0 1em } .legend span { margin-right: 1.2em; white-space: nowrap }
.legend i { display: inline-block; width: 1em; height: .8em; margin-right: .35em; border: 1px solid #0002 }
.verdict { color: #fff; border-radius: 3px; padding: 0 .5em } details { margin: .6em 0 } footer { color: #666 }
@media print { details { display: block } }
"""

_SCRIPT = """
const timelines = [...document.querySelectorAll('svg.timeline')];
const [left, width, end] = JSON.parse(document.getElementById('axis').textContent);
let from = 0, to = end;
function draw() {
  const scale = (width - left) / (to - from), unit = to - from < 2 ? [1e3, 'ms'] : [1, 's'];
  for (const svg of timelines) {
    svg.querySelector('g.bars').setAttribute('transform', `translate(${left - from * scale} 0) scale(${scale} 1)`);
    const axis = svg.querySelector('g.axis'), height = svg.viewBox.baseVal.height;
    const raw = (to - from) / 8, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw);
    let marks = '';
    for (let t = Math.ceil(from / step) * step; t <= to; t += step) {
      const x = left + (t - from) * scale, label = +(t * unit[0]).toPrecision(6);
      marks += `<line x1="${x}" x2="${x}" y1="0" y2="${height - 16}" stroke="#0001"/>` +
        `<text x="${x}" y="${height - 3}" text-anchor="middle">${label} ${unit[1]}</text>`;
    }
    axis.innerHTML = marks;
  }
}
function show(a, b) {
  const span = Math.min(end, Math.max(1e-4, b - a));
  from = Math.max(0, Math.min(a, end - span)); to = from + span; draw();
}
for (const svg of timelines) {
  const at = e => { const box = svg.getBoundingClientRect();
    return from + ((e.clientX - box.left) / box.width * width - left) / (width - left) * (to - from); };
  svg.addEventListener('wheel', e => { e.preventDefault(); const t = at(e), z = e.deltaY > 0 ? 1.25 : 0.8;
    show(t - (t - from) * z, t + (to - t) * z); }, {passive: false});
  let held = null;
  svg.addEventListener('pointerdown', e => { held = at(e); svg.setPointerCapture(e.pointerId); });
  svg.addEventListener('pointermove', e => { if (held !== null) { const d = held - at(e); show(from + d, to + d); } });
  svg.addEventListener('pointerup', () => held = null);
  svg.addEventListener('dblclick', () => show(0, end));
}
draw();
"""


def comparison_page(shown: Mapping[str, Any], traces: Mapping[str, Trace], note: str) -> str:
    """The page as HTML.

    Args:
        shown: the object that ``compare --json`` prints.
        traces: timelines by their title, drawn one above the other in this order.
        note: how it was measured.
    """
    end = max([1e-9, *(span.end_s for trace in traces.values() for span in trace.spans)]) * 1.01
    title = f"{shown['policy']}, seed {shown['seed']}: predicted and measured"
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(_summary(shown))}</p>", "<h2>Timelines</h2>", _legend()]
    for name, trace in traces.items():
        body.append(
            f"<figure><figcaption>{html.escape(_caption(name, trace))}</figcaption>{_timeline(trace, end)}</figure>"
        )
    body.append("<p>Scroll to zoom, drag to move, double-click for the whole; both move together.</p>")
    main = {name: shown["metrics"][name] for name in _MAIN if name in shown["metrics"]}
    rest = {name: figure for name, figure in shown["metrics"].items() if name not in main}
    body += ["<h2>Metrics</h2>", metrics_table(main)]
    body += ["<details><summary>all other metrics</summary>", metrics_table(rest), "</details>"]
    body += ["<h2>How it was measured</h2>", f"<p>{html.escape(note)}</p>", _evidence(shown.get("calibration"))]
    body.append(f'<script type="application/json" id="axis">{json.dumps([_LEFT, _WIDTH, end])}</script>')
    return page(title, "\n".join(body), _SCRIPT)


def page(title: str, body: str, script: str = "") -> str:
    """A whole HTML file in the one style of all pages."""
    code = f"<script>{script}</script>" if script else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>{body}\n{code}</body></html>\n"
    )


def _summary(shown: Mapping[str, Any]) -> str:
    speed = shown["metrics"]["tokens_per_second"]
    told = (
        "no speed: a single token"
        if speed["error"] is None
        else (
            f"{speed['predicted']:.2f} tokens/s predicted, {speed['measured']:.2f} measured ({speed['error']:+.1%}): "
            f"{speed['verdict']}"
        )
    )
    replays = f"{shown['replays_identical']} of {shown['repeats']} runs replayed with identical decisions"
    return f"{shown['scenario']}: {told}; {replays}."


def _caption(name: str, trace: Trace) -> str:
    return f"{name}: {len(trace.tokens)} tokens, {len(trace.runs)} runs"


def _legend() -> str:
    entries = [*FATES.values(), ("draft", DRAFT), ("abandoned draft", VAIN_DRAFT), ("bubble", BUBBLE)]
    return (
        '<p class="legend">'
        + "".join(f'<span><i style="background:{colour}"></i>{label}</span>' for label, colour in entries)
        + "<span>| tokens at the user</span></p>"
    )


def _timeline(trace: Trace, end: float) -> str:
    """Rows for tokens, stages and drafter; x is seconds, scaled by the group's transform."""
    rows = ["tokens", *trace.stages, *(["drafter"] if trace.drafts else [])]
    height = _ROW * len(rows) + 20
    fates = {run.run_id: run.fate for run in trace.runs}
    rows_of = {run.run_id: run.rows for run in trace.runs}
    active = trace.finished_s if trace.finished_s is not None else end
    bars = []
    for stage in range(len(trace.stages)):
        bars.append(_bar(stage + 1, 0.0, active, BUBBLE, ""))
    for span in trace.spans:
        label, colour = FATES[fates[span.run_id]]
        times = f"{1e3 * span.start_s:.2f} .. {1e3 * span.end_s:.2f} ms"
        told = f"run {span.run_id}, {rows_of[span.run_id]} rows: {label}; {times}"
        bars.append(_bar(span.stage + 1, span.start_s, span.end_s, colour, told))
    for draft in trace.drafts:
        told = f"draft {draft.request_id}: {draft.tokens} tokens; {1e3 * (draft.end_s - draft.start_s):.2f} ms"
        colour = DRAFT if draft.tokens else VAIN_DRAFT
        bars.append(_bar(len(rows) - 1, draft.start_s, draft.end_s, colour, told))
    ticks = "".join(
        f'<line x1="{one.time_s:.6f}" x2="{one.time_s:.6f}" y1="3" y2="{_BAR}" stroke="#000" '
        f'vector-effect="non-scaling-stroke"><title>{len(one.tokens)} tokens, {1e3 * one.time_s:.2f} ms</title></line>'
        for one in trace.emissions
    )
    names = "".join(
        f'<text x="4" y="{_ROW * index + 14}">{html.escape(name)}</text>' for index, name in enumerate(rows)
    )
    scale = (_WIDTH - _LEFT) / end
    return (
        f'<svg class="timeline" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="timeline">'
        f'<g class="axis"></g><g class="bars" transform="translate({_LEFT} 0) scale({scale:.6f} 1)">'
        f'{"".join(bars)}{ticks}</g><rect width="{_LEFT - 2}" height="{height - 18}" fill="#fff"/>{names}</svg>'
    )


def _bar(row: int, start: float, end: float, colour: str, told: str) -> str:
    title = f"<title>{html.escape(told)}</title>" if told else ""
    place = f'x="{start:.6f}" y="{_ROW * row + 2}" width="{max(0.0, end - start):.6f}" height="{_BAR}"'
    return f'<rect {place} fill="{colour}">{title}</rect>'


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Figures of ``compare --json`` as an HTML table."""
    head = "".join(
        f"<th>{name}</th>"
        for name in ("metric", "predicted", "interval", "measured (median)", "lowest .. highest", "error", "verdict")
    )
    rows = []
    for name, one in metrics.items():
        cells = [
            name,
            _number(one["predicted"]),
            _range(one["interval"]),
            _number(one["measured"]),
            _range(one["spread"]),
        ]
        cells.append("-" if one["error"] is None else f"{one['error']:+.1%}")
        verdict = f'<span class="verdict" style="background:{_VERDICTS[one["verdict"]]}">{one["verdict"]}</span>'
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + f"<td>{verdict}</td></tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _range(limits: Any) -> str:
    return "-" if limits is None else f"{limits[0]:.4g} .. {limits[1]:.4g}"


def _evidence(evidence: Mapping[str, Any] | None) -> str:
    if not evidence:
        return ""
    fits = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{value:.1%}</td></tr>" for name, value in evidence["residuals"].items()
    )
    limits = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{low:.4g} .. {high:.4g}</td></tr>"
        for key, (low, high) in evidence["intervals"].items()
    )
    return (
        f"<details><summary>fits and their relative errors</summary><table>{fits}</table></details>"
        f"<details><summary>95 % confidence limits of the costs</summary><table>{limits}</table></details>"
    )
