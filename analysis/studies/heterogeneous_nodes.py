"""The gain against how unlike the nodes are, with layers placed evenly and by speed."""

from analysis.laboratory import with_settings
from analysis.pages import between, markdown_table
from analysis.studies.bench import PIPELINED, PLAIN, SYNCHRONOUS, Bench, Finding
from analysis.style import CYCLE, doubling, line, panels
from analysis.tuning import METHOD
from pipesim.hardware.devices import DEVICES
from pipesim.scenario import Scenario

SPREADS = (1, 2, 4, 8, 16)
"""Bandwidth of the fastest node / of the slowest one."""
PLACEMENTS = {"layers by speed": "auto", "layers evenly": "null"}
RATES = (0.7, 0.9)
NODES = 8
NETWORK_GBPS = 0.94


def speeds(spread: float) -> list[float]:
    """Relative speeds of the nodes in pipeline order: geometric, mean 1, fast and slow ones alternating."""
    ordered = [spread ** (-node / (NODES - 1)) for node in range(NODES)]
    mean = sum(ordered) / NODES
    half = NODES // 2
    return [ordered[node // 2 + half * (node % 2)] / mean for node in range(NODES)]


def study(bench: Bench) -> Finding:
    """Spreads by placements by rates, both policies tuned."""
    spreads, rates = bench.some(SPREADS), bench.some(RATES)
    peak = DEVICES["dual-xeon-2017"].memory_bandwidth_gbytes_s

    def scenario(spread: int, placement: str, rate: float) -> Scenario:
        nodes = speeds(spread)
        stages = (
            f"{{layers: {PLACEMENTS[placement]}, cost: {{kind: roofline, profile: dual-xeon-2017, "
            f"memory_bandwidth_gbytes_s: {peak * speed}, memory_gib: null}}}}"
            for speed in nodes
        )
        hops = (f"{{hop: {hop + 1}, bandwidth_gbps: {NETWORK_GBPS * speed}}}" for hop, speed in enumerate(nodes))
        return bench.scenario(
            f"cluster.stages=[{', '.join(stages)}]",
            f"cluster.links.hops=[{', '.join(hops)}]",
            f"acceptance.rate={rate}",
        )

    cases = {
        (spread, placement, rate): scenario(spread, placement, rate)
        for spread in spreads
        for placement in PLACEMENTS
        for rate in rates
    }
    tuned = bench.tuned(cases, {"pipelined": PIPELINED, "synchronous": SYNCHRONOUS})
    tables = bench.measure_all(
        {
            case: {**tuned[case], "plain": with_settings(one.model_dump_json(), policy=PLAIN)}
            for case, one in cases.items()
        }
    )

    figure, axes = panels(3, width=3.8)
    for (placement, rate), colour in zip(((p, r) for p in PLACEMENTS for r in rates), CYCLE, strict=False):
        here = [tables[spread, placement, rate] for spread in spreads]
        label = f"{placement}, acceptance {rate}"
        line(axes[0, 0], spreads, [one.ratio("pipelined", "synchronous") for one in here], label, colour)
        line(axes[0, 1], spreads, [one.mean("pipelined") for one in here], label, colour)
        line(axes[0, 2], spreads, [one.mean("pipelined", "bubbles, %") for one in here], label, colour)
    labels = ("speed, tuned synchronous = 1", "tokens per second, pipelined", "idle stage time, pipelined, %")
    for place, label in zip(axes[0], labels, strict=True):
        doubling(place, spreads)
        place.set(xlabel="fastest node / slowest node", ylabel=label, ylim=(0, None))
    axes[0, 0].legend(fontsize=7)

    last, rate = spreads[-1], rates[0]
    gain = {
        (spread, placement): tables[spread, placement, rate].ratio("pipelined", "synchronous")
        for spread in spreads
        for placement in PLACEMENTS
    }
    auto, even = PLACEMENTS
    return Finding(
        f"At acceptance {rate} the gain over tuned synchronous speculation is {between(gain[1, auto])} with equal "
        f"nodes. With nodes that differ by a factor of {last} it is {between(gain[last, auto])} if layers are placed "
        f"by speed and {between(gain[last, even])} if they are placed evenly; placement itself is worth more: "
        f"{between(tables[last, auto, rate].mean('pipelined'))} against "
        f"{between(tables[last, even, rate].mean('pipelined'))} tokens per second.",
        [
            "Gain of pipelined over synchronous speculation, and tokens per second of both:",
            markdown_table(
                ["fastest / slowest node, layers, acceptance", "gain", "pipelined", "synchronous", "plain"],
                [
                    [
                        f"{spread}, {placement.removeprefix('layers ')}, {rate}",
                        between(table.ratio("pipelined", "synchronous")),
                        *(between(table.mean(name)) for name in ("pipelined", "synchronous", "plain")),
                    ]
                    for (spread, placement, rate), table in tables.items()
                ],
            ),
        ],
        [
            METHOD,
            "Layers by speed: the schema's `layers: auto`. Each node's network interface is as much faster or slower "
            "than the mean as its memory. Nodes have memory enough for whatever is placed there.",
        ],
        figure,
    )
