import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from in_process import InProcess
from scenario_builder import PLAIN
from typer.testing import CliRunner, Result

from pipesim.cli.commands import app

SWEEP = ["--vary", "policy.name=autoregressive,pipeinfer", "--vary", "cluster.links.bandwidth_gbps=0.001:1:log3"]
MAIN = [sys.executable, "-c", "from pipesim.cli import main; main()"]


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    path = tmp_path / "slow-links.yaml"
    raw = {
        **PLAIN,
        "workload": {"prompt_tokens": 8, "max_new_tokens": 12},
        "policies": {"pipeinfer": {"micro_batch": 2}},
    }
    path.write_text("# Who wins?\n# And why?\n" + yaml.safe_dump(raw))
    return str(path)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    engine = InProcess()
    monkeypatch.setattr("pipesim.sweep.engines.run_local", engine)
    return engine


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_a_sweep_leaves_rows_a_figure_and_a_summary(scenario: str, tmp_path: Path) -> None:
    rows, plot = tmp_path / "r.parquet", tmp_path / "p.png"
    result = call("sweep", scenario, *SWEEP, "--repeats", 3, "--jobs", 2, "-o", rows, "--plot", plot)
    assert result.exit_code == 0, result.stderr
    assert not result.stderr, "quiet where stderr is no terminal"
    frame = pd.read_parquet(rows)
    assert len(frame) == 2 * 3 * 3
    assert list(frame["cluster.links.bandwidth_gbps"].unique()) == [0.001, 0.0316227766017, 1.0]
    assert frame["error"].isna().all()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert result.stdout.startswith("# Slow links\n\nWho wins?\nAnd why?\n\n![speed](p.png)\n")
    assert "| link bandwidth (Mbit/s) | autoregressive | pipeinfer |" in result.stdout
    assert result.stdout.count("\n| ") == 1 + 3
    assert "over 3 seeds" in result.stdout


def test_the_same_command_again_runs_nothing_and_says_the_same(here: InProcess, scenario: str, tmp_path: Path) -> None:
    rows = tmp_path / "r.parquet"
    first = call("sweep", scenario, *SWEEP, "-o", rows)
    before = rows.read_bytes()
    assert call("sweep", scenario, *SWEEP, "-o", rows).stdout == first.stdout
    assert here.runs == 6
    assert rows.read_bytes() == before


def test_set_and_seed_are_those_of_every_command(here: InProcess, scenario: str, tmp_path: Path) -> None:
    rows = tmp_path / "r.parquet"
    sets = ["--set", "policies.pipeinfer.micro_batch=1", "--set", "acceptance.rate=1", "--seed", 7]
    assert call("sweep", scenario, "--vary", "cluster.links.latency_ms=1,2", *sets, "-o", rows).exit_code == 0
    frame = pd.read_parquet(rows)
    assert set(frame["seed"]) == {7}
    assert set(frame["acceptance_rate"]) == {1.0}
    sets[1] = "policies.pipeinfer.micro_batch=4"
    assert call("sweep", scenario, "--vary", "cluster.links.latency_ms=1,2", *sets, "-o", rows).exit_code == 0
    assert (pd.read_parquet(rows)["runs.submitted"] < frame["runs.submitted"]).all()


