"""The gain against how unlike the nodes are, with layers placed evenly and by speed."""

from collections.abc import Iterable, Mapping

from matplotlib.axes import Axes

from analysis.pages import between, fill, markdown_table
from analysis.studies.bench import Bench, Finding, Table
from analysis.studies.clusters import MEASURED_SLOPE, SLOPE_METHOD, compared, gain, with_slope
from analysis.style import CYCLE, doubling, line, panels
from analysis.tuning import METHOD
from pipesim.hardware.devices import DEVICES
from pipesim.scenario import Scenario
from pipesim.statistics import Interval, paired_ratio

SPREADS = (1, 2, 4, 8, 16)
"""Speed of the fastest node / of the slowest one."""
BY_SPEED, EVENLY = "by speed", "evenly"
PLACEMENTS = {BY_SPEED: "auto", EVENLY: "null"}
RATES = (0.7, 0.9)
NODES = 8
MEAN, SLOW_GBPS = "dual-xeon-2017", 0.1
MIXES = {
    "8 CPU nodes of 2017": (MEAN,) * 8,
    "4 of 2017, 4 of 2023": (MEAN, "dual-xeon-2023") * 4,
    "6 of 2017, 2 RTX 4090": (MEAN, MEAN, MEAN, "rtx-4090") * 2,
    "4 of 2017, 3 RTX 4090, 1 H100": (MEAN, "rtx-4090") * 3 + (MEAN, "h100-sxm"),
}
POLICIES = ("plain", "synchronous", "pipelined")
UNITS = ("gain", *(f"{name}, tokens/s" for name in POLICIES))


