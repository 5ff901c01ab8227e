"""Page and figure of the degradation study, from rows of its journal; see ``degradation.py``, which makes them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from analysis.pages import fill, markdown_table, settings_text
from analysis.style import POLICIES as COLOURS
from analysis.style import panels
from pipesim.calibration.profile import describe_machine

ACCEPTANCES = (0.0, 0.3, 0.6, 0.8, 0.95)
POLICIES = ("autoregressive", "speculative", "pipeinfer")
BASE = (1.0, 0.1)
"""The link that settings are tuned on: share of the bandwidth, latency in ms."""
DRAFTER_MS = 4.0
"""Per token, where settings are tuned and nothing else is said."""
AIMS = {"tokens_per_second": 0.05, "ttft_s": 0.07, "itl_s.p50": 0.07, "itl_s.p95": 0.15}
"""Mean absolute errors at most so large."""
WORST = 0.10
"""No setting's error in tokens/s above that."""
PLAIN_AT_LEAST = 0.97
"""PipeInfer's share of plain decoding's speed where no draft is ever right."""
TOGETHER_S = 1e-3
"""Half of all gaps are shorter: most tokens come together, and a relative error of that median says nothing."""
_NAMES = {"tokens_per_second": "tokens/s", "ttft_s": "TTFT", "itl_s.p50": "ITL p50", "itl_s.p95": "ITL p95"}
Row = Mapping[str, Any]
"""A measured run: a line of the journal."""
Gains = list[tuple[float, dict[str, tuple[float | None, float | None]]]]
"""Per acceptance and slower policy: measured, predicted; None where runs are missing."""


@dataclass(frozen=True, slots=True)
class Setting:
    """``share`` of the full bandwidth, one-way latency of every link, probability that a draft is right, policy.

    ``drafter_ms``: what the drafter takes for a token.
    """

    share: float
    latency_ms: float
    acceptance: float
    policy: str
    drafter_ms: float = DRAFTER_MS

    @property
    def name(self) -> str:
        """For people and journals."""
        rate = "" if self.policy == POLICIES[0] else f"acceptance {self.acceptance:g}, "
        drafter = "" if self.drafter_ms == DRAFTER_MS else f", drafter {self.drafter_ms:g} ms"
        return f"bandwidth {100 * self.share:g} %, {self.latency_ms:g} ms, {rate}{self.policy}{drafter}"


def setting_of(row: Row) -> Setting:
    """What a row is about."""
    drafter_ms = row.get("drafter_ms", DRAFTER_MS)
    return Setting(row["share"], row["latency_ms"], row["acceptance"], row["policy"], drafter_ms)


def mean(rows: Sequence[Row], world: str, metric: str) -> float | None:
    """Of the ``measured`` or ``predicted`` values of a metric."""
    values = [row[world][metric] for row in rows if row[world][metric] is not None]
    return statistics.mean(values) if values else None


def error(rows: Sequence[Row], metric: str) -> float | None:
    """``(predicted - measured) / measured`` of the means over the same seeds; None where that says nothing."""
    measured, predicted = mean(rows, "measured", metric), mean(rows, "predicted", metric)
    if measured is None or predicted is None or (metric == "itl_s.p50" and min(measured, predicted) < TOGETHER_S):
        return None
    return predicted / measured - 1


def by_setting(rows: Sequence[Row], late: bool = False) -> dict[Setting, list[Row]]:
    """Runs whose pace was kept; with ``late`` the others, too."""
    found: dict[Setting, list[Row]] = {}
    for row in rows:
        if row["kept"] or late:
            found.setdefault(setting_of(row), []).append(row)
    return found


