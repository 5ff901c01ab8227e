"""The gain over tuned synchronous speculation against the number of stages: what both readings share."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from analysis.laboratory import Settings, with_settings
from analysis.pages import between, markdown_table
from analysis.studies.bench import PIPELINED, PLAIN, SYNCHRONOUS, Bench, Table
from analysis.style import CYCLE, doubling, line
from analysis.tuning import tune
from pipesim.scenario import Scenario
from pipesim.statistics import Interval

STAGES = (2, 4, 8, 16, 32, 64, 128)
RATES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
HEADLINE = 2.15
"""The paper's largest gain."""
UNTUNED: Settings = {"name": "speculative", "max_nodes": 16, "branches": 1, "cutoff": 0.5}
"""Synchronous speculation as the reference implementation's defaults have it."""
_AFRESH = 8
"""Up to so many stages every search begins with the coarse grid; beyond, with what half as many stages liked best."""
SEARCHES = (
    "All policies climb once more from where both kinds of speculation got to, each with the other's tokens, branches "
    f"and bars, too, lest one is judged by where its search got stuck. With more than {_AFRESH} stages this is the "
    "only search, and begins at what half as many stages liked best."
)
"""How searches for many stages go beyond ``analysis.tuning.METHOD``, for pages."""

Line = tuple[float, ...]
"""What is held fixed while stages are added, e.g. slope and acceptance rate."""


def against_stages(
    bench: Bench, scenarios: Mapping[tuple[Line, int], Scenario], also: Mapping[str, Settings] | None = None
) -> dict[tuple[Line, int], Table]:
    """Pipelined and synchronous speculation, each at its best, the latter untuned, too, and plain decoding.

    Args:
        bench: where to simulate.
        scenarios: by line and number of stages.
        also: further policies, tuned as well.
    """
    policies = {"pipelined": PIPELINED, "synchronous": SYNCHRONOUS, **(also or {})}
    places: dict[tuple[Line, str], Settings] = {}
    groups: dict[tuple[Line, int], dict[str, Scenario]] = {}
    for stages in sorted({stages for _, stages in scenarios}):
        plain = {held: one.model_dump_json() for (held, number), one in scenarios.items() if number == stages}
        groups |= {
            (held, stages): {"untuned": with_settings(one, policy=UNTUNED), "plain": with_settings(one, policy=PLAIN)}
            for held, one in plain.items()
        }
        cases = [(held, name) for held in plain for name in policies]
        for afresh in (True, False) if stages <= _AFRESH else (False,):
            starts = {case: [] if afresh else [_starts(places, *case)] for case in cases}
            jobs = [(plain[held], policies[name], *starts[held, name]) for held, name in cases]
            found = dict(zip(cases, bench.map(tune, jobs), strict=True))
            places |= {case: best["place"] for case, best in found.items()}
        for (held, name), best in found.items():
            groups[held, stages][name] = with_settings(plain[held], policy=best["settings"])
            bench.note_ends(f"{name}, {stages} stages, {held}", best)
    return bench.measure_all(groups)


def _starts(places: Mapping[tuple[Line, str], Settings], held: Line, name: str) -> list[Settings]:
    """What the policy liked best so far, and what the other one did. Their axes stand in the same order."""
    own, other = places[held, name], places[held, "pipelined" if name == "synchronous" else "synchronous"]
    return [own, {**own, **dict(zip(own, other.values(), strict=False))}]


def gain_lines(
    axes: Axes,
    tables: Mapping[tuple[Line, int], Table],
    lines: Mapping[Line, str],
    stages: Sequence[int],
    baseline: str = "synchronous",
) -> None:
    """One line per entry of ``lines``, which gives their labels."""
    for (held, label), colour in zip(lines.items(), CYCLE, strict=False):
        line(axes, stages, [tables[held, one].ratio("pipelined", baseline) for one in stages], label, colour)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.axhline(HEADLINE, color="black", linewidth=0.8, linestyle=":")
    doubling(axes, stages)
    axes.set(xlabel="stages", ylim=(0, None))


