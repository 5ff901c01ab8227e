"""A network gets worse beneath eight machines: predicted everywhere, measured on real paced processes on a coarse grid.

``python -m analysis.degradation -o docs/degradation.md`` tunes the policies, simulates the fine grid, measures what is
missing, and writes page and figure. What was measured is kept, run by run, in ``docs/degradation/measured.jsonl``; a
run whose pace was not kept is tried again by the next command. ``--budget-s`` ends early.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

from analysis.degradation_page import ACCEPTANCES, BASE, POLICIES, Setting, figure, page, setting_of
from analysis.fidelity import scheduling_digest
from analysis.laboratory import Laboratory, laboratory, with_settings
from analysis.style import STYLE
from analysis.tuning import tune
from pipesim.errors import InvariantError
from pipesim.event_log import replay_log
from pipesim.executors import RealResult, find_executor
from pipesim.metrics import Metrics
from pipesim.scenario import Scenario
from pipesim.scenario_file import load_scenario
from pipesim.simulation.pipeline import evaluate, simulate
from pipesim.summary import summarise
from pipesim.sweep import flatten
from pipesim.sweep.journal import Journal

SCENARIO = Path("scenarios/emulated-network.yaml")
FULL_GBPS = 1.0
SHARES = (0.01, 0.018, 0.032, 0.056, 0.1, 0.18, 0.32, 0.56, 1.0)
LATENCIES_MS = (0.1, 0.3, 1.0, 3.0, 10.0, 20.0, 30.0, 50.0, 100.0)
SEEDS = range(1, 9)
"""Of the simulations; measured runs have the first ones, and so meet the same lucky and unlucky positions."""
WORSE = ((0.1, 0.1), (0.01, 0.1), (1.0, 10.0), (0.01, 20.0), (1.0, 100.0))
"""Measured links beside the base: share of the bandwidth, latency in ms."""
DRAFTERS_MS = (2.0, 10.0)
"""Measured on the base link beside the usual drafter."""
METRICS = ("tokens_per_second", "ttft_s", "itl_s.p50", "itl_s.p95")
_BRING_UP_S, _PAUSE_S = 10.0, 0.8
Settings = Mapping[str, Mapping[str, Any]]
"""Per acceptance and policy, see :func:`tuned`."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A run to be made, and how long that takes by the simulation."""

    setting: Setting
    seed: int
    scenario: Scenario
    predicted: dict[str, float | None]

    @property
    def name(self) -> str:
        """In the journal."""
        return f"{self.setting.name}, seed {self.seed}"

    @property
    def seconds(self) -> float:
        """Until the next one can begin."""
        return (self.predicted["e2e_s"] or 0.0) + _PAUSE_S


def coarse() -> list[Setting]:
    """What is measured: acceptance on the base link, then worse links, then both at once, then other drafters."""
    found = [Setting(*BASE, rate, policy) for rate in (0.8, 0.0, 0.6, 0.3, 0.95) for policy in POLICIES[1:]]
    found.insert(0, Setting(*BASE, 0.8, POLICIES[0]))
    found += [Setting(*link, 0.8, policy) for link in WORSE for policy in POLICIES]
    found += [Setting(*link, 0.3, policy) for link in WORSE for policy in POLICIES[1:]]
    return found + [Setting(*BASE, 0.8, policy, drafter_ms) for drafter_ms in DRAFTERS_MS for policy in POLICIES[1:]]


def tuned(lab: Laboratory) -> dict[str, dict[str, Any]]:
    """The best settings of both speculative policies on the base link for each acceptance, found in simulation alone.

    At acceptance 0 the best is not to draft. Who does not know that keeps what is best at the next one.
    """
    fixed = ({"name": "speculative"}, {"name": "pipeinfer", "calibrated": True})
    cases = [(rate, one) for rate in ACCEPTANCES[1:] for one in fixed]
    jobs = [(load_scenario(SCENARIO, [f"acceptance.rate={rate}"]).model_dump_json(), one) for rate, one in cases]
    found: dict[str, dict[str, Any]] = {}
    for (rate, one), best in zip(cases, lab.map(tune, jobs), strict=True):
        found.setdefault(f"{rate:g}", {})[one["name"]] = best["settings"]
    found["0"] = found[f"{ACCEPTANCES[1]:g}"]
    return found


