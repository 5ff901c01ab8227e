"""The limit of the gain as stages of the same speed are added."""

from analysis.laboratory import with_settings
from analysis.pages import between, fill, markdown_table
from analysis.studies.bench import PIPELINED, Bench, Finding
from analysis.studies.limit import (
    HEADLINE,
    RATES,
    SEARCHES,
    STAGES,
    Line,
    against_stages,
    chain_limit,
    gain_lines,
    gain_table,
    largest,
    settings_table,
    slower,
    time_shares,
)
from analysis.style import COLOURS, doubling, line, panels
from analysis.tuning import COUNTS, METHOD, SEEDS
from pipesim.scenario import Scenario
from pipesim.statistics import Interval

SLOPES = (0.0, 0.1, 0.25)
DRAFTERS_MS = (0.4, 4.0, 20.0)
USUAL_MS = 4.0
STAGE_MS = 20.0
WHY = (0.1, 0.8)
"""Slope and acceptance rate at which the reasons are looked for."""
ABLATED = {"without continuous": {**PIPELINED, "continuous": False}}
CHAINS = (4, 6, 8, 12, 16, 24, 32)
CHAIN_BARS = (0.0, 0.6, 0.65, 0.7)
FAR = (0.1, 0.95)
"""Slope and acceptance rate at which the simulation is held against the closed form."""


def over_chains(bench: Bench, scenario: Scenario) -> dict[str, Interval]:
    """The gain of a pipelined chain of single tokens over the best synchronous chain, without and with confidence "
    "bar."""
    plain = scenario.model_dump_json()
    chains = {
        f"{tokens} {bar}": with_settings(
            plain, policy={"name": "speculative", "max_nodes": tokens, "branches": 1, "cutoff": bar}
        )
        for tokens in bench.some(CHAINS)
        for bar in CHAIN_BARS
    }
    speeds = bench.laboratory.measure(chains, SEEDS[1]).groupby("variant", sort=False)["tokens/s"].mean()
    runs = min(count for count in COUNTS if count >= len(scenario.stages()))
    pipelined = {"name": "pipeinfer", "micro_batch": 1, "branches": 1, "p_accept": 0.0, "partitions": runs}
    bars = {"without": [name for name in chains if name.endswith(" 0.0")], "with": list(chains)}
    best = {bar: chains[max(names, key=lambda name: speeds[name])] for bar, names in bars.items()}
    table = bench.measure({**best, "pipelined": with_settings(plain, policy=pipelined)})
    return {bar: table.ratio("pipelined", bar) for bar in best}


