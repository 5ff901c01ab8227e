"""Whether the published gain is one of the hardware, and if not, of what."""

from typing import Any

from analysis.pages import between, fill, markdown_table
from analysis.studies.bench import Bench, Finding
from analysis.studies.clusters import (
    MEASURED_SLOPE,
    POLICIES,
    SLOPE_METHOD,
    compared,
    gain,
    gain_rows,
    stage_table,
    with_slope,
)
from analysis.studies.limit import HEADLINE, UNTUNED
from analysis.style import COLOURS, CYCLE, line, panels
from analysis.tuning import METHOD
from pipesim.scenario import Scenario

HARDWARE = {"h100-sxm": "H100", "mi250x-gcd": "MI250X, per device"}
SLOPES = (0.0, 0.05, 0.1, 0.25, 0.5)
RATES = (0.5, 0.8, 0.95)
STAGES = (4, 8, 16)
GPUS = 8
WITHOUT_AND_WITH = (0.0, MEASURED_SLOPE)


def study(bench: Bench) -> Finding:
    """Gains against slope and acceptance on eight GPUs, then against the number of GPUs."""
    slopes, rates, numbers = bench.some(SLOPES), bench.some(RATES), bench.some(STAGES)
    usual = rates[len(rates) // 2]
    lines = {(profile, rate): f"{name}, {rate}" for profile, name in HARDWARE.items() for rate in rates}

    def scenario(profile: str, rate: float, stages: int = GPUS, slope: float = 0.0) -> Scenario:
        machines = [f"cluster.{part}.cost.profile={profile}" for part in ("stages.0", "drafter")]
        of = [f"cluster.stages.0.repeat={stages}", f"acceptance.rate={rate}"]
        return with_slope(bench.scenario(*machines, *of), slope)

    by_slope = {(*held, slope): scenario(*held, slope=slope) for held in lines for slope in slopes}
    kinds = {
        (profile, slope): f"{name}, c = {slope:g}" for profile, name in HARDWARE.items() for slope in WITHOUT_AND_WITH
    }
    by_stages = {
        (profile, slope, number): scenario(profile, usual, number, slope)
        for profile, slope in kinds
        for number in numbers
    }
    cases = {("slope", *key): one for key, one in by_slope.items()} | by_stages
    other = dict(zip(HARDWARE, reversed(HARDWARE), strict=True))

    def twin(key: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return [tuple(other.get(part, part) for part in key)]

    tables = compared(bench, cases, {"untuned": UNTUNED}, kin=twin)
    slope_tables = {key: tables["slope", *key] for key in by_slope}

    figure, axes = panels(3, width=4.0)
    first, *_ = HARDWARE
    for profile, look in zip(HARDWARE, ("o-", "s--"), strict=True):

        def label(text: str, shown: bool = profile == first) -> str:
            return text if shown else "_"

        for rate, colour in zip(rates, CYCLE, strict=False):
            gains = [gain(slope_tables[profile, rate, slope]) for slope in slopes]
            line(axes[0, 0], slopes, gains, label(f"acceptance {rate}"), colour, look)
        for slope, colour in zip(WITHOUT_AND_WITH, CYCLE[3:], strict=False):
            gains = [gain(tables[profile, slope, number]) for number in numbers]
            line(axes[0, 1], numbers, gains, label(f"c = {slope:g}"), colour, look)
        for policy, colour in COLOURS.items():
            speeds = [slope_tables[profile, usual, slope].mean(policy) for slope in slopes]
            line(axes[0, 2], slopes, speeds, label(policy), colour, look)
    axes[0, 0].set(xlabel="a further row costs at least, share of a run (c)", title=f"{GPUS} GPUs", xticks=slopes)
    axes[0, 1].set(xlabel="GPUs", title=f"acceptance {usual}", xticks=numbers)
    axes[0, 2].set(xlabel="c", ylabel="tokens per second", title=f"{GPUS} GPUs, acceptance {usual}", ylim=(0, None))
    axes[0, 2].set_xticks(slopes)
    for place in axes[0, :2]:
        place.axhline(1, color="black", linewidth=0.8)
        place.axhline(HEADLINE, color="black", linewidth=0.8, linestyle=":")
        place.set(ylabel="speed, tuned synchronous = 1", ylim=(0, None))
    for place in axes[0]:
        place.tick_params(labelsize=7)
        place.legend(fontsize=7)
    figure.supxlabel("solid: H100; dashed: MI250X, per device", fontsize=8)

    def across(slope: float) -> str:
        found = [gain(slope_tables[*held, slope]).estimate for held in lines]
        return f"{min(found):.2f} to {max(found):.2f}"

    best_at = max(slope_tables, key=lambda key: gain(slope_tables[key]).estimate)
    best = gain(slope_tables[best_at])
    reached = sorted(key[2] for key, table in slope_tables.items() if gain(table).low >= HEADLINE)
    where = "nowhere here" if not reached else f"only from c = {reached[0]:g} on"
    apart = max(
        abs(gain(slope_tables["h100-sxm", *rest]).estimate / gain(slope_tables["mi250x-gcd", *rest]).estimate - 1)
        for _, *rest in slope_tables
    )
    here = [gain(slope_tables[profile, usual, 0.0]) for profile in HARDWARE]
    speed_rows = [
        [
            f"{name}, c = {slope:g}",
            *(between(slope_tables[profile, usual, slope].mean(policy), 0) for policy in COLOURS),
            *(slope_tables[profile, usual, slope].settings(policy) for policy in POLICIES),
        ]
        for profile, name in HARDWARE.items()
        for slope in slopes
    ]
    return Finding(
        f"With c = 0, as the roofline reports for both, the gain on {GPUS} of them is {between(here[0])} on H100 and "
        f"{between(here[1])} on MI250X devices at acceptance {usual}, and {across(0.0)} over all acceptance rates; "
        f"2.15 is reached {where}. The kind of GPU changes these gains by {100 * apart:.0f} % at most; what decides is "
        f"c, the share of a run's time that a further row costs. The largest gain is {between(best)} (c = "
        f"{best_at[2]:g}, acceptance {best_at[1]}, {HARDWARE[best_at[0]]}).",
        [
            f"Speed of pipelined speculation on {GPUS} GPUs, tuned synchronous speculation = 1; lines: GPU and "
            "acceptance, columns: c:",
            gain_rows(slope_tables, lines, slopes),
            "The same, synchronous speculation at the reference code's defaults (16 tokens, one branch, bar 0.5) = 1:",
            gain_rows(slope_tables, lines, slopes, "untuned"),
            f"Both tuned, at acceptance {usual}; columns: number of GPUs:",
            gain_rows({key: tables[key] for key in by_stages}, kinds, numbers),
            "What the tool reports about the stages, roofline and no lower bound of c:",
            stage_table({f"{HARDWARE[p]}, {n} GPUs": scenario(p, usual, n) for p in HARDWARE for n in numbers}),
            f"Tokens per second at acceptance {usual} and the settings found:",
            markdown_table(["", *COLOURS, *(f"{policy} is set to" for policy in POLICIES)], speed_rows),
            fill(
                "Both GPUs do over a hundred operations in the time of reading a byte, so both read weights at all "
                "times, and their bandwidths set the time of a stage and of a drafted token alike: only the fixed "
                "overheads differ in weight. Where rows are free, synchronous speculation sends large trees at no cost "
                "and needs few traversals; pipelined speculation can only hide the drafting and restart sooner."
            ),
        ],
        [
            f"{METHOD} Settings found for one GPU were tried on the other, and kept where they were faster.",
            SLOPE_METHOD,
            "No c here is a measurement of these GPUs. Invented are the overheads (0.1 ms per run of a stage and per "
            "drafted level, 0.05 ms per event of the head), the links (0.02 ms, 200 Gbit/s), and the share of "
            "bandwidth that is reached, 0.7 for both.",
        ],
        figure,
    )
