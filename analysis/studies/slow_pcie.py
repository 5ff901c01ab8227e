"""A user's report of speculation that loses, reproduced, and what pipelining would make of it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.laboratory import with_settings
from analysis.pages import between, fill, markdown_table
from analysis.studies.bench import PIPELINED, PLAIN, SYNCHRONOUS, Bench, Finding
from analysis.studies.clusters import compared
from analysis.style import COLOURS, line, panels
from analysis.tuning import METHOD
from pipesim.errors import InvariantError
from pipesim.statistics import Interval, bootstrap_interval

REPORTED = {"plain": 61.2, "two drafted tokens": 43.7}
TOLERANCE = 0.03
FIXED_MS = (0.0, 2.5, 5.0, 10.0, 15.0, 25.0)
DRAFTERS_MS = (11.3, 5.0, 2.0)
POLICIES = {
    "synchronous": (SYNCHRONOUS, COLOURS["synchronous"]),
    "pipelined": (PIPELINED, COLOURS["pipelined"]),
    "pipelined, waits for drafts": ({**PIPELINED, "asynchronous": False}, "#009E73"),
}


WORTH = 1.02
"""So much faster than plain decoding, speculation is said to pay."""


def crossing(speeds: NDArray[np.float64]) -> float:
    """The fixed cost at which the mean of speeds relative to plain decoding ``[seeds, costs]`` falls to ``WORTH``."""
    means = speeds.mean(axis=0)
    for right in range(1, len(means)):
        if means[right - 1] >= WORTH > means[right]:
            share = (means[right - 1] - WORTH) / (means[right - 1] - means[right])
            return float(FIXED_MS[right - 1] + share * (FIXED_MS[right] - FIXED_MS[right - 1]))
    return float("nan")


def study(bench: Bench) -> Finding:
    """The reported numbers first; then both kinds of speculation against fixed cost and drafting time."""
    scenario = bench.scenario()
    plain = scenario.model_dump_json()
    reported = bench.measure(
        {
            "plain": with_settings(plain, policy=PLAIN),
            "two drafted tokens": scenario,
            "one drafted token": bench.scenario("policy.max_nodes=1"),
        }
    )
    for name, expected in REPORTED.items():
        found = reported.mean(name).estimate
        if not bench.quick and abs(found / expected - 1) > TOLERANCE:
            raise InvariantError(f"{name}: {found:.1f} tokens/s simulated, {expected} reported: mend the scenario")

    fixed, drafters = (FIXED_MS[0], FIXED_MS[-1]) if bench.quick else FIXED_MS, bench.some(DRAFTERS_MS)
    cases = {
        (cost, draft): bench.scenario(f"cluster.links.draft.latency_ms={cost / 2}", f"cluster.drafter.level_ms={draft}")
        for cost in fixed
        for draft in drafters
    }
    policies = {name: policy for name, (policy, _) in POLICIES.items()}
    tables = compared(bench, cases, policies=policies, kin=lambda case: [one for one in cases if one[1] == case[1]])

    figure, axes = panels(1 + len(drafters), width=3.6)
    _bars(axes[0, 0], reported, tables[fixed[-1], drafters[0]])
    for place, draft in zip(axes[0, 1:], drafters, strict=True):
        for name, (_, colour) in POLICIES.items():
            line(place, fixed, [tables[cost, draft].mean(name) for cost in fixed], name, colour)
        place.axhline(reported.mean("plain").estimate, color=COLOURS["plain"], label="plain decoding")
        place.set(title=f"{draft:g} ms per drafted token", xlabel="fixed cost of a round of drafting, ms")
        place.set(ylabel="tokens per second", ylim=(0, None))
    axes[0, 1].legend()

    def point(name: str, draft: float) -> Interval:
        values = [tables[cost, draft].values(name) for cost in fixed]
        base = tables[fixed[0], draft].values("plain")
        relative = np.array(values).T / np.array(base)[:, None]
        return bootstrap_interval(relative, crossing)

    rows = [
        [
            f"{name}, {draft:g} ms",
            *(between(tables[cost, draft].mean(name), 1) for cost in fixed),
            _words(point(name, draft)),
        ]
        for draft in drafters
        for name in POLICIES
    ]
    worst, none = tables[fixed[-1], drafters[0]], tables[fixed[0], drafters[0]]
    fast = tables[fixed[-1], drafters[-1]]
    waits = "pipelined, waits for drafts"
    return Finding(
        f"Both reported numbers come out within {100 * TOLERANCE:.0f} %: {between(reported.mean('plain'), 1)} tokens/s "
        f"plain (reported 61.2) and {between(reported.mean('two drafted tokens'), 1)} with two drafted tokens (43.7, "
        f"fitted). At these costs pipelining makes the loss {_verdict(worst.ratio('pipelined', 'plain'))}: "
        f"{between(worst.ratio('pipelined', 'plain'))} times plain decoding; tokens that wait for their drafts reach "
        f"{between(worst.ratio(waits, 'plain'))}, longer synchronous drafts "
        f"{between(worst.ratio('synchronous', 'plain'))}. Where drafting has no fixed cost it is "
        f"{between(none.ratio('pipelined', 'plain'))} times plain decoding and "
        f"{between(none.ratio('pipelined', 'synchronous'))} times tuned synchronous speculation. "
        f"{_pays(point('pipelined', drafters[0]), worst.ratio('pipelined', 'plain'))} "
        f"With {drafters[-1]:g} ms per drafted token "
        f"{fixed[-1]:g} ms are {_verdict(fast.ratio(waits, 'plain'))} "
        f"({between(fast.ratio('synchronous', 'plain'))} synchronous, {between(fast.ratio('pipelined', 'plain'))} "
        f"pipelined, {between(fast.ratio(waits, 'plain'))} where tokens wait).",
        [
            fill(
                f"With one drafted token a round the simulation gives {between(reported.mean('one drafted token'), 1)} "
                "tokens/s, less than with two, as the report says without a number."
            ),
            fill(
                "Tokens per second against the fixed cost of a round of drafting, policies at their best; last column: "
                "the fixed cost below which speculation is at least 2 % faster than plain decoding, if that lies "
                "between:"
            ),
            markdown_table(["policy, time per drafted token", *(f"{cost:g} ms" for cost in fixed), "pays below"], rows),
        ],
        [
            METHOD,
            "What is best at one fixed cost is tried at the others, too.",
            "Plain decoding is predicted from the step's 16.3 ms. Speculation has one fitted number (11.3 ms per "
            "drafted token, for all that a drafted token costs, its row in the verification included), so its "
            "agreement is no evidence; that one drafted token is worse than two is.",
            "The engine's drafter reads the target's hidden states and cannot run ahead of them. Pipelined speculation "
            "needs one that can: a separate draft model, or look-up. The crossing points interpolate between the fixed "
            "costs that were simulated; their intervals are bootstrapped over seeds.",
        ],
        figure,
    )


def _bars(axes: Any, reported: Any, tuned: Any) -> None:
    shown = [
        ("plain", reported.mean("plain"), COLOURS["plain"]),
        ("synchronous, 2", reported.mean("two drafted tokens"), COLOURS["synchronous"]),
        ("synchronous, 1", reported.mean("one drafted token"), COLOURS["synchronous"]),
        ("synchronous, best", tuned.mean("synchronous"), COLOURS["synchronous"]),
        ("pipelined, best", tuned.mean("pipelined"), COLOURS["pipelined"]),
    ]
    for at, (_, speed, colour) in enumerate(shown):
        axes.bar(at, speed.estimate, color=colour, yerr=speed.half_width, error_kw={"elinewidth": 1})
    axes.plot([0, 1], list(REPORTED.values()), "kx", markersize=7, label="reported")
    axes.set_xticks(range(len(shown)), [name for name, *_ in shown], rotation=30, ha="right")
    axes.set(ylabel="tokens per second", title="as reported", ylim=(0, 1.2 * REPORTED["plain"]))
    axes.grid(False, axis="x")
    axes.legend(loc="upper center")


def _verdict(ratio: Interval) -> str:
    """What so many times the speed of plain decoding is called."""
    if ratio.low > 1:
        return "a gain"
    return "a loss" if ratio.high < 1 else "neither gain nor loss"


def _pays(point: Interval, at_most: Interval) -> str:
    """Up to which fixed cost it pays, ``at_most`` being its gain at the highest that was tried."""
    if not np.isnan(point.estimate):
        return f"It pays below {_words(point)}."
    return "It pays at every fixed cost tried." if at_most.estimate >= WORTH else "It pays at no fixed cost tried."


def _words(point: Interval) -> str:
    return "-" if np.isnan(point.estimate) else f"{between(point, 1)} ms"
