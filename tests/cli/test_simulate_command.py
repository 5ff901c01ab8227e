import json
import re
import subprocess
import sys
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pipesim.cli.commands import app
from pipesim.metrics import compute_metrics
from pipesim.scenario import Scenario
from pipesim.scheduling.commands import FinishReason
from pipesim.simulation.pipeline import simulate
from pipesim.statistics import mean_interval
from pipesim.sweep import flatten
from pipesim.trace import Trace

ROOT = Path(__file__).parent.parent.parent
DEMO = str(ROOT / "scenarios" / "demo.yaml")
SHORT = ["--set", "workload.max_new_tokens=6"]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_the_table_says_what_the_time_until_a_token_was_spent_on() -> None:
    plain = ["--set", "policy.name=autoregressive", "--set", "cluster.head.overhead_ms=0"]
    shown = " ".join(call("simulate", DEMO, *SHORT, *plain).stdout.replace("│", " ").split())
    mean_gap = shown.split("mean gap, spent on ")[1].split(" ms")[0]
    assert re.fullmatch(r"[0-9.]+ compute \+ [0-9.]+ propagation( \+ [0-9.]+ serialisation)?", mean_gap), mean_gap


def test_json_is_one_object_with_the_fixed_keys_and_nothing_else_on_stdout() -> None:
    result = call("simulate", DEMO, *SHORT, "--json", "--seed", "5")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    printed = json.loads(result.stdout)
    assert list(printed) == ["policy", "seed", "tokens", "metrics", "stages", "bound"]
    assert (printed["policy"], printed["seed"], len(printed["tokens"])) == ("pipeinfer", 5, 6)
    metrics = printed["metrics"]
    assert list(metrics) == [
        "tokens_per_second",
        "ttft_s",
        "itl_s",
        "e2e_s",
        "latency_breakdown_s",
        "acceptance_rate",
        "stage_utilization",
        "bubble_fraction",
        "runs",
        "wasted_compute_fraction",
        "link_bytes",
        "draft_tokens",
    ]
    assert list(metrics["itl_s"]) == ["mean", "p50", "p95", "p99"]
    assert list(metrics["runs"]) == ["submitted", "accepted", "rejected", "cancelled", "drained"]
    assert len(metrics["stage_utilization"]) == 4
    bound = printed["bound"]
    assert list(bound) == ["e2e_s", "tokens_per_second", "fraction"]
    assert bound["fraction"] == bound["e2e_s"] / metrics["e2e_s"] < 1
    assert bound["tokens_per_second"] > metrics["tokens_per_second"]


def test_each_stage_is_reported_with_its_micro_batch_cost_slope() -> None:
    printed = json.loads(call("simulate", DEMO, *SHORT, "--json").stdout)
    first, *_, last = printed["stages"]
    assert first == {
        "name": "stage 0",
        "layers": 8,
        "device": "laptop",
        "memory_bytes": None,
        "run_ms": pytest.approx(8 * 1.4),
        "slope_c": pytest.approx((2.3 - 1.4) / (3 * 1.4)),
        "slope_rows": 4,
    }
    assert last["slope_c"] == pytest.approx((28 - 18) / (3 * 18))
    shown = call("simulate", DEMO, *SHORT).stdout
    assert "stage 0-2" in shown
    assert "0.214" in shown


def test_profiles_are_listed_with_their_sources() -> None:
    shown = call("profiles").stdout
    for part in ("h100-sxm", "H100 Tensor Core GPU data sheet", "falcon-180b", "nvlink-4", "q4_k_m"):
        assert part in shown


def test_bursty_acceptance_tells_its_stationary_rate() -> None:
    markov = "acceptance={kind: markov, good_rate: 0.9, bad_rate: 0.3, good_tokens: 10, bad_tokens: 10}"
    told = call("simulate", DEMO, *SHORT, "--json", "--set", markov)
    assert told.stderr == "in the long run 50.0% of positions are good, 60.0% of first candidates are right\n"


def test_same_seed_same_bytes() -> None:
    assert call("simulate", DEMO, "--json").stdout == call("simulate", DEMO, "--json", "--seed", "1").stdout
    assert call("simulate", DEMO, "--json").stdout != call("simulate", DEMO, "--json", "--seed", "2").stdout


def test_repeats_are_means_with_intervals_in_their_places() -> None:
    singles = [json.loads(call("simulate", DEMO, *SHORT, "--json", "--seed", str(seed)).stdout) for seed in (5, 6, 7)]
    result = call("simulate", DEMO, *SHORT, "--json", "--seed", "5", "--repeats", "3")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert list(printed) == ["policy", "seed", "tokens", "metrics", "stages", "bound", "intervals_95", "seeds"]
    assert (printed["seed"], printed["tokens"], printed["seeds"]) == (5, singles[0]["tokens"], [5, 6, 7])
    means = flatten({**printed["metrics"], "bound": printed["bound"]})
    limits = flatten(printed["intervals_95"])
    values = [flatten({**one["metrics"], "bound": one["bound"]}) for one in singles]
    assert list(means) == list(values[0])
    for name, mean in means.items():
        expected = mean_interval([one[name] for one in values])
        assert mean == pytest.approx(expected.estimate)
        assert [limits[f"{name}.0"], limits[f"{name}.1"]] == [expected.low, expected.high]


