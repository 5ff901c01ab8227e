"""Emulated clusters on real processes: bounds that hold on a machine as busy as it likes."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipesim.cli.commands import app
from pipesim.errors import BadInputError
from pipesim.executors import find_executor
from pipesim.pace import CALLED_OFF, judge
from pipesim.scenario_file import load_scenario
from pipesim.simulation.acceptance import RecordedTruth
from pipesim.simulation.pipeline import simulate
from pipesim.trace import PaceSample


@pytest.fixture(scope="module")
def file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of a large model, for which the tiny one stands in."""
    raw: dict[str, Any] = {
        "model": {"name": "large", "layers": 32, "hidden": 4096, "vocabulary": 32000, "activation_bytes": 2},
        "cluster": {
            "stages": [{"repeat": 2, "cost": {"kind": "linear", "constant_ms": 20, "per_token_ms": 0.5}}],
            "head": {"overhead_ms": 0.5},
            "drafter": {"level_ms": 4},
            "links": {"latency_ms": 3, "bandwidth_gbps": 0.05, "jitter_ms": 1, "loss": 0.01, "retransmit_ms": 5},
        },
        "workload": {"prompt": " ".join(f"w{i}" for i in range(12)), "max_new_tokens": 8},
        "policy": {"name": "autoregressive"},
        "acceptance": {"kind": "iid", "rate": 0.7},
        "execution": {"drafter": "planted", "emulate": True, "stand_in": str(tiny_folder)},
        "faults": [{"kind": "slow-stage", "start_ms": 100, "duration_ms": 200, "stage": 1, "factor": 2}],
    }
    path = tmp_path_factory.mktemp("emulated") / "large.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_nothing_is_ever_earlier_than_the_simulator_says(file: Path) -> None:
    real = find_executor().execute(load_scenario(file), record_acceptance=True, keep_trace=True)
    assert real.acceptance
    assert real.trace
    simulated = simulate(load_scenario(file), truth=RecordedTruth(real.acceptance))
    assert [one.tokens for one in real.trace.emissions] == [one.tokens for one in simulated.emissions]
    for ours, theirs in zip(real.trace.emissions, simulated.emissions, strict=True):
        assert ours.time_s >= theirs.time_s - 1e-6
    assert real.trace.link_bytes == {name: size for name, size in simulated.link_bytes.items() if size}


@pytest.mark.parametrize(
    "change", ["workload.max_new_tokens=7", "cluster.links.loss=0.02", "execution.dtype=bfloat16", "faults=[]"]
)
def test_scenarios_that_differ_in_more_than_their_policy_share_no_pipeline(
    file: Path, tmp_path: Path, change: str
) -> None:
    section = change.partition("=")[0].partition(".")[0]
    with pytest.raises(BadInputError, match=f"{section}: scenarios for one pipeline must have the same"):
        find_executor().execute_all([load_scenario(file), load_scenario(file, [change])], tmp_path, pytest.fail)


@pytest.mark.parametrize(
    "chance",
    ["cluster.links.jitter_ms=1", "faults=[{kind: loss, link: all, probability: 0.1, start_ms: 0, duration_ms: 9}]"],
)
def test_scenarios_on_one_pipeline_share_the_seed_that_links_draw_with(file: Path, tmp_path: Path, chance: str) -> None:
    calm = "cluster.links={latency_ms: 3}"
    first, second = (load_scenario(file, [calm, chance, f"seed={seed}"]) for seed in (1, 2))
    with pytest.raises(BadInputError, match="seed: links with jitter or loss"):
        find_executor().execute_all([first, second], tmp_path, pytest.fail)


CRASH = "{kind: crash, stage: 1, start_ms: 200, detect_ms: 100, restart_ms: 2000}"
AGAIN_S = 2.3
"""When the pipeline that crashed is whole again, after the prompt."""