def test_a_failing_point_is_a_row_and_status_1(here: InProcess, scenario: str, tmp_path: Path) -> None:
    rows = tmp_path / "r.parquet"
    result = call("sweep", scenario, "--vary", "cluster.kv_cells=4,null", "--repeats", 2, "-o", rows)
    assert result.exit_code == 1
    assert "2 rows: " in result.stderr
    assert "4 cells cannot hold" in result.stderr
    assert "error: 2 of 4 rows failed" in result.stderr
    frame = pd.read_parquet(rows)
    assert list(frame["error"].isna()) == [False, False, True, True]
    assert list(frame["tokens_per_second"].isna()) == [True, True, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "seed"], "write it as dotted.path=a,b,c"),
        (["--vary", "policy.nmae=a,b"], "pipeinfer has no such setting"),
        (["--vary", "seed=1,2", "--repeats", "2"], "seeds are varied already"),
        (["--vary", "seed=1,2", "--engine", "spark"], "use one of local, ray"),
        (["--vary", "seed=1,2", "--metric", "speed"], "there is no such metric"),
        (["--vary", "seed=1,2", "--metric", "itl_s.p42"], "no column of numbers; there are"),
        (["--vary", "seed=1,2", "--plot", "p.docx"], "use one of the endings"),
        (["--vary", "seed=1,2", "--plot", "p.png"], "there is no axis to draw along"),
        (["--vary", "model.layers=12,24", "--vary", "cluster.head.overhead_ms=1,2", "--vary", "acceptance.rate=0,1",
          "--vary", "cluster.prefill_window=1,2", "--plot", "p.png"], "without a place: cluster.prefill_window"),
        (["--vary", "seed=1,2", "-o", "/nowhere/r.parquet"], "/nowhere/r.parquet: cannot be written"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_status_2(
    here: InProcess, scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("sweep", scenario, "-o", "r.parquet", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not result.stdout


def test_the_degrading_network_has_every_policy_at_its_own_settings(here: InProcess, tmp_path: Path) -> None:
    library = Path(__file__).parent.parent.parent / "scenarios" / "network-degradation.yaml"
    rows, plot = tmp_path / "r.parquet", tmp_path / "p.png"
    short = ["--set", "workload.max_new_tokens=12", "--repeats", 2, "-o", rows, "--plot", plot]
    policies = ["--vary", "policy.name=autoregressive,speculative,pipeinfer"]
    network = ["--vary", "cluster.links.bandwidth_gbps=0.01,1", "--vary", "cluster.links.latency_ms=0.1,50"]
    result = call("sweep", library, *policies, *network, *short)
    assert result.exit_code == 0, result.stderr
    assert plot.exists()
    speeds = pd.read_parquet(rows).groupby(["cluster.links.bandwidth_gbps", "policy"])["tokens_per_second"].mean()
    assert (speeds[1.0] > speeds[0.01]).all()
    assert speeds[1.0]["speculative"] > speeds[1.0]["autoregressive"]
    untuned = ["--set", "policies={}", "--vary", "policy.name=speculative,pipeinfer", *network]
    call("sweep", library, *untuned, *short)
    others = pd.read_parquet(rows).groupby(["cluster.links.bandwidth_gbps", "policy"])["tokens_per_second"].mean()
    assert (others != speeds.reindex(others.index)).all()


LONG = ["--vary", "cluster.links.latency_ms=0:30:lin12", "--set", "workload.max_new_tokens=300"]


def lines(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_goes_on_where_it_was(
    here: InProcess, scenario: str, tmp_path: Path, how: signal.Signals
) -> None:
    rows, journal = tmp_path / "r.parquet", tmp_path / "r.parquet.journal"
    sweep = ["sweep", scenario, *LONG, "--jobs", "2", "-o", str(rows)]
    process = subprocess.Popen(
        [*MAIN, *sweep], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while (journal.read_bytes() if journal.exists() else b"").count(b"\n") < 3 and process.poll() is None:
        time.sleep(0.01)
    if how is signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does: the workers get it, too
    else:
        process.send_signal(how)
    _, told = process.communicate(timeout=60)
    assert process.returncode == (130 if how is signal.SIGINT else -how)
    assert "Traceback" not in told
    before = lines(journal)
    assert 3 <= len(before) < 12
    assert not rows.exists()
    assert call(*sweep).exit_code == 0
    after = lines(journal)
    assert after[: len(before)] == before
    assert len({line["point"] for line in after}) == len(after) == 12, "no point was run twice"
    assert here.runs == 12 - len(before)
    assert len(pd.read_parquet(rows)) == 12


def test_people_at_a_terminal_see_a_bar(scenario: str, tmp_path: Path) -> None:
    screen, terminal = pty.openpty()
    command = [*MAIN, "sweep", scenario, *SWEEP, "--jobs", "1", "-o", str(tmp_path / "r.parquet")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "90"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal, env=environment) as process:
        os.close(terminal)
        seen = b""
        while True:
            try:
                seen += os.read(screen, 4096)
            except OSError:  # the last writer has left
                break
    os.close(screen)
    assert process.returncode == 0
    assert b"6/6" in seen


def test_help_shows_an_example_and_how_policies_get_their_own_settings() -> None:
    told = " ".join(call("sweep", "--help").stdout.split())
    assert "Example: pipesim sweep scenarios/ablation.yaml" in told
    assert "policies.speculative.max_nodes=6" in told