def scenario_of(setting: Setting, settings: Settings, seed: int, tokens: int | None = None) -> Scenario:
    """The scenario of one run."""
    overrides = [f"cluster.links.bandwidth_gbps={FULL_GBPS * setting.share}", f"acceptance.rate={setting.acceptance}"]
    overrides += [f"cluster.links.latency_ms={setting.latency_ms}", f"seed={seed}"]
    overrides += [f"cluster.drafter.level_ms={setting.drafter_ms}"]
    overrides += [f"workload.max_new_tokens={tokens}"] if tokens else []
    plain = load_scenario(SCENARIO, overrides).model_dump_json()
    own = settings[f"{setting.acceptance:g}"].get(setting.policy, {"name": setting.policy})
    return with_settings(plain, policy=own)


def simulated(lab: Laboratory, settings: Settings) -> list[dict[str, Any]]:
    """Tokens per second on the fine grid: for each setting, mean, lowest and highest of all seeds."""
    links = [(share, BASE[1]) for share in SHARES] + [(BASE[0], latency) for latency in LATENCIES_MS[1:]]
    grid = [(share, latency, rate) for share, latency in links for rate in ACCEPTANCES]
    groups = [
        {policy: scenario_of(Setting(*place, policy), settings, SEEDS[0]) for policy in POLICIES} for place in grid
    ]
    rows = []
    for place, frame in zip(grid, lab.measure_all(groups, SEEDS), strict=True):
        for policy, lines in frame.groupby("variant", sort=False):
            speeds = [float(speed) for speed in lines["tokens/s"]]
            about = {"mean": round(statistics.mean(speeds), 4), "low": min(speeds), "high": max(speeds)}
            rows.append({**asdict(Setting(*place, str(policy))), **about})
    return rows


def missing(finished: Mapping[str, Mapping[str, Any]], settings: Settings, repeats: int) -> Iterator[Planned]:
    """Runs that were not made yet or did not keep their pace.

    Settings without any result come first, then what was tried least, then the order of :func:`coarse`.
    """
    known = {setting_of(row) for row in finished.values() if row["kept"]}
    runs = [
        Planned(setting, seed, scenario_of(setting, settings, seed), {})
        for seed in range(1, repeats + 1)
        for setting in coarse()
    ]
    open_ = [run for run in runs if not finished.get(run.name, {}).get("kept")]

    def later(run: Planned) -> tuple[bool, int]:
        return run.setting in known, finished.get(run.name, {}).get("attempt", 0)

    for run in sorted(open_, key=later):
        yield replace(run, predicted=_wanted(evaluate(run.scenario), "e2e_s"))


def measure(
    journal: Journal, runs: Iterator[Planned], budget_s: float, execute_all: Callable[..., None], stand_in: str
) -> None:
    """Makes the runs, on one pipeline those in a row on one cluster; leaves out what does not fit into the time."""
    end = time.monotonic() + budget_s
    for _, group in groupby(runs, key=lambda run: run.scenario.cluster):
        left, batch = end - time.monotonic() - _BRING_UP_S, list[Planned]()
        for run in group:
            if run.seconds <= left:
                left -= run.seconds
                batch.append(run)
        if not batch:
            continue
        with tempfile.TemporaryDirectory() as folder:
            logs = Path(folder)
            _make(journal, batch, execute_all, stand_in, logs)