def study(bench: Bench) -> Finding:
    """Slopes by rates by stages; then, on one line, what becomes of stages' time, and other drafters."""
    stages, rates, slopes = bench.some(STAGES[:3] if bench.quick else STAGES), bench.some(RATES), bench.some(SLOPES)
    why = WHY if not bench.quick else (slopes[-1], rates[-1])

    def scenario(number: int, slope: float, rate: float, drafter: float = USUAL_MS) -> Scenario:
        return bench.scenario(
            f"cluster.stages.0.repeat={number}",
            f"cluster.stages.0.cost.constant_ms={STAGE_MS * (1 - slope)}",
            f"cluster.stages.0.cost.per_token_ms={STAGE_MS * slope}",
            f"cluster.drafter.level_ms={drafter}",
            f"acceptance.rate={rate}",
        )

    lines: list[Line] = [(slope, rate) for slope in slopes for rate in rates]
    tables = against_stages(bench, {(held, one): scenario(one, *held) for held in lines for one in stages})
    drafters = bench.some(DRAFTERS_MS)
    others = [ms for ms in drafters if ms != USUAL_MS]
    drafted = against_stages(bench, {((ms,), one): scenario(one, *why, ms) for ms in others for one in stages})
    drafted |= {((USUAL_MS,), one): tables[why, one] for one in stages}
    once = against_stages(bench, {(why, one): scenario(one, *why) for one in stages}, ABLATED)
    by_slope = {slope: {(slope, rate): f"{rate}" for rate in rates} for slope in slopes}

    figure, axes = panels(3, 2, width=4.0)
    for place, slope in zip(axes[0], slopes, strict=False):
        gain_lines(place, tables, by_slope[slope], stages)
        place.set(title=f"a token more costs {slope:g} of a run (c)", ylabel="speed, tuned synchronous = 1")
    axes[0, 0].legend(title="acceptance", ncols=2)
    looks = {"pipelined": COLOURS["pipelined"], "without continuous": "#56B4E9", "synchronous": COLOURS["synchronous"]}
    time_shares(axes[1, 0], [(f"{one}", once[why, one]) for one in stages])
    axes[1, 0].set(xlabel="stages: synchronous | pipelined", ylabel="share of a token's time, %")
    for name, colour in looks.items():
        speeds = [once[why, one].ratio(name, "synchronous") for one in stages]
        line(axes[1, 1], stages, speeds, name, colour)
    axes[1, 1].set(xlabel="stages", ylabel="speed, tuned synchronous = 1", ylim=(0, None))
    axes[1, 1].set_title("what continuous speculation adds")
    axes[1, 1].legend()
    doubling(axes[1, 1], stages)
    names = {(ms,): f"{ms / STAGE_MS:g} of a stage" for ms in sorted({*drafters, USUAL_MS})}
    gain_lines(axes[1, 2], drafted, names, stages)
    axes[1, 2].set(title="time per drafted token", ylabel="speed, tuned synchronous = 1")
    axes[1, 2].legend()

    far = FAR if not bench.quick else why
    chains = over_chains(bench, scenario(stages[-1], *far))
    (held, deep), _ = largest(tables)
    reached = [where for where, table in tables.items() if table.ratio("pipelined", "synchronous").low >= HEADLINE]
    untuned = [where for where, table in tables.items() if table.ratio("pipelined", "untuned").low >= HEADLINE]
    first = min(reached, key=lambda where: where[1], default=None)
    last, before = stages[-1], stages[-2]
    growth = {
        slope: [
            tables[(slope, rate), last].ratio("pipelined", "synchronous").estimate
            / tables[(slope, rate), before].ratio("pipelined", "synchronous").estimate
            for rate in rates
        ]
        for slope in slopes
    }
    at = f"c = {held[0]:g}, acceptance {held[1]:g}, {deep} stages"
    where = (
        "nowhere"
        if first is None
        else f"first with {first[1]} stages (c = {first[0][0]:g}, acceptance {first[0][1]:g})"
    )
    lost = len(slower(tables)) or "none"
    most = {slope: largest({one: table for one, table in tables.items() if one[0][0] == slope})[1] for slope in slopes}
    return Finding(
        "It depends on c, the share of a run's time that a token more costs. The gain is at most "
        + ", ".join(f"{between(gain)} at c = {slope:g}" for slope, gain in most.items())
        + f" (the last one: {at}). Unless c is 0 it grows with the stages, most of all at high "
        f"acceptance, and flattens: from {before} to {last} stages by at most "
        + ", ".join(f"{100 * (max(some) - 1):.0f} % at c = {slope:g}" for slope, some in growth.items())
        + f". 2.15 is reached, beyond chance, {where} and in {len(reached)} of {len(tables)} settings, against "
        f"{len(untuned)} if the synchronous baseline is left at the reference code's defaults. Tuned synchronous "
        f"speculation is the faster one in {lost} of them.",
        [
            *(
                f"Speed of pipelined speculation, tuned synchronous speculation = 1, c = {slope:g}:\n\n"
                + gain_table(tables, by_slope[slope], stages, "synchronous")
                for slope in slopes
            ),
            fill(
                "Why it flattens: both kinds pay a traversal for each error, and the deeper the pipeline, the less the "
                "drafter's time matters beside it. What is left is that the synchronous traversal carries a whole "
                "tree and takes longer by c for each of its tokens, and that a tree has an end: this is worth the "
                "same at every depth. With infinitely many stages, chains alone would gain, by the closed form `(1 / "
                "(1 - a)) / max_k ((1 - a^(k+1)) / ((1 - a) (1 + c k)))`:"
            ),
            markdown_table(
                ["c", *(f"acceptance {rate}" for rate in rates)],
                [[f"{slope:g}", *(f"{chain_limit(slope, rate):.2f}" for rate in rates)] for slope in slopes],
            ),
            fill(
                f"The simulated gain stays below that, since tuned synchronous speculation is more than chains. At c = "
                f"{far[0]:g}, acceptance {far[1]:g} and {stages[-1]} stages, where the closed form gives "
                f"{chain_limit(*far):.2f} for an endless pipeline and text, a pipelined chain gains "
                f"{between(chains['without'])} over synchronous chains without a confidence bar, "
                f"{between(chains['with'])} if a bar ends them where the drafter doubts, and both at their best, with "
                f"trees, {between(tables[far, stages[-1]].ratio('pipelined', 'synchronous'))}."
            ),
            fill(
                "The same gain over an untuned synchronous baseline (16 tokens, one branch, confidence bar 0.5: the "
                f"reference code's defaults), c = {why[0]:g}:"
            ),
            gain_table(tables, by_slope[why[0]], stages, "untuned"),
            "<details><summary>Settings that were found</summary>\n\n"
            + "\n\n".join(f"c = {slope:g}:\n\n" + settings_table(tables, by_slope[slope], stages) for slope in slopes)
            + "\n\n</details>",
        ],
        [
            METHOD,
            SEARCHES,
            "The reasons (second row of the figure) are looked for on one line, with all three policies tuned.",
        ],
        figure,
    )