def speeds(spread: float) -> list[float]:
    """The nodes' speeds in pipeline order: geometric, mean 1, fast and slow ones alternating."""
    ordered = [spread ** (-node / (NODES - 1)) for node in range(NODES)]
    mean, half = sum(ordered) / NODES, NODES // 2
    return [ordered[node // 2 + half * (node % 2)] / mean for node in range(NODES)]


def study(bench: Bench) -> Finding:
    """Spreads of speeds by placements by rates, spreads of bandwidth, and mixes of real machines."""
    spreads, rates, mixes = bench.some(SPREADS), bench.some(RATES), bench.some(list(MIXES))
    rate = rates[0]
    by_speed = {
        (spread, placement, rate): _scenario(bench, _spread_stages(spread, PLACEMENTS[placement]), rate)
        for spread in spreads
        for placement in PLACEMENTS
        for rate in rates
    }
    by_mix = {
        (mix, placement): _scenario(bench, _mixed_stages(mix, PLACEMENTS[placement]), rate)
        for mix in mixes
        for placement in PLACEMENTS
    }
    by_bandwidth = {(spread,): _scenario(bench, _spread_stages(1, "auto"), rate, _hops(spread)) for spread in spreads}
    tables = compared(bench, {**by_speed, **by_mix, **by_bandwidth})

    figure, axes = panels(3, width=4.2)
    looks = zip(((placement, one) for placement in PLACEMENTS for one in rates), CYCLE, strict=False)
    for (placement, one), colour in looks:
        here = [tables[spread, placement, one] for spread in spreads]
        label = f"layers {placement}, acceptance {one}"
        line(axes[0, 0], spreads, [gain(table) for table in here], label, colour)
        line(axes[0, 1], spreads, [table.mean("pipelined") for table in here], label, colour)
    apart = [gain(tables[spread,]) for spread in spreads]
    line(axes[0, 0], spreads, apart, f"bandwidth alone, acceptance {rate}", "black", "s:")
    for place, label in zip(axes[0], ("speed, tuned synchronous = 1", "tokens per second, pipelined"), strict=False):
        doubling(place, spreads)
        place.set(xlabel="fastest node / slowest node", ylabel=label, ylim=(0, None))
    axes[0, 0].legend(fontsize=7)
    _bars(axes[0, 2], {key: gain(tables[key]) for key in by_mix})

    last = spreads[-1]
    ends = {placement: tables[last, placement, rate] for placement in PLACEMENTS}
    placed = paired_ratio(*(ends[placement].values("pipelined") for placement in (BY_SPEED, EVENLY)))
    mixed = {mix: gain(tables[mix, BY_SPEED]) for mix in mixes}
    return Finding(
        f"At acceptance {rate} the gain over tuned synchronous speculation is "
        f"{between(gain(tables[1, BY_SPEED, rate]))} with equal nodes. If the fastest is {last} times as fast as the "
        f"slowest, their total speed being the same, it is {between(gain(ends[BY_SPEED]))} with layers placed by speed "
        f"and {between(gain(ends[EVENLY]))} with as many on every node; placement by speed makes pipelined speculation "
        f"{between(placed)} times as fast. Bandwidth alone, spread {last}-fold around {SLOW_GBPS:g} Gbit/s, "
        f"changes the gain from {between(apart[0])} to {between(apart[-1])}; mixes of real machines, layers by speed, "
        f"gain {min(one.estimate for one in mixed.values()):.2f} to {max(one.estimate for one in mixed.values()):.2f}.",
        [
            "Speeds spread geometrically, equal links; gain: pipelined over synchronous, both tuned:",
            _table(
                ["fastest / slowest", "layers", "acceptance", "slowest stage, ms"],
                ([*key, _slowest(by_speed[key]), *_figures(tables[key])] for key in by_speed),
            ),
            f"Mixes of real machines, acceptance {rate}:",
            _table(
                ["nodes", "layers", "slowest stage, ms"],
                ([*key, _slowest(by_mix[key]), *_figures(tables[key])] for key in by_mix),
            ),
            f"Equal nodes whose network interfaces differ, {SLOW_GBPS:g} Gbit/s in the mean, acceptance {rate}:",
            _table(["fastest / slowest"], ([*key, *_figures(tables[key])] for key in by_bandwidth)),
            fill(
                "A synchronous run, like a token of plain decoding, takes the sum of all stages' times, wherever they "
                "are spent. Pipelined runs follow one another as fast as the slowest stage lets them: evenly placed "
                "layers on unlike nodes take from pipelining what it lives on. With layers by speed the stages are "
                "equal again, as far as whole layers go. On faster nodes, and on slower links, messages and drafting "
                "weigh more, and these are what pipelined speculation hides."
            ),
        ],
        [
            METHOD,
            SLOPE_METHOD,
            f"Here c = {MEASURED_SLOPE:g} on all stages. By speed: the schema's `layers: auto`; evenly: as many "
            "layers on every node. A node's speed is that of its memory and its arithmetic alike; nodes have room for "
            "whatever is placed there. A node's network interface bounds what it sends on; the first hop, from the "
            "head, is of mean bandwidth.",
        ],
        figure,
    )


def _scenario(bench: Bench, stages: Iterable[str], rate: float, links: str = "") -> Scenario:
    overrides = [f"cluster.stages=[{', '.join(stages)}]", f"acceptance.rate={rate}"]
    return with_slope(bench.scenario(*overrides, *([f"cluster.links={links}"] if links else [])), MEASURED_SLOPE)


def _spread_stages(spread: float, layers: str) -> Iterable[str]:
    device = DEVICES[MEAN]
    for speed in speeds(spread):
        bandwidth, peak = device.memory_bandwidth_gbytes_s * speed, device.peak("bfloat16") * speed
        cost = f"{{kind: roofline, memory_bandwidth_gbytes_s: {bandwidth}, peak_tflops: {peak}}}"
        yield f"{{layers: {layers}, cost: {cost}}}"


def _mixed_stages(mix: str, layers: str) -> Iterable[str]:
    return (f"{{layers: {layers}, cost: {{kind: roofline, profile: {profile}}}}}" for profile in MIXES[mix])


def _hops(spread: float) -> str:
    hops = (f"{{hop: {hop}, bandwidth_gbps: {SLOW_GBPS * speed}}}" for hop, speed in enumerate(speeds(spread), 1))
    return f"{{latency_ms: 0.05, bandwidth_gbps: {SLOW_GBPS}, hops: [{', '.join(hops)}]}}"


def _slowest(scenario: Scenario) -> str:
    return f"{max(stage.run_ms for stage in scenario.stage_summaries()):.1f}"


def _figures(table: Table) -> list[str]:
    return [between(gain(table)), *(between(table.mean(name)) for name in POLICIES)]


def _table(titles: list[str], rows: Iterable[list[object]]) -> str:
    return markdown_table([*titles, *UNITS], rows)


def _bars(axes: Axes, gains: Mapping[tuple[str, str], Interval]) -> None:
    mixes = list(dict.fromkeys(mix for mix, _ in gains))
    for placement, colour, shift in zip(PLACEMENTS, CYCLE, (-0.2, 0.2), strict=False):
        here = [gains[mix, placement] for mix in mixes]
        at, errors = [row + shift for row in range(len(mixes))], [one.half_width for one in here]
        axes.barh(at, [one.estimate for one in here], 0.38, xerr=errors, color=colour, label=f"layers {placement}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(mixes)), [mix.replace(", ", ",\n") for mix in mixes], fontsize=7)
    axes.set(xlabel="speed, tuned synchronous = 1", xlim=(0.8, None))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.legend(fontsize=7)
