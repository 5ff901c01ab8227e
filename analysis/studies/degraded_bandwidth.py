"""Slow-down and failures when the network gets worse."""

import hashlib
from itertools import pairwise
from typing import Any

from analysis.laboratory import with_settings
from analysis.pages import between, fill, markdown_table
from analysis.studies.bench import PIPELINED, PLAIN, SYNCHRONOUS, Bench, Finding, Table
from analysis.style import COLOURS, line, panels
from analysis.tuning import METHOD
from pipesim.errors import InvariantError
from pipesim.scenario import Scenario
from pipesim.scenario.network import PRESETS
from pipesim.simulation.pipeline import simulate
from pipesim.statistics import Interval, mean_interval, paired_difference

SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
POLICIES = {"pipelined": PIPELINED, "synchronous": SYNCHRONOUS, "plain": PLAIN}
LOOKS = {
    "pipelined": "o-",
    "pipelined, retuned": "o:",
    "synchronous": "o-",
    "synchronous, retuned": "o:",
    "plain": "o-",
}
FAULTS = {
    "none": "",
    "bandwidth 10 % for 2 s": "{kind: bandwidth, start_ms: 1000, duration_ms: 2000, cap_gbps: 0.094}",
    "bandwidth 1 % for 2 s": "{kind: bandwidth, start_ms: 1000, duration_ms: 2000, cap_gbps: 0.0094}",
    "5 % of packets lost for 2 s": "{kind: loss, start_ms: 1000, duration_ms: 2000, probability: 0.05}",
    "20 ms more latency for 2 s": "{kind: latency, start_ms: 1000, duration_ms: 2000, extra_ms: 20}",
    "drafter cut off for 2 s": "{kind: partition, link: draft, start_ms: 1000, duration_ms: 2000}",
    "partition of 2 s": "{kind: partition, start_ms: 1000, duration_ms: 2000}",
    "a stage dies, back after 2 s": "{kind: crash, stage: 3, start_ms: 1000, detect_ms: 500, restart_ms: 1500}",
}
OVERLAPPING = "all of them at once"


def outage(scenario: str, seed: int) -> dict[str, Any]:
    """One generation: the text's digest, when it was complete, and the longest gap between tokens."""
    trace = simulate(with_settings(scenario, seed=seed))
    times = [emission.time_s for emission in trace.emissions]
    return {
        "text": hashlib.blake2b(repr(trace.tokens).encode(), digest_size=8).hexdigest(),
        "end": times[-1],
        "gap": max(after - before for before, after in pairwise(times)),
    }


