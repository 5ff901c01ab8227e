"""The limit of the gain as one model is cut into more stages."""

from analysis.pages import between
from analysis.studies.bench import Bench, Finding
from analysis.studies.limit import (
    RATES,
    SEARCHES,
    STAGES,
    Line,
    against_stages,
    gain_lines,
    gain_table,
    largest,
    settings_table,
    slower,
    time_shares,
)
from analysis.style import CYCLE, doubling, line, panels
from analysis.tuning import METHOD
from pipesim.scenario import Scenario

SLOPE = 0.1
MODEL_MS = 160.0
WHY = 0.8
"""Acceptance rate at which the reasons are looked for."""


def study(bench: Bench) -> Finding:
    """Rates by stages, both policies tuned."""
    stages, rates = bench.some(STAGES[:3] if bench.quick else STAGES), bench.some(RATES)
    why = WHY if WHY in rates else rates[-1]

    def scenario(number: int, rate: float) -> Scenario:
        return bench.scenario(
            f"cluster.stages.0.repeat={number}",
            f"cluster.stages.0.cost.constant_ms={MODEL_MS * (1 - SLOPE) / number}",
            f"cluster.stages.0.cost.per_token_ms={MODEL_MS * SLOPE / number}",
            f"acceptance.rate={rate}",
        )

    lines: dict[Line, str] = {(rate,): f"{rate}" for rate in rates}
    tables = against_stages(bench, {(held, one): scenario(one, *held) for held in lines for one in stages})

    figure, axes = panels(3, width=4.0)
    gain_lines(axes[0, 0], tables, lines, stages)
    axes[0, 0].set_ylabel("speed, tuned synchronous = 1")
    axes[0, 0].legend(title="acceptance", ncols=2)
    for (held, label), colour in zip(lines.items(), CYCLE, strict=False):
        line(axes[0, 1], stages, [tables[held, one].mean("pipelined") for one in stages], label, colour)
    doubling(axes[0, 1], stages)
    axes[0, 1].set(xlabel="stages", ylabel="tokens per second, pipelined", ylim=(0, None))
    time_shares(axes[0, 2], [(f"{one}", tables[(why,), one]) for one in stages])
    axes[0, 2].set(xlabel="stages: synchronous | pipelined", ylabel="share of a token's time, %")
    axes[0, 2].set_title(f"acceptance {why}")

    (held, deep), best = largest(tables)
    last = stages[-1]
    ends = {rate: tables[(rate,), last].ratio("pipelined", "synchronous") for rate in rates}
    fastest = {rate: max(stages, key=lambda one: tables[(rate,), one].mean("pipelined").estimate) for rate in rates}
    numbers = sorted(set(fastest.values()))
    most = f"{numbers[0]} stages" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} stages"
    lost = ", ".join(f"{number} at acceptance {held[0]:g}" for held, number in slower(tables)) or "nowhere"
    return Finding(
        f"The largest gain is {between(best)} ({deep} stages, acceptance {held[0]:g}); with {last} stages it is "
        f"{between(ends[rates[0]])} at acceptance {rates[0]} and {between(ends[rates[-1]])} at {rates[-1]}. Once a "
        "stage is faster than the drafter, which here takes 4 ms per token, more stages only add hops: pipelined "
        f"speculation is fastest with {most}, whatever the acceptance. Tuned synchronous speculation is the faster "
        f"one with few stages: {lost}.",
        [
            "Speed of pipelined speculation, tuned synchronous speculation = 1:",
            gain_table(tables, lines, stages, "synchronous"),
            "The same over an untuned synchronous baseline (16 tokens, one branch, confidence bar 0.5: the reference "
            "code's defaults):",
            gain_table(tables, lines, stages, "untuned"),
            "<details><summary>Settings that were found</summary>\n\n"
            + settings_table(tables, lines, stages)
            + "\n\n</details>",
        ],
        [
            METHOD,
            SEARCHES,
            "All times are invented.",
        ],
        figure,
    )