def error_table(measured: Mapping[Setting, Sequence[Row]]) -> str:
    """Mean and worst absolute error of each metric against the aims."""
    lines = []
    for metric, aim in AIMS.items():
        found = {setting: one for setting, rows in measured.items() if (one := error(rows, metric)) is not None}
        if not found:
            continue
        average, worst = statistics.mean(map(abs, found.values())), max(found, key=lambda one: abs(found[one]))
        limit = f", none over {WORST:.0%}" if metric == "tokens_per_second" else ""
        met = average <= aim and (not limit or abs(found[worst]) <= WORST)
        aimed = f"at most {aim:.0%}{limit}"
        cells = (_NAMES[metric], len(found), f"{average:.1%}", f"{found[worst]:+.1%}", worst.name, aimed)
        lines.append((*cells, "yes" if met else "**no**"))
    return markdown_table(("metric", "settings", "mean error", "worst", "where", "aim", "met"), lines)


def ratio(fast: Sequence[Row], slow: Sequence[Row], world: str) -> float | None:
    """How many times as fast, by the means over the seeds that both have."""
    common = {row["seed"] for row in fast} & {row["seed"] for row in slow}
    speeds = [mean([row for row in rows if row["seed"] in common], world, "tokens_per_second") for rows in (fast, slow)]
    return speeds[0] / speeds[1] if speeds[0] and speeds[1] else None


def gains(measured: Mapping[Setting, Sequence[Row]]) -> Gains:
    """For each acceptance on the base link, PipeInfer's speed relative to the others': measured, predicted."""
    found = []
    plain = next((rows for one, rows in measured.items() if one.policy == POLICIES[0] and _on_base(one)), [])
    for rate in ACCEPTANCES:
        ours = measured.get(Setting(*BASE, rate, "pipeinfer"), [])
        others = {"speculative": measured.get(Setting(*BASE, rate, "speculative"), []), "autoregressive": plain}
        told = {name: (ratio(ours, rows, "measured"), ratio(ours, rows, "predicted")) for name, rows in others.items()}
        found.append((rate, told))
    return found