def study(bench: Bench) -> Finding:
    """Bandwidth for the whole generation first, then faults in the midst of it."""
    shares = bench.some(SHARES)
    full = PRESETS["1gbe"].bandwidth_gbps or 1.0
    cases = {share: bench.scenario(f"cluster.links.bandwidth_gbps={full * share}") for share in shares}
    tuned = bench.tuned(cases, {name: POLICIES[name] for name in ("pipelined", "synchronous")})

    def variants(share: float) -> dict[str, Scenario]:
        plain = cases[share].model_dump_json()
        kept = {name: one.policy.model_dump() for name, one in tuned[shares[0]].items()}
        found = {name: with_settings(plain, policy=policy) for name, policy in {**kept, "plain": PLAIN}.items()}
        return found | {f"{name}, retuned": one for name, one in tuned[share].items()}

    tables = bench.measure_all({share: variants(share) for share in shares})

    figure, axes = panels(3, width=4.0)
    for name, look in LOOKS.items():
        colour = COLOURS[name.split(",")[0]]
        line(axes[0, 0], shares, [tables[share].mean(name) for share in shares], name, colour, look)
        relative = [_relative(tables, share, shares[0], name) for share in shares]
        line(axes[0, 1], shares, relative, name, colour, look)
    for place, label in zip(axes[0], ("tokens per second", "speed, full bandwidth = 1"), strict=False):
        place.set_xscale("log")
        place.set_xticks(shares, [f"{100 * share:g}" for share in shares])
        place.minorticks_off()
        place.set(xlabel="bandwidth, % of Gigabit Ethernet", ylabel=label, ylim=(0, None))
    axes[0, 0].legend(fontsize=7)

    delays, gaps = _faults(bench, variants(shares[0]))
    for at, (name, colour) in enumerate((name, COLOURS[name]) for name in POLICIES):
        shown = [delays[fault, name] for fault in delays_of(delays)]
        places = [index + 0.27 * (at - 1) for index in range(len(shown))]
        errors = [one.half_width for one in shown]
        axes[0, 2].barh(places, [one.estimate for one in shown], 0.25, color=colour, xerr=errors, label=name)
    axes[0, 2].set_yticks(range(len(delays_of(delays))), delays_of(delays), fontsize=7)
    axes[0, 2].invert_yaxis()
    axes[0, 2].set(xlabel="text complete so much later, s")
    axes[0, 2].grid(False, axis="y")
    axes[0, 2].legend(fontsize=7)

    def left(share: float, name: str) -> str:
        return between(_relative(tables, share, shares[0], name))

    tenth = 0.1 if 0.1 in shares else shares[0]
    last = shares[-1]
    return Finding(
        f"At {100 * tenth:g} % of the bandwidth pipelined speculation keeps {left(tenth, 'pipelined')} of its speed, "
        f"synchronous {left(tenth, 'synchronous')}, plain decoding {left(tenth, 'plain')}; at {100 * last:g} %, "
        f"{left(last, 'pipelined')}, {left(last, 'synchronous')} and {left(last, 'plain')} "
        f"({left(last, 'pipelined, retuned')} and {left(last, 'synchronous, retuned')} if they are retuned). No fault "
        "changed a text; a stage that is gone for 2 s delays it by "
        f"{between(delays['a stage dies, back after 2 s', 'pipelined'])} s with pipelined speculation and "
        f"{between(delays['a stage dies, back after 2 s', 'plain'])} s with plain decoding.",
        [
            "Tokens per second:",
            markdown_table(
                ["bandwidth", *LOOKS],
                [[f"{100 * share:g} %", *(between(tables[share].mean(name)) for name in LOOKS)] for share in shares],
            ),
            fill(
                f"No policy breaks, all get slower. At {100 * last:g} % of the bandwidth a token takes "
                + ", ".join(f"{_spent(tables[last], name)} ({name})" for name in POLICIES)
                + "."
            ),
            fill(
                "Faults that begin one second after the prompt. How much later the text is complete, in seconds "
                "(paired by seed), and the longest gap between tokens, mean over seeds:"
            ),
            markdown_table(
                ["fault", *(f"later, {name}" for name in POLICIES), *(f"gap, {name}" for name in POLICIES)],
                [
                    [
                        fault,
                        *(between(delays[fault, name]) for name in POLICIES),
                        *(f"{gaps[fault, name].estimate:.2f}" for name in POLICIES),
                    ]
                    for fault in delays_of(delays)
                ],
            ),
        ],
        [
            METHOD,
            "Settings are those that are best at full bandwidth, except where it says retuned.",
        ],
        figure,
    )


def delays_of(delays: dict[tuple[str, str], Interval]) -> list[str]:
    """The faults in order."""
    return list(dict.fromkeys(fault for fault, _ in delays))


def _spent(table: Table, name: str) -> str:
    parts = ("compute", "serialisation", "queueing")
    compute, links, queues = (table.mean(name, f"gap, {part}, ms").estimate for part in parts)
    return f"{compute:.0f} ms of compute, {links:.0f} on links and {queues:.0f} in queues"


def _relative(tables: Any, share: float, full: float, name: str) -> Interval:
    slow, fast = tables[share].values(name), tables[full].values(name)
    return mean_interval([one / other for one, other in zip(slow, fast, strict=True)])


def _faults(
    bench: Bench, healthy: dict[str, Scenario]
) -> tuple[dict[tuple[str, str], Interval], dict[tuple[str, str], Interval]]:
    """How much later the text is complete, and the longest gap, by fault and policy."""
    faults = {**FAULTS, OVERLAPPING: ", ".join(fault for fault in FAULTS.values() if fault)}
    kept = {name: healthy[name].policy.model_dump() for name in POLICIES}
    cases = [(fault, name) for fault in faults for name in POLICIES]
    jobs = []
    for fault, name in cases:
        scenario = bench.scenario(f"faults=[{faults[fault]}]").model_dump_json()
        jobs += [(with_settings(scenario, policy=kept[name]).model_dump_json(), seed) for seed in bench.seeds]
    results = iter(bench.map(outage, jobs))
    found = {case: [next(results) for _ in bench.seeds] for case in cases}
    for (fault, name), runs in found.items():
        if [run["text"] for run in runs] != [run["text"] for run in found["none", "plain"]]:
            raise InvariantError(f"{name} generates another text under {fault} (I3)")
    struck = [case for case in cases if case[0] != "none"]
    ends = {case: [run["end"] for run in found[case]] for case in cases}
    return (
        {case: paired_difference(ends[case], ends["none", case[1]]) for case in struck},
        {case: mean_interval([run["gap"] for run in found[case]]) for case in struck},
    )
