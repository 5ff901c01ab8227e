"""generate, execute, stage and compare, as users call them: real processes, a tiny model."""

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from command_line import PROMPT, as_json, command
from pipelines import LAYERS
from typer.testing import CliRunner

from pipesim.acceptance_trace import read_acceptance_trace
from pipesim.cli.commands import app
from pipesim.cli.real import LOOK_UP_SETTINGS
from pipesim.errors import BadInputError, InvariantError
from pipesim.executors import find_executor
from pipesim.metrics import compute_metrics
from pipesim.scenario_file import load_scenario
from pipesim.simulation.pipeline import simulate

POLICIES = ["autoregressive", "speculative", "pipeinfer"]


def pipesim(*arguments: object, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False)


def generate(model: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return pipesim("generate", PROMPT, "--raw", "--model", model, *arguments)


@contextlib.contextmanager
def stage_server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A separately started `pipesim stage` and where it listens."""
    server = subprocess.Popen(
        command("stage", "--listen", "127.0.0.1:0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout
        yield json.loads(server.stdout.readline())["listening"], server
    finally:
        server.kill()
        server.communicate()


def test_the_text_is_the_same_whatever_the_policy_and_the_cluster(tiny_folder: Path) -> None:
    texts = set()
    for policy, stages, drafter in [
        ("autoregressive", 1, "ngram"),
        ("speculative", 2, "layer-skip"),
        ("pipeinfer", 3, "planted"),
    ]:
        arguments = ("--policy", policy, "--stages", stages, "--drafter", drafter, "--max-new-tokens", 24)
        printed = as_json(generate(tiny_folder, *arguments, "--temperature", 0.9, "--seed", 4, "--json"))
        assert (printed["policy"], printed["seed"]) == (policy, 4)
        assert list(printed) == ["policy", "seed", "tokens", "text", "metrics"]
        tokens = printed["tokens"]
        assert isinstance(tokens, list)
        assert len(tokens) == 24
        assert printed["text"] == " ".join(f"w{token}" for token in tokens)
        texts.add(printed["text"])
    assert len(texts) == 1


def test_every_way_of_sampling_changes_the_text(tiny_folder: Path) -> None:
    ways = [(), ("--top-k", 3), ("--top-p", 0.4), ("--min-p", 0.3), ("--repetition-penalty", 1.5)]
    plain = ("--policy", "autoregressive", "--stages", 1, "--max-new-tokens", 24, "--temperature", 0.9, "--json")
    texts = [as_json(generate(tiny_folder, *plain, *way))["text"] for way in ways]
    assert len(set(texts)) == len(ways)


def test_a_stop_string_that_spans_tokens_ends_every_policy_s_text_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    def run(policy: str, *more: object) -> dict[str, object]:
        arguments = ("--policy", policy, "--drafter", "layer-skip", "--temperature", 0.9, "--max-new-tokens", 24)
        return as_json(generate(tiny_folder, *arguments, "--json", *more))

    whole = str(run("autoregressive")["text"])
    at = whole.index(" ", len(whole) // 2)
    stop = whole[at - 1 : at + 3]
    text = whole[: whole.index(stop)]
    tokens = len((text + stop).split(" "))
    log = tmp_path / "events.jsonl"
    for policy in ("autoregressive", "pipeinfer"):
        stopped = run(policy, "--stop", "no such thing", "--stop", stop, "--events", log)
        assert (stopped["text"], len(list(stopped["tokens"]))) == (text, tokens)
        assert pipesim("replay", log).returncode == 0


def test_text_goes_to_stdout_and_files_are_written(tiny_folder: Path, tmp_path: Path) -> None:
    events, trace = tmp_path / "events.jsonl", tmp_path / "trace.json"
    record = tmp_path / "acceptance.json"
    files = ("--events", events, "--trace", trace, "--record-acceptance", record)
    done = generate(tiny_folder, "--max-new-tokens", 12, *files)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 12
    assert done.stdout.endswith("\n")
    assert not done.stderr, "figures are for terminals"
    assert pipesim("replay", events).returncode == 0
    chosen = json.loads(events.read_text().splitlines()[0])["policy"]
    assert chosen.items() >= LOOK_UP_SETTINGS["pipeinfer"].items(), "what suits drafts that cost nothing"
    assert json.loads(trace.read_text())["traceEvents"]
    acceptance = read_acceptance_trace(record)
    assert [f"w{token}" for token in acceptance.tokens] == done.stdout.split()
    assert (acceptance.model, acceptance.drafter, len(acceptance.prompt_tokens)) == (str(tiny_folder), "ngram", 30)


def test_the_command_line_itself_never_loads_pytorch_or_scipy(tiny_folder: Path) -> None:
    program = (
        "import sys, atexit; from pipesim.cli import main\n"
        "atexit.register(lambda: print('torch' in sys.modules, 'scipy' in sys.modules, file=sys.stderr))\n"
        "main()"
    )
    arguments = ["generate", PROMPT, "--raw", "--model", str(tiny_folder), "--max-new-tokens", "2"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["False", "False"]


def test_ctrl_c_leaves_the_text_and_no_process(tiny_folder: Path) -> None:
    process = subprocess.Popen(
        command("generate", PROMPT, "--raw", "--model", tiny_folder, "--stages", 2, "--max-new-tokens", 900),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    beginning = process.stdout.read(20)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) == 4, "a nursery, two stages and a drafter"
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    rest, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert time.monotonic() - sent < 3.0
    assert (beginning + rest).startswith("w")
    assert "Traceback" not in errors
    assert not [one for one in below if one.is_running()]


def test_ctrl_c_while_stages_start_leaves_no_process(tiny_folder: Path) -> None:
    process = subprocess.Popen(
        command("generate", PROMPT, "--raw", "--model", tiny_folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    parent = psutil.Process(process.pid)
    while not (below := parent.children(recursive=True)):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    _, alive = psutil.wait_procs(below, timeout=3.0)
    assert not alive


@pytest.mark.parametrize("module", ["typer", "pydantic", "grpc", "backends.head"])
def test_ctrl_c_while_modules_are_imported_is_no_traceback(tiny_folder: Path, module: str) -> None:
    program = (
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from pipesim.cli import main; main()"
    )
    asked = [sys.executable, "-c", program, "generate", PROMPT, "--raw", "--model", str(tiny_folder)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_execute_and_its_processes(scenario: Path) -> None:
    asked = command("execute", scenario, "--set", "workload.max_new_tokens=900", "--set", "policy.name=speculative")
    process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.read(20)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) == 4, "a nursery, two stages and a drafter"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors == "interrupted\n"
    assert not [one for one in below if one.is_running()]


def test_separately_started_stages_serve_one_head_after_another(tiny_folder: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.yaml"
    expected = as_json(generate(tiny_folder, "--policy", "autoregressive", "--max-new-tokens", 10, "--json"))["tokens"]
    with stage_server() as (first, _), stage_server() as (second, server):
        hosts.write_text(yaml.safe_dump([first, second]))
        for policy in POLICIES:
            done = generate(tiny_folder, "--cluster", hosts, "--policy", policy, "--max-new-tokens", 10, "--json")
            assert as_json(done)["tokens"] == expected
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=5)
        assert server.returncode == 130
        assert "Traceback" not in errors
        gone = generate(tiny_folder, "--cluster", hosts, "--max-new-tokens", 10)
        assert gone.returncode == 2
        assert f"stage 1 ({second}, layers" in gone.stderr
        assert "does not answer" in gone.stderr


def test_a_stage_killed_on_another_machine_ends_the_generation_with_its_name(tiny_folder: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.yaml"
    with stage_server() as (first, _), stage_server() as (second, server):
        hosts.write_text(yaml.safe_dump({"stages": [first, second]}))
        process = subprocess.Popen(
            command(
                *("generate", PROMPT, "--raw", "--model", tiny_folder, "--cluster", hosts, "--max-new-tokens", 900),
                *("--set", "execution.recovery.attempts=0"),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        process.stdout.read(10)
        server.kill()
        _, errors = process.communicate(timeout=5)
        assert process.returncode == 1
        assert f"error: stage 1 ({second}, layers" in errors
        assert "Traceback" not in errors


def test_records_of_runs_are_kept_only_where_a_trace_is_asked_for(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise InvariantError("somebody wants a trace")

    monkeypatch.setattr("backends.job.Recorder", refuse)
    arguments = ["generate", PROMPT, "--raw", "--model", str(tiny_folder), "--max-new-tokens", "12", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--events", str(tmp_path / "log")])
    assert len(json.loads(done.stdout)["tokens"]) == 12
    done = CliRunner().invoke(app, [*arguments, "--trace", str(tmp_path / "trace")])
    assert "somebody wants a trace" in done.stderr


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        done = pipesim("stage", "--listen", address)
    assert done.returncode == 2
    assert address in done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("device", ["cuda:77", "gpu"])
def test_a_stage_server_refuses_a_device_that_is_not_there(device: str) -> None:
    done = pipesim("stage", "--listen", "127.0.0.1:0", "--device", device)
    assert done.returncode == 2
    assert f"--device: {'there is no device' if 'cuda' in device else 'device'} '{device}'" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--stages", LAYERS + 1], ["--stages 9", "8 layers"]),
        (["--stages", 0], ["--stages 0"]),
        (["--max-new-tokens", 1000], ["30 prompt tokens", "1024", "shorten"]),
        (["--max-new-tokens", 0], ["max_new_tokens"]),
        (["--temperature", -1], ["workload.temperature"]),
        (["--temperature", 1e-320, "--top-p", 0.9], ["workload.temperature = 1e-320", "0.001"]),
        (["--seed", -1], ["generate: seed = -1"]),
        (["--set", "execution.skip_layers=[2]"], ["execution.skip_layers", "layer-skip"]),
        (["--policy", "clairvoyant"], ["clairvoyant", "pipeinfer"]),
        (["--set", "policy.micro_batches=3"], ["micro_batches"]),
        (["--dtype", "int3"], ["dtype"]),
        (["--device", "gpu"], ["execution.device", "cpu, or cuda:0"]),
        (["--device", "cpu,cuda:77"], ["execution.device", "cuda:77", "on this machine", "cpu"]),
        (["--device", "cpu,cpu,cpu"], ["execution.device: 3 devices for 2 stages"]),
        (["--set", "execution.drafter_device=cuda:77"], ["execution.drafter_device", "cuda:77"]),
        (["--drafter", "nobody"], ["nobody"]),
        (["--model", "/does/not/exist"], ["/does/not/exist"]),
        (["--cluster", "/does/not/exist.yaml"], ["/does/not/exist.yaml"]),
    ],
)
def test_bad_input_names_the_field_and_starts_nothing(
    tiny_folder: Path, arguments: list[object], messages: list[str]
) -> None:
    done = generate(tiny_folder, *arguments)
    assert done.returncode == 2, done.stderr
    assert not done.stdout.strip()
    for message in messages:
        assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_without_chat_template_says_what_to_do(tiny_folder: Path) -> None:
    done = pipesim("generate", PROMPT, "--model", tiny_folder)
    assert done.returncode == 2
    assert "--raw" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_full_disk_is_one_message(tiny_folder: Path, arguments: list[str]) -> None:
    asked = command("generate", PROMPT, "--raw", "--model", tiny_folder, "--max-new-tokens", 4, *arguments)
    with open("/dev/full", "w") as full:
        done = subprocess.run(asked, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, "error: stdout: cannot be written (No space left on device)\n")


def test_the_result_is_printed_before_a_trace_that_cannot_be_written(tiny_folder: Path) -> None:
    done = generate(tiny_folder, "--max-new-tokens", 4, "--json", "--trace", "/dev/full")
    assert done.returncode == 1
    assert len(json.loads(done.stdout)["tokens"]) == 4
    assert done.stderr == "error: /dev/full: cannot be written (No space left on device)\n"


@pytest.fixture
def scenario(tiny_folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    cost = {"kind": "linear", "constant_ms": 1}
    content = {
        "model": {"name": str(tiny_folder), "layers": LAYERS, "hidden": 64, "vocabulary": 160},
        "cluster": {
            "devices": [{"name": "here", "cores": os.cpu_count()}],
            "stages": [{"repeat": 2, "cost": cost, "device": "here"}],
            "drafter": {"level_ms": 0.1},
        },
        "workload": {"prompt": PROMPT, "max_new_tokens": 24},
        "policy": {"name": "pipeinfer", "partitions": 4},
        "acceptance": {"kind": "iid", "rate": 0.8},
        "execution": {"drafter": "planted"},
        "seed": 2,
    }
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_scenario_runs_for_real_with_the_flags_of_simulate(scenario: Path, tmp_path: Path) -> None:
    events, trace, plot = tmp_path / "e.jsonl", tmp_path / "t.json", tmp_path / "p.png"
    done = pipesim("execute", scenario, "--json", "--events", events, "--trace", trace, "--plot", plot, "--seed", 9)
    printed = as_json(done)
    assert (printed["policy"], printed["seed"]) == ("pipeinfer", 9)
    assert pipesim("replay", events).returncode == 0
    chosen = json.loads(events.read_text().splitlines()[0])["policy"]
    assert (chosen["name"], chosen["partitions"]) == ("pipeinfer", 4), "the scenario decides, not generate's defaults"
    assert json.loads(trace.read_text())["traceEvents"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    people = pipesim("execute", scenario, "--set", "policy.name=autoregressive", "--seed", 9)
    assert people.returncode == 0, people.stderr
    assert str(printed["text"]) in people.stdout
    assert "tokens/s" in people.stdout


def test_a_crash_fault_is_carried_out_and_everything_is_in_the_log(scenario: Path, tmp_path: Path) -> None:
    events, log = tmp_path / "e.jsonl", tmp_path / "log.jsonl"
    plain = as_json(pipesim("execute", scenario, "--json"))
    crash = "faults=[{kind: crash, stage: 1, start_ms: 10, detect_ms: 100, restart_ms: 400}]"
    flags = ("--log-level", "debug", "--log-file", log, "--events", events)
    done = pipesim("execute", scenario, "--json", "--set", crash, *flags)
    printed = as_json(done)
    assert printed["tokens"] == plain["tokens"]
    assert printed["metrics"]["e2e_s"] >= 0.5, "the stage is away for at least as long as the scenario says"
    assert "a fault of the scenario kills stage 1" in done.stderr
    assert "attempt 1 of 3" in done.stderr
    assert "run computed" not in done.stderr, "what goes to the file does not litter the screen"
    assert pipesim("replay", events).returncode == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert not any("Loaded running loop" in line["event"] for line in lines), "debug is our news, not that of libraries"
    assert {line["node"] for line in lines} >= {"head", "stage 0", "stage 1", "drafter"}
    restored = next(line for line in lines if line["event"] == "pipeline restored")
    session = max(line["session"] for line in lines if "session" in line)
    ours = [line for line in lines if line.get("session") == session]
    submitted = {(line["epoch"], line["run"]) for line in ours if line["event"] == "run submitted"}
    computed = {(line["node"], line["epoch"], line["run"]) for line in ours if line["event"] == "run computed"}
    assert {epoch for epoch, _ in submitted} == {0, 1}
    after = {(epoch, run) for epoch, run in submitted if epoch}
    assert {(epoch, run) for node, epoch, run in computed if node == "stage 1" and epoch} == after
    assert all(line["time"] > restored["time"] for line in ours if line.get("epoch") and line["node"] == "stage 1")


def test_a_crash_on_another_machine_is_bad_input(scenario: Path) -> None:
    crash = "faults=[{kind: crash, stage: 1, start_ms: 10, detect_ms: 1, restart_ms: 1}]"
    done = pipesim("execute", scenario, "--set", crash, "--set", "execution.hosts=[null, 'far:1']")
    assert done.returncode == 2
    assert "faults.0: stage 1 runs at far:1" in done.stderr


def test_log_settings_that_cannot_be_are_bad_input(scenario: Path) -> None:
    for flags, message in (
        (("--log-level", "loud"), "debug, info"),
        (("--log-file", "/no/where"), "cannot be written"),
    ):
        done = pipesim("execute", scenario, *flags)
        assert done.returncode == 2
        assert flags[0] in done.stderr
        assert message in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layers=7", "model.layers = 7"),
        ("model.hidden=32", "model.hidden = 32"),
        ("model.vocabulary=200", "model.vocabulary = 200"),
        (
            "model.activation_bytes=2",
            "model.activation_bytes = 2: with execution.dtype float32, real stages exchange 4",
        ),
        ("acceptance=null", "acceptance"),
        ("acceptance={kind: per_depth, rates: [0.9]}", "kind: iid or markov"),
        ("workload.max_new_tokens=2000", "max_new_tokens = 2000"),
        ("execution.hosts=[nowhere, null]", "HOST:PORT"),
    ],
)
def test_a_scenario_that_does_not_fit_the_model_is_bad_input(scenario: Path, override: str, message: str) -> None:
    done = pipesim("execute", scenario, "--set", override)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("drafter", "temperature", "near"),
    [
        # what these propose depends on the text before a position alone, and that is what the file holds: no difference
        ("planted", 0.0, 0.0),
        ("layer-skip", 0.9, 0.0),
        # looks up in committed text only: the recording knows all text before each position, a draft of up to 4 tokens
        # lacks what its own first 3 would have added
        ("ngram", 0.0, 0.05),
    ],
)
def test_a_recorded_drafter_is_accepted_in_simulation_as_it_was_for_real(
    scenario: Path, tmp_path: Path, drafter: str, temperature: float, near: float
) -> None:
    """Synchronous speculation, since no decision of it depends on how long anything takes."""
    record = tmp_path / "acceptance.json"
    sets = [f"execution.drafter={drafter}", f"workload={{prompt: {PROMPT}, max_new_tokens: 96}}"]
    sets += [f"workload.temperature={temperature}", "policy={name: speculative, max_nodes: 4}"]
    flags = [flag for override in sets for flag in ("--set", override)]
    real = as_json(pipesim("execute", scenario, "--json", "--record-acceptance", record, *flags))
    simulated = simulate(load_scenario(scenario, [*sets, "acceptance={kind: trace, file: acceptance.json}"]))
    assert list(simulated.tokens) == real["tokens"]
    figures, expected = compute_metrics(simulated).as_dict(), real["metrics"]
    assert isinstance(expected, dict)
    assert expected["acceptance_rate"] > 0.3, "this drafter has something to be compared by"
    assert figures["acceptance_rate"] == pytest.approx(expected["acceptance_rate"], abs=near)
    if not near:
        assert figures["runs"] == expected["runs"]


def test_what_is_recorded_does_not_depend_on_the_policy(scenario: Path, tmp_path: Path) -> None:
    for policy in ("autoregressive", "pipeinfer"):
        done = pipesim("execute", scenario, "--set", f"policy.name={policy}", "--record-acceptance", tmp_path / policy)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "autoregressive").read_bytes() == (tmp_path / "pipeinfer").read_bytes()


def test_compare_shows_every_metric_of_both_worlds(scenario: Path, tmp_path: Path) -> None:
    plot = tmp_path / "both.svg"
    figures = as_json(pipesim("compare", scenario, "--repeats", 2, "--json", "--plot", plot))["metrics"]
    assert isinstance(figures, dict)
    for name in ("tokens_per_second", "ttft_s", "itl_s.p99", "e2e_s", "acceptance_rate", "stage_utilization.1"):
        figure = figures[name]
        assert list(figure) == ["predicted", "interval", "measured", "spread", "error", "verdict"]
        assert figure["spread"][0] <= figure["measured"] <= figure["spread"][1]
        assert figure["error"] == pytest.approx((figure["predicted"] - figure["measured"]) / figure["measured"])
    assert plot.read_text().startswith("<?xml")
    full = tmp_path / "full.svg"
    full.symlink_to("/dev/full")
    people = pipesim("compare", scenario, "--repeats", 1, "--plot", full)
    assert people.returncode == 1, people.stderr
    assert people.stderr.endswith(f"error: {full}: cannot be written (No space left on device)\n")
    assert "Traceback" not in people.stderr
    assert "acceptance_rate" in people.stdout
    assert "…" not in people.stdout, "names are whole where nobody's screen is too narrow"
    assert "links and devices were measured" in people.stdout
    assert "All texts were equal" in people.stdout


def test_three_commands_give_a_calibrated_prediction_of_one_s_own_machines(tiny_folder: Path, tmp_path: Path) -> None:
    """As the README has them: stage servers, calibrate, and the profile simulated and compared."""
    hosts, profile, page = tmp_path / "hosts.yaml", tmp_path / "profile.yaml", tmp_path / "page.html"
    with stage_server() as (first, _), stage_server() as (second, _):
        hosts.write_text(yaml.safe_dump([first, second]))
        asked = ("--cluster", hosts, "--model", tiny_folder, "--prompt", PROMPT, "--rounds", 2, "--max-new-tokens", 24)
        told = as_json(pipesim("calibrate", *asked, "--set", "workload.chat=false", "-o", profile, "--json"))
        intervals, values = told["intervals"], told["values"]
        assert isinstance(intervals, dict)
        assert isinstance(values, dict)
        assert values["cluster.stages.1.cost.rows_ms.1"] > 0
        assert "cluster.devices.0.contention" in intervals, "both stages share this machine"
        predicted = as_json(pipesim("simulate", profile, "--json"))
        compared = as_json(pipesim("compare", profile, "--repeats", 2, "--json", "--html", page))
    tokens, metrics = predicted["tokens"], compared["metrics"]
    assert isinstance(tokens, list)
    assert isinstance(metrics, dict)
    assert len(tokens) == 24
    assert compared["replays_identical"] == 2
    assert compared["calibration"] == {key: told[key] for key in told if key not in ("profile", "values")}, "as it was"
    speed = metrics["tokens_per_second"]
    assert speed["interval"][0] <= speed["predicted"] <= speed["interval"][1]
    content = page.read_text()
    assert content.count('<svg class="timeline"') == 2
    assert "http" not in content.replace("http-equiv", ""), "the page fetches nothing"


def test_activations_travel_as_wide_as_asked_and_lossy_ones_are_named(scenario: Path) -> None:
    rows, hidden = 30 + 24 - 1, 64
    sent = {}
    for dtype, form in (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "fp8"), ("float32", "int8")):
        sets = ("policy.name=autoregressive", f"execution={{dtype: {dtype}, activation_compression: {form}}}")
        done = pipesim("execute", scenario, "--json", *(word for one in sets for word in ("--set", one)))
        told = as_json(done)
        metrics = told["metrics"]
        assert isinstance(metrics, dict)
        sent[dtype, form] = metrics["link_bytes"]
        assert ("lossy" in told) == (form != "none") == ("lossy" in done.stderr)
        assert form == "none" or f"activations travel as {form}" in str(told["lossy"])
    widest, about = sent["float32", "none"], {"abs": 5 * rows}  # a number in the metadata may be a byte longer or two
    assert widest - sent["bfloat16", "none"] == pytest.approx(rows * hidden * 2, **about)
    assert widest - sent["float32", "int8"] == pytest.approx(rows * (hidden * 3 - 4), **about)
    assert sent["bfloat16", "none"] - sent["bfloat16", "fp8"] == pytest.approx(rows * (hidden - 4), **about)


def test_generate_and_compare_name_lossy_activations(tiny_folder: Path, scenario: Path) -> None:
    lossy = ("--set", "execution.activation_compression=fp8")
    told = as_json(generate(tiny_folder, "--max-new-tokens", 4, "--dtype", "bfloat16", "--json", *lossy))
    assert "fp8" in str(told["lossy"])
    compared = pipesim("compare", scenario, "--repeats", 1, "--rounds", 2, *lossy)
    assert "Lossy: activations travel as fp8" in " ".join(compared.stdout.split()), compared.stderr


def test_compare_takes_stop_strings(scenario: Path) -> None:
    text = str(as_json(pipesim("execute", scenario, "--json"))["text"])
    stop = text[len(text) // 2 :][:6]
    done = pipesim("compare", scenario, "--repeats", 1, "--json", "--set", f"workload.stop=['{stop}']")
    figures = as_json(done)["metrics"]
    assert isinstance(figures, dict)
    assert figures["e2e_s"]["predicted"] > 0


def test_compare_on_a_full_disk_is_one_message(scenario: Path) -> None:
    with open("/dev/full", "w") as full:
        asked = command("compare", scenario, "--repeats", 1, "--json")
        done = subprocess.run(asked, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=90)
    assert (done.returncode, done.stderr) == (1, "error: stdout: cannot be written (No space left on device)\n")


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(importlib.metadata.EntryPoint):
        def load(self) -> object:
            raise ImportError("No module named 'grpc'")

    for found in ([], [Broken("grpc", "backends.executor:GrpcExecutor", "pipesim.executors")]):
        monkeypatch.setattr("pipesim.executors.entry_points", lambda group, found=found: found)
        with pytest.raises(BadInputError, match=r'install "pipesim\[real\]"'):
            find_executor()