def test_a_crash_takes_an_emulated_cluster_as_long_as_the_simulated_one(file: Path) -> None:
    """The loss is heard of when the scenario says so, and the real new process hides behind the modelled restart."""
    links = "cluster.links={latency_ms: 3, bandwidth_gbps: 0.05}"  # without chance: a new process draws from the start
    scenario, log = load_scenario(file, [links, f"faults=[{CRASH}]"]), io.StringIO()
    real = find_executor().execute(scenario, log, record_acceptance=True, keep_trace=True)
    assert real.acceptance
    assert real.trace
    simulated = simulate(scenario, truth=RecordedTruth(real.acceptance))
    undisturbed = simulate(load_scenario(file, [links, "faults=[]"]), truth=RecordedTruth(real.acceptance))
    assert [one.tokens for one in real.trace.emissions] == [one.tokens for one in simulated.emissions]
    times = [
        (ours.time_s, theirs.time_s) for ours, theirs in zip(real.trace.emissions, simulated.emissions, strict=True)
    ]
    assert all(ours >= theirs - 1e-6 for ours, theirs in times), "nothing is ever earlier"
    assert sum(theirs > AGAIN_S for _, theirs in times) >= 2, "the crash is in the midst of the text"
    assert undisturbed.emissions[-1].time_s < AGAIN_S
    logged = [json.loads(line) for line in log.getvalue().splitlines()[1:]]
    restored, submitted = (
        next(one["now"] for one in logged if one["event"]["type"] == kind)
        for kind in ("PipelineRestored", "GenerationStarted")
    )
    pace, late = judge(real.trace.pace), restored - submitted - AGAIN_S
    assert pace
    if not pace.kept or late > 0.1:
        pytest.skip(f"SKIPPED: too busy to emulate: stage 1 was back {late:.1f} s late; {'; '.join(pace.problems)}")
    worst = max(sample.done_s - sample.due_s for sample in real.trace.pace)
    assert all(ours - theirs <= late + worst + 0.02 for ours, theirs in times)


def test_an_emulated_run_says_how_well_it_kept_its_pace(file: Path) -> None:
    arguments = [
        "execute",
        str(file),
        "--set",
        "policy.name=pipeinfer",
        "--set",
        "workload.max_new_tokens=16",
        "--json",
    ]
    outcome = CliRunner().invoke(app, arguments)
    printed = json.loads(outcome.stdout)
    parts = {part["part"]: part for part in printed["pace"]["parts"]}
    assert {"head", "stage 0", "stage 1", "drafter", "stage 0 to stage 1", "drafter to head"} <= set(parts)
    runs = [parts[name]["events"] for name in ("stage 0", f"stage 0{CALLED_OFF}") if name in parts]
    assert sum(runs) == printed["metrics"]["runs"]["submitted"]
    assert all(part["achieved_ms"] is None or part["achieved_ms"] >= part["requested_ms"] for part in parts.values())
    assert printed["pace"]["kept"] == ("could not keep" not in outcome.stderr)


def test_a_cluster_that_no_machine_could_keep_up_with_gets_no_figures(file: Path, tmp_path: Path) -> None:
    asked = ["--set", "cluster.stages=[{repeat: 2, cost: {kind: linear, constant_ms: 0.001}}]"]
    asked += ["--set", "cluster.links={latency_ms: 1}", "--set", "workload.max_new_tokens=8"]
    page = tmp_path / "page.html"
    for command in (["execute", str(file)], ["compare", str(file), "--repeats", "1", "--html", str(page)]):
        outcome = CliRunner().invoke(app, [*command, *asked])
        assert outcome.exit_code == 1
        assert "really took longer" in outcome.stderr
        assert "could not keep" in outcome.stderr
        assert "tokens/s" not in outcome.stdout
        assert "tokens_per_second" not in outcome.stdout
    assert not page.exists()


def samples(part: str, late_s: float, overrun: bool = False) -> list[PaceSample]:
    on_time = [PaceSample(part, 1.0, 1.02, 1.02, False)] * 90
    return [*on_time, *[PaceSample(part, 1.0, 1.02, 1.02 + late_s, overrun)] * 10]


def test_an_emulation_that_cannot_keep_its_pace_is_no_emulation() -> None:
    assert judge([]) is None
    good = judge(samples("stage 0", 0.001))
    assert good
    assert good.kept
    late, slow = judge(samples("stage 0", 0.003)), judge(samples("stage 0", 0.0, overrun=True))
    assert late
    assert slow
    assert "3.0 ms late" in late.problems[0]
    assert "10% of 100 really took longer" in slow.problems[0]
    for part in ("head to stage 0", f"stage 0{CALLED_OFF}"):
        harmless = judge(samples(part, 0.003, overrun=True))
        assert harmless
        assert harmless.kept, "what comes late may still be computed in time"
