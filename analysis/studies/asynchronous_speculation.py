"""Time to the first tokens of asynchronous and synchronous speculation."""

from itertools import pairwise
from statistics import fmean

from analysis.laboratory import with_settings
from analysis.pages import between, markdown_table
from analysis.studies.bench import PIPELINED, PLAIN, SYNCHRONOUS, Bench, Finding
from analysis.style import COLOURS, line, panels
from analysis.tuning import METHOD
from pipesim.simulation.pipeline import simulate
from pipesim.statistics import Interval, mean_interval, paired_difference

TOKENS = 16
VARIANTS = {
    "asynchronous": PIPELINED,
    "synchronous": SYNCHRONOUS,
    "plain decoding": PLAIN,
}
LOOKS = dict(zip(VARIANTS, (COLOURS["pipelined"], COLOURS["synchronous"], COLOURS["plain"]), strict=True))


def arrivals(scenario: str, seed: int) -> list[float]:
    """When the user has 1, 2, ... tokens, in ms since the prompt was submitted."""
    trace = simulate(with_settings(scenario, seed=seed))
    return [1e3 * emission.time_s for emission in trace.emissions for _ in emission.tokens]


def study(bench: Bench) -> Finding:
    """Tunes both ways to speculate, then looks at when each token arrives."""
    scenario = bench.scenario()
    speculative = {name: policy for name, policy in VARIANTS.items() if policy is not PLAIN}
    variants = bench.tuned({"two nodes": scenario}, speculative)["two nodes"]
    variants["plain decoding"] = bench.scenario("policy.name=autoregressive")
    seeds = range(1, 4 if bench.quick else 101)
    times = {
        name: bench.map(arrivals, [(variant.model_dump_json(), seed) for seed in seeds])
        for name, variant in variants.items()
    }
    count = min(TOKENS, scenario.workload.max_new_tokens)
    token: dict[str, list[Interval]] = {
        name: [mean_interval([run[i] for run in runs]) for i in range(count)] for name, runs in times.items()
    }

    def earlier(number: int, than: str) -> Interval:
        return paired_difference(
            [run[number - 1] for run in times[than]], [run[number - 1] for run in times["asynchronous"]]
        )

    figure, axes = panels(2)
    for name, points in token.items():
        line(axes[0, 0], range(1, count + 1), points, name, LOOKS[name])
        if name != "asynchronous":
            line(axes[0, 1], range(1, count + 1), [earlier(i + 1, name) for i in range(count)], name, LOOKS[name])
    axes[0, 0].set(xlabel="tokens at the user", ylabel="ms since the prompt was submitted", ylim=(0, None))
    axes[0, 0].legend()
    for place in axes[0]:
        place.set_xticks(range(1, count + 1, 3))
    axes[0, 1].set(xlabel="tokens at the user", ylabel="asynchronous speculation is earlier by, ms")
    axes[0, 1].axhline(0, color="black", linewidth=0.8)

    shown = [number for number in (1, 2, 3, 4, 8, 16) if number <= count]
    rows = [[name, *(between(points[number - 1], 1) for number in shown)] for name, points in token.items()]
    first = earlier(1, "synchronous")
    gap = fmean(later.estimate - sooner.estimate for sooner, later in pairwise(token["plain decoding"]))
    return Finding(
        f"The first token comes equally early (difference {between(first, 1)} ms): it needs the prompt and nothing "
        f"else. The second comes {between(earlier(2, 'synchronous'), 1)} ms and the fourth "
        f"{between(earlier(min(4, count), 'synchronous'), 1)} ms earlier with asynchronous speculation than with "
        f"synchronous speculation at its best; a token takes {gap:.1f} ms in plain decoding.",
        [
            "Milliseconds from the prompt's submission until the user has so many tokens:",
            markdown_table(["", *(f"{number}" for number in shown)], rows),
        ],
        [
            METHOD,
            f"Tuned were total speeds, not first tokens. Times are means over {len(seeds)} seeds; differences are "
            "paired by seed. Here synchronous speculation does not draft before the first token either, as an "
            "implementation may that starts with a tree; its drafting time would be added to all of its times.",
            "Invented are the stage's and the drafter's times and the acceptance rate of 0.7, which stand for a "
            "7-billion model and a 1-billion drafter on ordinary hardware.",
        ],
        figure,
    )
