"""Stages against tensor parallelism on links of four kinds, and what KV multibuffering is worth with both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.pages import between, fill, markdown_table
from analysis.studies.bench import PIPELINED, Bench, Finding, Table
from analysis.studies.clusters import MEASURED_SLOPE, POLICIES, SLOPE_METHOD, compared, gain, with_slope
from analysis.style import COLOURS, CYCLE, doubling, line, panels
from analysis.tuning import METHOD
from pipesim.scenario import Scenario
from pipesim.statistics import paired_ratio

DEVICES = 8
WIDTHS = (1, 2, 4, 8)
"""Devices of a stage."""
COLLECTIVE_US = 6.6
"""What a collective costs beside its steps (NCCL's tuning table, see docs/hardware.md)."""
SINGLE = "without multibuffering"
ALL = {**POLICIES, SINGLE: {**PIPELINED, "multibuffering": False}}
LOOKS = {**COLOURS, SINGLE: "#56B4E9"}


@dataclass(frozen=True, slots=True)
class Wire:
    """A kind of link: 10^9 bytes per second one way, and the latency of a ring's step."""

    gbytes_s: float
    step_us: float


WIRES = {
    "NVLink 4": Wire(450, 0.6),
    "PCIe 5": Wire(63, 1.0),
    "100 Gbit/s": Wire(12.5, 5.0),
    "1 Gbit/s": Wire(0.125, 50.0),
}

Case = tuple[str, int, float]
"""Kind of link, devices of a stage, slope."""


def study(bench: Bench) -> Finding:
    """Links by ways to cut eight devices, with the slope of real kernels and with the roofline's."""
    wires, widths = bench.some(list(WIRES)), bench.some(WIDTHS)
    cases: dict[Case, Scenario] = {
        (wire, width, slope): _scenario(bench, wire, width, slope)
        for slope, some in ((MEASURED_SLOPE, wires), (0.0, bench.some(wires[::2])))
        for wire in some
        for width in widths
    }
    tables = compared(bench, cases, policies=ALL)

    figure, axes = panels(3, 2, width=4.0, height=2.9)
    for place, wire in zip(axes.flat, wires, strict=False):
        for name, colour in LOOKS.items():
            speeds = [tables[wire, width, MEASURED_SLOPE].mean(name) for width in widths]
            line(place, widths, speeds, name, colour)
        place.set(title=wire, ylabel="tokens per second")
    for wire, colour in zip(wires, CYCLE, strict=False):
        here = [tables[wire, width, MEASURED_SLOPE] for width in widths]
        line(axes[1, 1], widths, [gain(table) for table in here], wire, colour)
        line(axes[1, 2], widths, [table.ratio("pipelined", SINGLE) for table in here], wire, colour)
    for place, baseline in zip(axes[1, 1:], ("tuned synchronous", SINGLE), strict=True):
        place.axhline(1.0, color="black", linewidth=0.8)
        place.set(title=f"pipelined, {baseline} = 1", ylabel="speed")
    for place in axes.flat:
        doubling(place, widths)
        place.set(xlabel=f"GPUs of a stage, of {DEVICES}", ylim=(0, None))
    axes[0, 0].legend(fontsize=7)
    axes[1, 1].legend(fontsize=7)

    narrow, wide = widths[0], widths[-1]
    best = {(wire, name): _best(tables, wire, name, widths) for wire in wires for name in ("plain", *ALL)}

    def both(wire: str) -> str:
        ours, theirs = (tables[wire, best[wire, name], MEASURED_SLOPE].values(name) for name in POLICIES)
        return f"{between(paired_ratio(ours, theirs))} on {wire}"

    def suits(name: str) -> str:
        return ", ".join(f"{_split(best[wire, name])} on {wire}" for wire in wires)

    ends = [
        f"{between(gain(tables[wire, narrow, MEASURED_SLOPE]))} to {between(gain(tables[wire, wide, MEASURED_SLOPE]))}"
        for wire in (wires[0], wires[-1])
    ]
    return Finding(
        f"The split (stages x GPUs of each) that suits pipelined speculation best is {suits('pipelined')}; synchronous "
        f"speculation: {suits('synchronous')}. From {_split(narrow)} to {_split(wide)} the gain over tuned synchronous "
        f"speculation goes from {ends[0]} on {wires[0]} and from {ends[1]} on {wires[-1]}. Each with the split that "
        f"suits it, pipelined speculation is {'; '.join(map(both, wires))} times as fast.",
        [
            "Stages x GPUs of each. Gain: pipelined over synchronous speculation; multibuffering: pipelined with over "
            f"without, each tuned. c = {MEASURED_SLOPE:g}:",
            _table({case: table for case, table in tables.items() if case[2]}, best),
            "With the roofline's c, all but 0:",
            _table({case: table for case, table in tables.items() if not case[2]}, {}),
            fill(
                "In bold the fastest split of each policy. A pipeline multiplies what it is fed by the number of its "
                "stages; tensor parallelism divides the time of one run. A single request feeds a pipeline only with "
                "speculation, and only as far as that is right, whereas the divided time serves every token: where the "
                "links allow it, few wide stages win, and with them there is less for pipelined speculation to fill. "
                "On a single stage it loses: it sends every corrected token alone, ahead of new speculation, and there "
                "that takes a whole run, whereas synchronous speculation sends that token and its tree in one."
            ),
        ],
        [
            METHOD,
            SLOPE_METHOD,
            f"A collective costs {COLLECTIVE_US:g} µs beside its steps (NCCL's tuning table; docs/hardware.md), and a "
            "message between stages as much. Steps and bandwidths of NVLink and PCIe are those of the profiles; 5 and "
            "50 µs per step of the networks are assumed, and so are 0.1 ms for the launches of a run.",
            "Partitions share the cells of the text: a GPU's share of the KV cache grows with the number of partitions "
            "only by the runs in flight, and is divided among a stage's GPUs as the model's eight KV heads are.",
        ],
        figure,
    )


def _scenario(bench: Bench, name: str, width: int, slope: float) -> Scenario:
    wire = WIRES[name]
    cost = "kind: roofline, profile: h100-sxm, overhead_ms: 0.1"
    if width > 1:
        step = wire.step_us + COLLECTIVE_US / (2 * (width - 1))
        ring = f"{{bandwidth_gbytes_s: {wire.gbytes_s}, latency_us: {step}}}"
        cost = f"{cost}, tensor_parallel: {width}, all_reduce: {ring}"
    return with_slope(
        bench.scenario(
            f"cluster.stages=[{{repeat: {DEVICES // width}, layers: auto, cost: {{{cost}}}}}]",
            f"cluster.links.latency_ms={(wire.step_us + COLLECTIVE_US) / 1e3}",
            f"cluster.links.bandwidth_gbps={8 * wire.gbytes_s}",
        ),
        slope,
    )


def _split(width: int) -> str:
    return f"{DEVICES // width} x {width}"


def _best(tables: Mapping[Case, Table], wire: str, name: str, widths: Sequence[int]) -> int:
    return max(widths, key=lambda width: tables[wire, width, MEASURED_SLOPE].mean(name).estimate)


def _table(tables: Mapping[Case, Table], best: Mapping[tuple[str, str], int]) -> str:
    rows = []
    for (wire, width, _), table in tables.items():
        speeds = {name: between(table.mean(name), 1) for name in ("plain", "synchronous", "pipelined")}
        rows.append(
            [
                f"{wire}, {_split(width)}",
                *(f"**{one}**" if best.get((wire, name)) == width else one for name, one in speeds.items()),
                between(gain(table)),
                between(table.ratio("pipelined", SINGLE)),
            ]
        )
    return markdown_table(["", "plain, tokens/s", "synchronous", "pipelined", "gain", "multibuffering"], rows)
