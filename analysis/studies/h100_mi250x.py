"""The gain on kinds of hardware."""

from analysis.laboratory import with_settings
from analysis.pages import between, markdown_table
from analysis.studies.bench import PIPELINED, PLAIN, SYNCHRONOUS, Bench, Finding
from analysis.studies.limit import HEADLINE, UNTUNED
from analysis.style import CYCLE, line, panels
from analysis.tuning import METHOD
from pipesim.hardware.costs import micro_batch_slope
from pipesim.scenario import Scenario

KINDS = {
    "H100": "h100-sxm",
    "MI250X": "mi250x",
    "two Xeons of 2023": "dual-xeon-2023",
    "two Xeons of 2017": "dual-xeon-2017",
}
RATES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
ROWS = (4, 16, 64)
"""Of the runs whose cost slope is told."""


def study(bench: Bench) -> Finding:
    """Kinds of devices by rates, both policies tuned."""
    kinds, rates = bench.some(list(KINDS)), bench.some(RATES)

    def scenario(kind: str, rate: float) -> Scenario:
        return bench.scenario(
            f"cluster.stages.0.cost.profile={KINDS[kind]}",
            f"cluster.drafter.cost.profile={KINDS[kind]}",
            f"acceptance.rate={rate}",
        )

    cases = {(kind, rate): scenario(kind, rate) for kind in kinds for rate in rates}
    tuned = bench.tuned(cases, {"pipelined": PIPELINED, "synchronous": SYNCHRONOUS})
    fixed = {"untuned": UNTUNED, "plain": PLAIN}
    tables = bench.measure_all(
        {
            case: {**tuned[case], **{name: with_settings(one.model_dump_json(), policy=fixed[name]) for name in fixed}}
            for case, one in cases.items()
        }
    )

    figure, axes = panels(3, width=3.8)
    for kind, colour in zip(kinds, CYCLE, strict=False):
        here = [tables[kind, rate] for rate in rates]
        line(axes[0, 0], rates, [one.ratio("pipelined", "synchronous") for one in here], kind, colour)
        line(axes[0, 1], rates, [one.ratio("pipelined", "untuned") for one in here], kind, colour)
        line(axes[0, 2], rates, [one.mean("pipelined") for one in here], kind, colour)
    for place in axes[0, :2]:
        place.axhline(1.0, color="black", linewidth=0.8)
        place.axhline(HEADLINE, color="black", linewidth=0.8, linestyle=":")
    titles = ("tuned synchronous = 1", "synchronous with the defaults = 1", "tokens per second, pipelined")
    for place, title in zip(axes[0], titles, strict=True):
        place.set(title=title, xlabel="acceptance rate", ylim=(0, None))
    axes[0, 2].set_yscale("log")
    axes[0, 0].legend(fontsize=7)

    def span(kind: str) -> str:
        gains = [tables[kind, rate].ratio("pipelined", "synchronous") for rate in rates]
        low, high = (pick(gains, key=lambda gain: gain.estimate) for pick in (min, max))
        return f"{between(low)} to {between(high)} on {kind}"

    slopes = []
    for kind in kinds:
        middle = cases[kind, rates[0]].stages()[3]
        cost = middle.cost_model()
        slopes.append([kind, *(f"{micro_batch_slope(cost, rows, 300):.3f}" for rows in ROWS)])
    holds = [case for case, table in tables.items() if table.ratio("pipelined", "synchronous").low >= HEADLINE]
    at = "nowhere" if not holds else "at " + ", ".join(f"acceptance {rate} on {kind}" for kind, rate in holds)
    return Finding(
        f"Against tuned synchronous speculation 2.15 is reached {at}. The gain goes, between acceptance {rates[0]} and "
        f"{rates[-1]}, from {'; '.join(map(span, kinds))}.",
        [
            "Pipelined over synchronous speculation, both tuned:",
            markdown_table(
                ["kind", *(f"acceptance {rate}" for rate in rates)],
                [
                    [kind, *(between(tables[kind, rate].ratio("pipelined", "synchronous")) for rate in rates)]
                    for kind in kinds
                ],
            ),
            "Tokens per second of pipelined speculation:",
            markdown_table(
                ["kind", *(f"acceptance {rate}" for rate in rates)],
                [[kind, *(between(tables[kind, rate].mean("pipelined"), 1) for rate in rates)] for kind in kinds],
            ),
            "Slope c of a middle stage, by runs of so many rows: the share of a one-row run that a row more costs.",
            markdown_table(["kind", *(f"{rows} rows" for rows in ROWS)], slopes),
        ],
        [
            METHOD,
            "Times follow from the model's bytes and operations and the devices' data sheets, with 70 % of the peaks "
            "and 0.1 ms for launches of a run. MI250X is counted as one device with the bandwidth of both its dies.",
        ],
        figure,
    )
