"""Bubbles and speed with and without continuous speculation."""

from analysis.pages import between, fill, markdown_table
from analysis.studies.bench import PIPELINED, SYNCHRONOUS, Bench, Finding
from analysis.style import COLOURS, line, panels
from analysis.tuning import METHOD

RATES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
VARIANTS = {
    "continuous": (PIPELINED, COLOURS["pipelined"]),
    "one micro-batch per commit": ({**PIPELINED, "continuous": False}, "#56B4E9"),
    "synchronous": (SYNCHRONOUS, COLOURS["synchronous"]),
}
COLUMNS = {"bubbles, %": "idle stage time, %", "wasted compute, %": "wasted share of busy stage time, %"}


def study(bench: Bench) -> Finding:
    """Tunes each variant at each acceptance rate."""
    rates = bench.some(RATES)
    scenarios = {rate: bench.scenario(f"acceptance.rate={rate}") for rate in rates}
    tuned = bench.tuned(scenarios, {name: policy for name, (policy, _) in VARIANTS.items()})
    tables = bench.measure_all(tuned)

    figure, axes = panels(3, width=3.6)
    for name, (_, colour) in VARIANTS.items():
        for place, (column, label) in zip(axes[0], COLUMNS.items(), strict=False):
            line(place, rates, [tables[rate].mean(name, column) for rate in rates], name, colour)
            place.set(xlabel="acceptance rate", ylabel=label, ylim=(0, 100))
        ratios = [tables[rate].ratio(name, "synchronous") for rate in rates]
        line(axes[0, 2], rates, ratios, name, colour)
    axes[0, 2].set(xlabel="acceptance rate", ylabel="speed, synchronous speculation = 1", ylim=(0, None))
    axes[0, 0].legend(loc="lower left")

    rows = [
        [
            f"{rate}",
            *(between(tables[rate].mean(name, "bubbles, %"), 1) for name in VARIANTS),
            between(tables[rate].ratio("continuous", "one micro-batch per commit")),
        ]
        for rate in rates
    ]
    middle = 0.7 if 0.7 in rates else rates[0]
    at = tables[middle]
    gains = [tables[rate].ratio("continuous", "one micro-batch per commit") for rate in rates]
    return Finding(
        f"At acceptance {middle}, stages idle for {between(at.mean('continuous', 'bubbles, %'), 1)} % of the time with "
        f"continuous speculation and for {between(at.mean('one micro-batch per commit', 'bubbles, %'), 1)} % with one "
        "micro-batch per commit. A filled bubble is worth little where errors are frequent: the generation is "
        f"{between(gains[0])} times as fast at acceptance {rates[0]}, {between(gains[rates.index(middle)])} at "
        f"{middle} and {between(gains[-1])} at {rates[-1]}.",
        [
            fill(
                "Bubbles: percent of all stages' time, until the user has all tokens, in which a stage stood idle. "
                "Last column: speed of continuous speculation, one micro-batch per commit = 1."
            ),
            markdown_table(["acceptance", *(f"bubbles, {name}" for name in VARIANTS), "speed"], rows),
        ],
        [METHOD, "Each of the three is tuned at each acceptance rate. Stage and drafter times are invented."],
        figure,
    )