def test_a_figure_that_no_repeat_has_stays_null() -> None:
    plain = ["--set", "policy.name=autoregressive", "--set", "workload.max_new_tokens=1", "--repeats", "2"]
    printed = json.loads(call("simulate", DEMO, *plain, "--json").stdout)
    assert printed["metrics"]["acceptance_rate"] is printed["intervals_95"]["acceptance_rate"] is None
    assert printed["metrics"]["itl_s"] is printed["intervals_95"]["itl_s"] is None
    assert call("simulate", DEMO, *plain).exit_code == 0


def test_people_get_means_and_intervals_too() -> None:
    result = call("simulate", DEMO, *SHORT, "--repeats", "4")
    assert "pipeinfer, seeds 1 to 4" in result.stdout
    line = next(line for line in result.stdout.splitlines() if "tokens_per_second" in line)
    _, mean, low, high = line.replace("[", "").replace("]", "").replace(",", "").split()
    assert float(low) < float(mean) < float(high)


def test_files_of_repeats_are_those_of_the_first_seed(tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    for folder, options in ((one, []), (many, ["--repeats", "3"])):
        folder.mkdir()
        files = [
            "--trace",
            str(folder / "t.json"),
            "--events",
            str(folder / "e.jsonl"),
            "--plot",
            str(folder / "p.svg"),
        ]
        assert call("simulate", DEMO, *SHORT, *files, *options).exit_code == 0
    for name in ("t.json", "e.jsonl"):
        assert (many / name).read_bytes() == (one / name).read_bytes()
    assert (many / "p.svg").exists()


def test_one_repeat_that_ends_early_fails_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def aborted(scenario: Scenario, *arguments: Any) -> Trace:
        trace = simulate(scenario, *arguments)
        return replace(trace, finish_reason=FinishReason.ABORTED) if scenario.seed == 2 else trace

    monkeypatch.setattr("pipesim.simulation.pipeline.simulate", aborted)
    result = call("simulate", DEMO, *SHORT, "--json", "--repeats", "3")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["seeds"] == [1, 2, 3]
    assert result.stderr == "error: seed 2: the generation ended early, after 6 tokens (aborted)\n"


def test_seeds_end_at_64_bits() -> None:
    result = call("simulate", DEMO, "--seed", str(2**64 - 1), "--repeats", "2")
    assert result.exit_code == 2
    assert "the last of 2 seeds is above 2^64 - 1" in result.stderr


def test_without_json_people_get_a_table() -> None:
    result = call("simulate", DEMO, *SHORT, "--set", "policy.name=autoregressive")
    assert result.exit_code == 0
    assert "autoregressive, seed 1: 6 tokens" in result.stdout
    assert "tokens/s" in result.stdout
    assert "% of the clairvoyant bound" in result.stdout


def test_files_that_were_asked_for_are_written(tmp_path: Path) -> None:
    trace, plot, events = tmp_path / "t.json", tmp_path / "p.png", tmp_path / "e.jsonl"
    result = call("simulate", DEMO, *SHORT, "--trace", str(trace), "--plot", str(plot), "--events", str(events))
    assert result.exit_code == 0, result.stderr
    assert json.loads(trace.read_text())["traceEvents"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    replayed = call("replay", str(events))
    assert replayed.exit_code == 0
    events_count = len(events.read_text().splitlines()) - 1
    assert f"{events_count} events, and a fresh scheduler gives the same commands" in replayed.stderr


def test_replay_shows_the_first_difference_and_fails(tmp_path: Path) -> None:
    events = tmp_path / "e.jsonl"
    call("simulate", DEMO, *SHORT, "--events", str(events))
    text = events.read_text()
    events.write_text(text.replace('"micro_batch":4', '"micro_batch":3'))
    result = call("replay", str(events))
    assert result.exit_code == 1
    assert "logged:" in result.stdout
    assert "replayed:" in result.stdout


def test_a_log_that_ends_before_the_generation_is_no_success(tmp_path: Path) -> None:
    events = tmp_path / "e.jsonl"
    call("simulate", DEMO, *SHORT, "--events", str(events))
    events.write_text("".join(events.read_text().splitlines(keepends=True)[:4]))
    result = call("replay", str(events))
    assert result.exit_code == 1
    assert "3 events agree; the log ends before the generation did" in result.stderr


@pytest.mark.parametrize("wrong", ["acceptance=null", "cluster.kv_cells=4", "model.hidden=0"])
def test_a_log_survives_a_scenario_that_cannot_be_simulated(tmp_path: Path, wrong: str) -> None:
    events = tmp_path / "e.jsonl"
    events.write_text("precious")
    assert call("simulate", DEMO, "--events", str(events), "--set", wrong).exit_code == 2
    assert events.read_text() == "precious"
    fresh = tmp_path / "fresh.jsonl"
    assert call("simulate", DEMO, "--events", str(fresh), "--set", wrong).exit_code == 2
    assert not fresh.exists()


def test_nothing_is_simulated_for_files_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipesim.simulation.pipeline.simulate", lambda *_: pytest.fail("simulated"))
    for option, path in (("--trace", "/nowhere/t"), ("--events", "/nowhere/t"), ("--plot", "t.docx")):
        assert call("simulate", DEMO, option, path).exit_code == 2


@pytest.mark.parametrize("option", ["--trace", "--plot", "--events"])
def test_a_full_disk_is_one_message_and_status_1(tmp_path: Path, option: str) -> None:
    full = tmp_path / "full.png"
    full.symlink_to("/dev/full")
    result = call("simulate", DEMO, *SHORT, "--json", option, str(full))
    assert result.exit_code == 1
    assert result.stderr == f"error: {full}: cannot be written (No space left on device)\n"
    if option != "--events":
        assert json.loads(result.stdout)["tokens"], "the result is not lost with the picture"


def test_a_result_that_cannot_be_printed_is_one_message_and_status_1() -> None:
    for arguments in (["simulate", DEMO, *SHORT, "--json"], ["simulate", DEMO, *SHORT], ["schema"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-c", "from pipesim.cli import main; main()", *arguments],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 1
        assert done.stderr == "error: stdout: cannot be written (No space left on device)\n"


def test_a_defect_of_the_drawing_code_is_no_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr("analysis.plots.plot_timeline", broken)
    result = call("simulate", DEMO, *SHORT, "--plot", str(tmp_path / "t.png"))
    assert isinstance(result.exception, ValueError)


def test_an_incomplete_generation_is_shown_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def aborted(*arguments: Any) -> Trace:
        return replace(simulate(*arguments), finish_reason=FinishReason.ABORTED)

    monkeypatch.setattr("pipesim.simulation.pipeline.simulate", aborted)
    result = call("simulate", DEMO, *SHORT, "--json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["tokens"]) == 6
    assert "error: the generation ended early, after 6 tokens (aborted)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "nowhere.yaml"], "nowhere.yaml: the scenario cannot be read"),
        (["simulate", DEMO, "--set", "model.hiden=4"], "did you mean 'hidden'?"),
        (["simulate", DEMO, "--set", "acceptance=null"], "acceptance: a simulation needs this section"),
        (["simulate", DEMO, "--set", "cluster.kv_cells=4"], "kv_cells: 4 cells cannot hold"),
        (["simulate", DEMO, "--trace", "/nowhere/t.json"], "/nowhere/t.json: cannot be written"),
        (["simulate", DEMO, "--events", "/nowhere/t.json"], "/nowhere/t.json: cannot be written"),
        (["simulate", DEMO, "--plot", "/nowhere/t.png"], "/nowhere/t.png: cannot be written"),
        (["simulate", DEMO, "--plot", "t.docx"], "t.docx: the plot cannot be written"),
        (["simulate", DEMO, "--plot", str(ROOT)], "use one of the endings .png, .pdf, .svg"),
        (["simulate", DEMO, "--trace", str(ROOT)], "cannot be written, it is a folder"),
        (["replay", "nowhere.jsonl"], "nowhere.jsonl: cannot be read as an event log"),
    ],
)
def test_bad_input_is_one_message_and_status_2(arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not result.stdout


def test_other_errors_of_ours_are_one_message_and_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipesim.simulation.stage import StageServer

    monkeypatch.setattr(StageServer, "_pass_on", lambda self, frame, void: None)
    result = call("simulate", DEMO)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the simulation came to a standstill")


def test_schema_is_json_schema() -> None:
    schema = json.loads(call("schema").stdout)
    assert schema["title"] == "Scenario"
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("command", ["simulate", "replay", "profiles", "schema"])
def test_help_shows_an_example(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    _, example = " ".join(result.stdout.split()).split("Example: ")
    assert f"pipesim {command}" in example


def test_what_is_no_json_number_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipesim.summary.compute_metrics", lambda trace: replace(compute_metrics(trace), ttft_s=nan))
    result = call("simulate", DEMO, *SHORT, "--json")
    assert isinstance(result.exception, ValueError)
    assert not result.stdout