def _make(
    journal: Journal, batch: Sequence[Planned], execute_all: Callable[..., None], stand_in: str, logs: Path
) -> None:
    texts: set[tuple[int, ...]] = set()

    def note(number: int, result: RealResult) -> None:
        texts.add(result.summary.tokens)
        if len(texts) > 1:
            raise InvariantError(f"{batch[number].name}: another text than the run before (I3)")
        row = _row(batch[number], result, logs / f"run-{number}.jsonl")
        row["attempt"] = journal.finished.get(batch[number].name, {}).get("attempt", 0) + 1
        journal.add(batch[number].name, row)
        speed, told = row["measured"]["tokens_per_second"], row["predicted"]["tokens_per_second"]
        pace = "" if row["kept"] else f"; pace not kept: {row['problems'][0]}"
        print(f"{batch[number].name}: {speed:.2f} tokens/s, {told:.2f} predicted{pace}", file=sys.stderr)

    gc.collect()
    gc.freeze()  # the head lives in this process: a collection of all that was ever imported would make it late
    scenarios = []
    for run in batch:
        section = {**run.scenario.execution.model_dump(mode="json"), "stand_in": stand_in}
        scenarios.append(with_settings(run.scenario.model_dump_json(), execution=section))
    execute_all(scenarios, logs, note)


def _row(run: Planned, result: RealResult, log: Path) -> dict[str, Any]:
    pace, replayed = result.summary.pace, replay_log(log)
    assert pace is not None
    told = StringIO()
    predicted = summarise(simulate(run.scenario, told))
    return {
        **asdict(run.setting),
        "seed": run.seed,
        "settings": run.scenario.policy.model_dump(),
        "tokens": len(result.summary.tokens),
        "measured": _wanted(result.summary.metrics, *METRICS),
        "predicted": _wanted(predicted.metrics, *METRICS),
        "kept": pace.kept,
        "problems": list(pace.problems),
        "late_p95_ms": round(max(part.late_ms[1] for part in pace.parts if part.counts), 3),
        "replay_identical": replayed.difference is None and replayed.released,
        "decided_as_predicted": decisions(log.read_text(encoding="utf-8")) == decisions(told.getvalue()),
        "scheduling": scheduling_digest(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def decisions(log: str) -> list[Any]:
    """What a scheduler did about a generation, in order, whatever its tokens: runs, drafts, cancellations, emissions.

    Left out: that a run is over, and KV operations, with which sequences of runs that are over ride on the next run.
    Where two events come in another order, these alone may change places.
    """

    def shape(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(key, one) for key, one in value.items() if key != "kv_operations"}
        return len(value) if name in ("tokens", "path") else value

    commands = (command for line in log.splitlines() for command in json.loads(line).get("commands", ()))
    return [shape("", command) for command in commands if command["type"] != "EndRun"]


def _wanted(metrics: Metrics, *names: str) -> dict[str, float | None]:
    found = flatten(metrics.as_dict())
    return {name: found[name] for name in names}


def main() -> None:
    """Goes on with what is missing, then writes page, figure and the simulated data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--repeats", type=int, default=2, help="real runs of each setting, each with its own seed")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="measure for so many seconds at most")
    parser.add_argument("--no-page", action="store_true", help="only measure")
    arguments = parser.parse_args()
    data: Path = arguments.output.with_suffix("")
    data.mkdir(parents=True, exist_ok=True)
    known = data / "settings.json"
    with laboratory(Path("out/degradation.jsonl")) as lab, Journal.opened(data / "measured.jsonl") as journal:
        if not known.exists():
            known.write_text(json.dumps(tuned(lab), indent=1) + "\n", encoding="utf-8")
        settings: Settings = json.loads(known.read_text(encoding="utf-8"))
        if arguments.budget_s > 0:
            from backends.models.random_models import save_talker  # torch: seconds; only measurements need it

            with tempfile.TemporaryDirectory() as folder:
                stand_in = str(save_talker(Path(folder) / "stand-in"))
                runs = missing(journal.finished, settings, arguments.repeats)
                measure(journal, runs, arguments.budget_s, find_executor().execute_all, stand_in)
        if arguments.no_page:
            return
        lines = simulated(lab, settings)
        rows, wanted = list(journal.finished.values()), coarse()
    text = "[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n"
    (data / "simulated.json").write_text(text, encoding="utf-8")
    with matplotlib.rc_context(STYLE):
        figure(lines, rows).savefig(data / "speed.png", dpi=140)
    arguments.output.write_text(page(rows, wanted, arguments.repeats, settings, data.name), encoding="utf-8")


if __name__ == "__main__":
    main()
