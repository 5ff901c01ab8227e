import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipesim.cli import app

ROOT = Path(__file__).parent.parent.parent
DEMO = str(ROOT / "scenarios" / "demo.yaml")
SHORT = ["--set", "workload.max_new_tokens=6"]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_json_is_one_object_with_the_fixed_keys_and_nothing_else_on_stdout() -> None:
    result = call("simulate", DEMO, *SHORT, "--json", "--seed", "5")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    printed = json.loads(result.stdout)
    assert list(printed) == ["policy", "seed", "tokens", "metrics"]
    assert (printed["policy"], printed["seed"], len(printed["tokens"])) == ("pipeinfer", 5, 6)
    metrics = printed["metrics"]
    assert list(metrics) == [
        "tokens_per_second",
        "ttft_s",
        "itl_s",
        "e2e_s",
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


def test_same_seed_same_bytes() -> None:
    assert call("simulate", DEMO, "--json").stdout == call("simulate", DEMO, "--json", "--seed", "1").stdout
    assert call("simulate", DEMO, "--json").stdout != call("simulate", DEMO, "--json", "--seed", "2").stdout


def test_without_json_people_get_a_table() -> None:
    result = call("simulate", DEMO, *SHORT, "--set", "policy.name=autoregressive")
    assert result.exit_code == 0
    assert "autoregressive, seed 1: 6 tokens" in result.stdout
    assert "tokens/s" in result.stdout


def test_files_that_were_asked_for_are_written(tmp_path: Path) -> None:
    trace, plot, events = tmp_path / "t.json", tmp_path / "p.png", tmp_path / "e.jsonl"
    result = call("simulate", DEMO, *SHORT, "--trace", str(trace), "--plot", str(plot), "--events", str(events))
    assert result.exit_code == 0, result.stderr
    assert json.loads(trace.read_text())["traceEvents"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    replayed = call("replay", str(events))
    assert replayed.exit_code == 0
    assert "same commands" in replayed.stderr


def test_replay_shows_the_first_difference_and_fails(tmp_path: Path) -> None:
    events = tmp_path / "e.jsonl"
    call("simulate", DEMO, *SHORT, "--events", str(events))
    text = events.read_text()
    events.write_text(text.replace('"micro_batch":4', '"micro_batch":3'))
    result = call("replay", str(events))
    assert result.exit_code == 1
    assert "logged:" in result.stdout
    assert "replayed:" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "nowhere.yaml"], "nowhere.yaml: the scenario cannot be read"),
        (["simulate", DEMO, "--set", "model.hiden=4"], "did you mean 'hidden'?"),
        (["simulate", DEMO, "--set", "acceptance=null"], "acceptance: a simulation needs this section"),
        (["simulate", DEMO, "--set", "cluster.kv_cells=4"], "kv_cells: 4 cells cannot hold"),
        (["simulate", DEMO, "--trace", "/nowhere/t.json"], "/nowhere/t.json: cannot be written"),
        (["simulate", DEMO, "--events", "/nowhere/t.json"], "/nowhere/t.json: cannot be written"),
        (["simulate", DEMO, "--plot", "/nowhere/t.png"], "/nowhere/t.png: the plot cannot be written"),
        (["simulate", DEMO, "--plot", "t.docx"], "t.docx: the plot cannot be written"),
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


@pytest.mark.parametrize("command", ["simulate", "replay", "schema"])
def test_help_shows_an_example(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Example: pipesim {command}" in " ".join(result.stdout.split()) or "Example:" in result.stdout