def gain_table(
    tables: Mapping[tuple[Line, int], Table], lines: Mapping[Line, str], stages: Sequence[int], against: str
) -> str:
    """Gains over a baseline with their intervals, one line per entry of ``lines``."""
    rows = [
        [label, *(between(tables[held, one].ratio("pipelined", against)) for one in stages)]
        for held, label in lines.items()
    ]
    return markdown_table(["acceptance", *(f"{one} stages" for one in stages)], rows)


def settings_table(tables: Mapping[tuple[Line, int], Table], lines: Mapping[Line, str], stages: Sequence[int]) -> str:
    """What both policies were set to."""
    rows = []
    for held, label in lines.items():
        for policy in ("pipelined", "synchronous"):
            rows.append([f"{label}, {policy}", *(tables[held, one].settings(policy) for one in stages)])
    return markdown_table(["acceptance", *(f"{one} stages" for one in stages)], rows)


def time_shares(axes: Axes, groups: Sequence[tuple[str, Table]]) -> None:
    """What a token's time goes into: two stacked bars per group, synchronous and pipelined, shares of the former."""
    shown = [part for part in _PARTS if any(_share(table, part, policy) > 1 for _, table in groups for policy in _BOTH)]
    for at, (_, table) in enumerate(groups):
        for policy, shift in zip(_BOTH, (-0.2, 0.2), strict=True):
            bottom = 0.0
            for part in shown:
                label = part if not at and policy == _BOTH[0] else None
                share = _share(table, part, policy)
                axes.bar(at + shift, share, 0.36, bottom=bottom, color=_PARTS[part], label=label)
                bottom += share
    axes.set_xticks(range(len(groups)), [name for name, _ in groups])
    axes.set_ylim(0, 140)
    axes.grid(False, axis="x")
    axes.legend(loc="upper center", ncols=2)


def _share(table: Table, part: str, policy: str) -> float:
    """A part of a policy's time per token, in percent of synchronous speculation's time."""
    whole = sum(table.mean("synchronous", f"gap, {one}, ms").estimate for one in _PARTS)
    return 100 * table.mean(policy, f"gap, {part}, ms").estimate / whole


_BOTH = ("synchronous", "pipelined")
_PARTS = {
    "compute": "#0072B2",
    "queueing": "#E69F00",
    "drafter": "#444444",
    "head": "#CC79A7",
    "serialisation": "#56B4E9",
    "propagation": "#009E73",
}
"""Of a latency (``pipesim.metrics.LatencyShares``), with their colours."""


def chain_limit(slope: float, rate: float) -> float:
    """The gain with infinitely many stages if all speculation is chains.

    Drafting then takes no time beside a traversal. A pipelined chain yields the tokens up to the next error in one
    traversal, ``1 / (1 - a)`` of them; a synchronous one of ``k`` tokens ``(1 - a^(k+1)) / (1 - a)`` in one that is
    ``1 + c k`` times as long (Leviathan et al., arXiv 2211.17192, with the run's cost).
    """
    best = max((1 - rate ** (k + 1)) / (1 + slope * k) for k in range(1000))
    return 1 / best


def slower(tables: Mapping[tuple[Line, int], Table]) -> list[tuple[Line, int]]:
    """Where tuned synchronous speculation is the faster one beyond chance."""
    return [where for where, table in tables.items() if table.ratio("pipelined", "synchronous").high < 1]


def largest(tables: Mapping[tuple[Line, int], Table]) -> tuple[tuple[Line, int], Interval]:
    """Where the gain is largest, and how large."""
    gains = {where: table.ratio("pipelined", "synchronous") for where, table in tables.items()}
    where = max(gains, key=lambda one: gains[one].estimate)
    return where, gains[where]
