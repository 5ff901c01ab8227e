"""Stages against tensor parallelism, with and without KV multibuffering."""

from analysis.laboratory import with_settings
from analysis.pages import between, markdown_table
from analysis.studies.bench import PIPELINED, PLAIN, SYNCHRONOUS, Bench, Finding
from analysis.style import COLOURS, doubling, line, panels
from analysis.tuning import METHOD
from pipesim.scenario import Scenario

DEVICES = 16
WIDTHS = (1, 2, 4, 8)
RATES = (0.7, 0.9)
POLICIES = {
    "pipelined": (PIPELINED, COLOURS["pipelined"]),
    "without multibuffering": ({**PIPELINED, "multibuffering": False}, "#56B4E9"),
    "synchronous": (SYNCHRONOUS, COLOURS["synchronous"]),
}


def study(bench: Bench) -> Finding:
    """Ways to cut sixteen devices by rates, all policies tuned."""
    widths, rates = bench.some(WIDTHS), bench.some(RATES)

    def scenario(width: int, rate: float) -> Scenario:
        team = f", tensor_parallel: {width}, all_reduce: {{profile: nvlink-4}}" if width > 1 else ""
        cost = f"{{kind: roofline, profile: h100-sxm, overhead_ms: 0.1{team}}}"
        return bench.scenario(
            f"cluster.stages=[{{repeat: {DEVICES // width}, cost: {cost}}}]", f"acceptance.rate={rate}"
        )

    cases = {(width, rate): scenario(width, rate) for width in widths for rate in rates}
    tuned = bench.tuned(cases, {name: policy for name, (policy, _) in POLICIES.items()})
    tables = bench.measure_all(
        {
            case: {**tuned[case], "plain": with_settings(one.model_dump_json(), policy=PLAIN)}
            for case, one in cases.items()
        }
    )

    figure, axes = panels(2 * len(rates), width=3.4)
    for at, rate in enumerate(rates):
        speeds, gains = axes[0, 2 * at], axes[0, 2 * at + 1]
        for name, (_, colour) in POLICIES.items():
            line(speeds, widths, [tables[width, rate].mean(name) for width in widths], name, colour)
            line(gains, widths, [tables[width, rate].ratio(name, "synchronous") for width in widths], name, colour)
        line(speeds, widths, [tables[width, rate].mean("plain") for width in widths], "plain", COLOURS["plain"])
        for place, label in ((speeds, "tokens per second"), (gains, "speed, tuned synchronous = 1")):
            doubling(place, widths)
            place.set(title=f"acceptance {rate}", xlabel=f"devices of a stage, of {DEVICES}", ylabel=label)
            place.set_ylim(0, None)
    axes[0, 0].legend(fontsize=7)

    rate = rates[0]
    narrow, wide = tables[widths[0], rate], tables[widths[-1], rate]

    def worth(width: int) -> str:
        return between(tables[width, rate].ratio("pipelined", "without multibuffering"))

    return Finding(
        f"For tensor parallelism: at acceptance {rate}, pipelined speculation reaches "
        f"{between(narrow.mean('pipelined'), 0)} tokens per second with {DEVICES // widths[0]} stages of "
        f"{widths[0]} device and {between(wide.mean('pipelined'), 0)} with {DEVICES // widths[-1]} stages of "
        f"{widths[-1]}. Its gain over tuned synchronous speculation goes from "
        f"{between(narrow.ratio('pipelined', 'synchronous'))} to {between(wide.ratio('pipelined', 'synchronous'))}; "
        f"what multibuffering is worth, from {worth(widths[0])} to {worth(widths[-1])}.",
        [
            "Tokens per second; gain: pipelined over synchronous; multibuffering: with over without, each tuned:",
            markdown_table(
                ["devices x stages, acceptance", "pipelined", "synchronous", "plain", "gain", "multibuffering"],
                [
                    [
                        f"{width} x {DEVICES // width}, {rate}",
                        *(between(table.mean(name), 0) for name in ("pipelined", "synchronous", "plain")),
                        between(table.ratio("pipelined", "synchronous")),
                        between(table.ratio("pipelined", "without multibuffering")),
                    ]
                    for (width, rate), table in tables.items()
                ],
            ),
        ],
        [
            METHOD,
            "Partitions share the cells of the text, so that a device's share of them is as large with many "
            "partitions as with one but for the cells of runs in flight; Llama-3.1-70B has eight KV heads, one for "
            "each device of the widest stage. Assumed are 70 % of the data sheets' peaks, 0.1 ms for launches of a "
            "run, and 0.01 ms and 100 Gbit/s between stages. A ring's latency is all that an all-reduce of a few rows "
            "costs.",
        ],
        figure,
    )