def _on_base(setting: Setting) -> bool:
    return (setting.share, setting.latency_ms) == BASE


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def page(rows: Sequence[Row], wanted: Sequence[Setting], repeats: int, settings: Mapping[str, Any], data: str) -> str:
    """The page as Markdown; ``wanted``: all settings of the coarse grid; ``data``: the folder with figure and data."""
    measured = {one: found for one, found in by_setting(rows).items() if one in wanted}
    missed = [row for row in rows if not row["kept"]]
    kept = sum(map(len, measured.values()))
    lacking = len(wanted) - len(measured)
    again = sum(row["replay_identical"] for row in rows)
    as_told = sum(row["decided_as_predicted"] for row in rows)
    attempts, most = sum(row["attempt"] for row in rows), max((row["attempt"] for row in rows), default=0)
    dates = sorted(row["date"][:16].replace("T", " ") for row in rows) or ["never"]
    what = fill(
        f"Eight stages of about 20 ms, a drafter of {DRAFTER_MS:g} ms per token if nothing else is said, links of 1 "
        "Gbit/s and 0.1 ms that get worse (scenarios/emulated-network.yaml). Simulated on a fine grid, and run for "
        "real: a process for each stage and "
        "the drafter, gRPC, real layers and text of a small random model, kept to the times of the scenario "
        "([emulation.md](emulation.md)). Nothing of the prediction was fitted to these runs; a prediction and its run "
        f"have the same seed, so the same drafts are right. Machine: {describe_machine()}; {dates[0]} to {dates[-1]} "
        "UTC."
    )
    counts = fill(
        f"**Measured: {len(measured)} of {len(wanted)} settings, {kept} of {len(wanted) * repeats} runs.** "
        f"{again} of {len(rows)} event logs replayed with identical decisions (I9). In {as_told} of {len(rows)} "
        "runs the scheduler decided as in the simulation that predicted them: the same runs, drafts and cancellations, "
        f"in the same order. Runs that did not keep the emulated cluster's pace in their last attempt: {len(missed)}. "
        "There a process was late, or computed too long, on a machine that others use, too. They are listed below and "
        "are in no mean. A run is tried again until its pace is kept, and never after that: "
        f"{attempts} attempts in all, {most} at most for one run. "
        + (f"Settings still missing: {lacking}; the same command goes on with them. " if lacking else "")
        + _emulation_error(rows)
    )
    parts = ["# A network gets worse: predicted and measured", what, counts, f"![speed]({data}/speed.png)", _CAPTION]
    parts += ["## How far off predictions are", error_table(measured), fill(_ERRORS)] if measured else []
    everything = by_setting(rows, late=True)
    parts += [fill(_LATE), error_table(everything)] if missed else []
    parts += ["## What speculation gains", _gains(measured)]
    parts += ["The same of all runs, their pace kept or not:", _gain_table(gains(everything))] if missed else []
    parts += [fill(_SETTINGS), _settings(settings)]
    parts += ["## All settings", _all(measured), _missed(missed)]
    parts.append(
        f"Made by `python -m analysis.degradation -o docs/degradation.md`; every run is in "
        f"[measured.jsonl]({data}/measured.jsonl), the fine grid in [simulated.json]({data}/simulated.json)."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _emulation_error(rows: Sequence[Row]) -> str:
    late = [row["late_p95_ms"] for row in rows if row["kept"]]
    if not late:
        return ""
    return (
        "The emulation's own error, where the pace was kept: of what the latest of stages, drafter and head did in a "
        f"run, 95 % was at most {statistics.median(late):.1f} ms late "
        f"(median of runs; {max(late):.1f} ms in the worst)."
    )


_CAPTION = fill(
    "Lines: mean of 8 simulated seeds; bands: from the lowest to the highest of them. Points: measured runs whose pace "
    "was kept, mean and range; rings: what was predicted for the very seeds of these runs; crosses: runs whose pace "
    "was not kept. Plain decoding does not depend on acceptance, its runs are shown everywhere."
)
_ERRORS = (
    "Absolute errors (predicted - measured) / measured of the means over a setting's runs, averaged over settings. ITL "
    "p50 is left out where most tokens come together with others, so that the median gap is 0. The aims are "
    "for at least 24 settings."
)
_SETTINGS = (
    "Settings, found for each acceptance by the same search in simulation on the base link, with other seeds, and kept "
    f"on worse links and with drafters other than that of {DRAFTER_MS:g} ms; at acceptance 0, where the best is not to "
    "draft, those of 0.3:"
)
_LATE = (
    "The same with the runs whose pace was not kept, which measure this machine's other work as well. They settle "
    "nothing, and are shown so that nobody has to guess what leaving them out did:"
)


def _gains(measured: Mapping[Setting, Sequence[Row]]) -> str:
    found = gains(measured)
    at_zero = found[0][1]["autoregressive"][0]
    best = max((told["speculative"][0] or 0.0, rate) for rate, told in found)
    said = [f"PipeInfer's best gain over tuned synchronous speculation is {best[0]:.2f} times, at {best[1]:g}."]
    if at_zero is None:
        said.append("At acceptance 0 it is not measured yet against plain decoding.")
    else:
        verdict = "no slower than" if at_zero >= PLAIN_AT_LEAST else "**slower than**"
        said.append(f"At acceptance 0 it has {at_zero:.3f} of plain decoding's speed: {verdict} the {PLAIN_AT_LEAST}.")
    intro = "Tokens per second of PipeInfer, measured on the base link, as a multiple; seeds that both have:"
    return "\n\n".join([intro, _gain_table(found), fill(" ".join(said if best[0] else said[1:]))])


def _gain_table(found: Gains) -> str:
    lines = [
        (f"{rate:g}", *(_times(value) for name in ("speculative", "autoregressive") for value in told[name]))
        for rate, told in found
    ]
    titles = ("acceptance", "over speculative", "predicted", "over plain decoding", "predicted")
    return markdown_table(titles, lines)


def _settings(settings: Mapping[str, Any]) -> str:
    return "\n".join(
        f"* {rate}, {name}: {settings_text(one)}"
        for rate, both in sorted(settings.items(), key=lambda item: float(item[0]))
        for name, one in both.items()
    )


def _all(measured: Mapping[Setting, Sequence[Row]]) -> str:
    lines = []
    for setting, rows in measured.items():
        told, real = (mean(rows, world, "tokens_per_second") for world in ("predicted", "measured"))
        errors = [error(rows, metric) for metric in AIMS]
        shown = ("-" if one is None else f"{one:+.1%}" for one in errors)
        lines.append((setting.name, len(rows), f"{told:.2f}", f"{real:.2f}", *shown))
    titles = ("setting", "runs", "predicted tokens/s", "measured", *(f"error {name}" for name in _NAMES.values()))
    return markdown_table(titles, lines)


def _missed(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    titles = ("pace not kept", "seed", "measured tokens/s", "predicted", "why")
    lines = [
        (
            setting_of(row).name,
            row["seed"],
            *(f"{row[world]['tokens_per_second']:.2f}" for world in ("measured", "predicted")),
            row["problems"][0] + (f"; {len(row['problems']) - 1} more" if row["problems"][1:] else ""),
        )
        for row in rows
    ]
    return markdown_table(titles, lines)


def figure(lines: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> Figure:
    """Speed against bandwidth above, against latency below, a column for each acceptance."""
    picture, axes = panels(len(ACCEPTANCES), 2, width=2.6, height=2.8)
    kept, everything = by_setting(rows), by_setting(rows, late=True)
    for column, rate in enumerate(ACCEPTANCES):
        for place, varied, fixed in ((axes[0, column], "share", 1), (axes[1, column], "latency_ms", 0)):
            other = ("share", "latency_ms")[fixed]
            scale = 100 if varied == "share" else 1
            for policy in POLICIES:
                colour = COLOURS[policy]
                here = [
                    one
                    for one in lines
                    if (one["policy"], one["acceptance"], one[other]) == (policy, rate, BASE[fixed])
                ]
                here.sort(key=lambda one: one[varied])
                x = [scale * one[varied] for one in here]
                place.plot(x, [one["mean"] for one in here], color=colour, label=policy)
                place.fill_between(
                    x, [one["low"] for one in here], [one["high"] for one in here], color=colour, alpha=0.15, lw=0
                )
                for setting, runs in everything.items():
                    if setting.drafter_ms != DRAFTER_MS:
                        continue
                    on_line = (setting.share, setting.latency_ms)[fixed] == BASE[fixed]
                    if setting.policy == policy and on_line and (policy == POLICIES[0] or setting.acceptance == rate):
                        _point(place, scale * getattr(setting, varied), kept.get(setting, []), runs, colour)
            place.set_xscale("log")
            place.set(ylim=(0, None), xlabel="bandwidth, % of 1 Gbit/s" if varied == "share" else "link latency, ms")
            ticks = (1, 10, 100) if varied == "share" else (0.1, 1, 10, 100)
            place.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes[0, column].set_title(f"acceptance {rate:g}", fontsize=9)
    for row in range(2):
        axes[row, 0].set_ylabel("tokens per second")
    axes[0, 0].legend(fontsize=7)
    return picture


def _point(axes: Any, x: float, runs: Sequence[Row], with_late: Sequence[Row], colour: str) -> None:
    late = [row["measured"]["tokens_per_second"] for row in with_late if not row["kept"]]
    axes.plot([x] * len(late), late, "x", color=colour, markersize=4, markeredgewidth=0.8)
    if not runs:
        return
    speeds = [row["measured"]["tokens_per_second"] for row in runs]
    middle = statistics.mean(speeds)
    reach = [[middle - min(speeds)], [max(speeds) - middle]]
    axes.errorbar([x], [middle], yerr=reach, fmt="o", color=colour, markersize=4, capsize=2, zorder=3)
    told = mean(runs, "predicted", "tokens_per_second")
    axes.plot([x], [told], "o", markerfacecolor="none", markeredgecolor="black", markersize=8, markeredgewidth=0.6)
