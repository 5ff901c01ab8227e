"""The commands that run a model for real: generate, execute, stage."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from pipesim.acceptance_trace import write_acceptance_trace
from pipesim.cli.common import (
    INTERRUPTED,
    EventsOption,
    JsonOption,
    LogFileOption,
    LogLevelOption,
    PlotOption,
    ScenarioArgument,
    SeedOption,
    SetOption,
    TraceOption,
    WindowOption,
    app,
    check_outputs,
    diagnostic,
    early_end,
    fail,
    load,
    parse_window,
    printing,
    report,
    result,
    write_files,
    writing,
)
from pipesim.cli.streaming import TextScreen
from pipesim.errors import BadInputError
from pipesim.executors import Executor, RealResult, find_executor
from pipesim.scenario import Scenario
from pipesim.scenario_file import apply_overrides, build_scenario

RecordOption = Annotated[
    Path | None,
    typer.Option(
        "--record-acceptance",
        metavar="FILE",
        help="Write what the drafter proposes all along the text, for acceptance: {kind: trace} (JSON).",
    ),
]
LOOK_UP_SETTINGS: dict[str, dict[str, Any]] = {
    "speculative": {"max_nodes": 5, "cutoff": 0.2},
    "pipeinfer": {"micro_batch": 8, "p_accept": 0.2, "partitions": 4, "calibrated": True},
}
"""What ``generate`` sets where the drafter looks up n-grams: its tokens cost nothing and its confidences are honest."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends a command with the status that shells expect; executors have cleaned up by then."""
    try:
        yield
    except KeyboardInterrupt:
        diagnostic("interrupted")
        raise typer.Exit(INTERRUPTED) from None


def executor_with_logs(log_level: str | None, log_file: Path | None) -> Executor:
    """The installed executor. It, and every process that it starts, reads from the environment what to log where."""
    for variable, value in (("PIPESIM_LOG", log_level), ("PIPESIM_LOG_FILE", log_file)):
        if value is not None:
            os.environ[variable] = str(value)
    return find_executor()


@app.command("generate")
def generate_command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer, or with --raw to continue.")],
    model: Annotated[
        str, typer.Option(help="smollm2-135m, gemma-3-270m, a .gguf file, a folder of safetensors, or a hub name.")
    ] = "smollm2-135m",
    stages: Annotated[int | None, typer.Option(help="Start so many stage processes here (default: 2).")] = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML list of running stages, HOST:PORT each, in order.")
    ] = None,
    policy: Annotated[str, typer.Option(help="autoregressive, speculative, pipeinfer, or an installed one.")] = (
        "pipeinfer"
    ),
    drafter: Annotated[str, typer.Option(help="ngram, layer-skip, planted, or a draft model: name or path.")] = "ngram",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among so many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the tokens of this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Sample among tokens so probable, the best being 1.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: fewer tokens come again.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or quantized, as a GGUF file is.")
    ] = "float32",
    device: Annotated[
        str | None, typer.Option(help="Where stages compute: cpu, cuda:0, ..; several, by commas, for one each.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    overrides: SetOption = None,
    events: EventsOption = None,
    trace: TraceOption = None,
    record_acceptance: RecordOption = None,
    log_level: LogLevelOption = None,
    log_file: LogFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate text on a real pipeline, shown as it is committed. Its text never depends on policy and stages.

    The planted drafter replays known text and errs as often as acceptance.rate says (0.8): it needs a plain
    generation first.

    Example: pipesim generate "Count from one to twenty." --stages 2 --policy pipeinfer --max-new-tokens 64
    """
    executor = executor_with_logs(log_level, log_file)
    check_outputs(trace, events, record_acceptance)
    description = describe_run(executor, model, stages, cluster, drafter)
    description["workload"] = {
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "chat": not raw,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or [],
    }
    description["policy"] = {"name": policy}
    description["execution"] |= {"dtype": dtype, "device": _devices(device)}
    description["seed"] = seed
    apply_overrides(description, overrides or ())
    scenario = build_scenario(description, "generate")
    outcome = _execute(executor, scenario, events, as_json, record_acceptance, keep_trace=trace is not None)
    _report_generation(outcome, as_json, trace, scenario.execution.lossy)


def _execute(
    executor: Executor,
    scenario: Scenario,
    events: Path | None,
    as_json: bool,
    acceptance: Path | None,
    keep_trace: bool,
) -> RealResult:
    """One real generation; its text appears on stdout as it is committed, unless JSON is to stand there alone."""
    with interruptible(), writing(events) as log, writing(acceptance) as record:
        if as_json:
            outcome = executor.execute(scenario, log, None, record is not None, keep_trace)
        else:
            with TextScreen.open() as screen:
                outcome = executor.execute(scenario, log, screen.show, record is not None, keep_trace)
            with printing():
                print()
        if record and outcome.acceptance:
            write_acceptance_trace(outcome.acceptance, record)
        if lossy := scenario.execution.lossy:
            diagnostic(f"lossy: {lossy}")
        return outcome


def describe_run(
    executor: Executor, model: str, stages: int | None, cluster: Path | None, drafter: str
) -> dict[str, Any]:
    """The sections of a scenario that follow from where to run; two stages unless told. Raises BadInputError."""
    hosts = None if cluster is None else read_hosts(cluster)
    if hosts is not None and stages not in (None, len(hosts)):
        raise BadInputError(f"--stages {stages}: {cluster} lists {len(hosts)} stages, leave --stages out")
    described, layers = executor.describe(model, len(hosts) if hosts else 2 if stages is None else stages)
    description: dict[str, Any] = {
        "model": described.model_dump(exclude_unset=True),
        # costs are for simulation: nobody reads them here
        "cluster": {
            "stages": [{"layers": count, "cost": {"kind": "linear", "constant_ms": 1}} for count in layers],
            "drafter": {"level_ms": 0},
        },
        "policies": LOOK_UP_SETTINGS if drafter == "ngram" else {},
        "execution": {"drafter": drafter, "hosts": hosts},
    }
    if drafter == "planted":
        description["acceptance"] = {"kind": "iid", "rate": 0.8}
    return description


def read_hosts(path: Path) -> list[str]:
    """The addresses in a cluster file. Raises BadInputError."""
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise BadInputError(f"--cluster {path}: cannot be read as YAML ({problem})") from None
    if isinstance(listed, dict) and listed.keys() in ({"stages"}, {"hosts"}):
        (listed,) = listed.values()
    if not isinstance(listed, list) or not listed or not all(isinstance(host, str) for host in listed):
        raise BadInputError(f"--cluster {path}: a YAML list of HOST:PORT is needed, one for each stage")
    return listed


def _devices(listed: str | None) -> str | list[str] | None:
    return listed.split(",") if listed and "," in listed else listed


def _report_generation(outcome: RealResult, as_json: bool, trace_file: Path | None, lossy: str | None) -> None:
    """Figures for people on stderr: stdout holds the text alone, or the JSON object alone."""
    summary, metrics = outcome.summary, outcome.summary.metrics
    if as_json:
        with printing():
            print(json.dumps(result(summary, outcome.text, lossy=lossy)))
    elif sys.stderr.isatty():
        speed = "" if metrics.tokens_per_second is None else f", {metrics.tokens_per_second:.1f} tokens/s"
        rate = "" if metrics.acceptance_rate is None else f", {metrics.acceptance_rate:.0%} of drafted tokens accepted"
        diagnostic(f"{len(summary.tokens)} tokens{speed}{rate}")
    if outcome.trace:
        write_files(outcome.trace, trace_file, None)
    fail([problem for problem in [early_end(summary)] if problem])


@app.command("execute")
def execute_command(
    scenario: ScenarioArgument,
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    trace: TraceOption = None,
    plot: PlotOption = None,
    plot_window: WindowOption = None,
    events: EventsOption = None,
    record_acceptance: RecordOption = None,
    log_level: LogLevelOption = None,
    log_file: LogFileOption = None,
) -> None:
    """Run a scenario for real: its stages are processes over gRPC, its text is a model's.

    Costs, links, devices and acceptance of the file belong to the simulation, unless execution.emulate is true: then
    real processes keep to the times of the cluster described.

    Example: pipesim execute scenarios/demo.yaml --set policy.name=autoregressive --plot out.png
    """
    loaded, window = load(scenario, overrides, seed), parse_window(plot_window)
    check_outputs(trace, events, record_acceptance, plot=plot)
    executor = executor_with_logs(log_level, log_file)
    outcome = _execute(executor, loaded, events, as_json, record_acceptance, keep_trace=bool(trace or plot))
    lossy = loaded.execution.lossy
    report(
        outcome.summary,
        outcome.trace,
        as_json=as_json,
        trace_file=trace,
        plot_file=plot,
        text=outcome.text,
        window=window,
        lossy=lossy,
    )


@app.command("stage")
def stage_command(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")],
    device: Annotated[str, typer.Option(help="Where to compute, if the head names no device: cpu, cuda:0, ..")] = "cpu",
    log_level: LogLevelOption = None,
    log_file: LogFileOption = None,
) -> None:
    """Serve one stage of a pipeline, for heads on other machines; a head says which layers of which model.

    The first line on stdout is JSON and names the address. Serves one head at a time, one after another. There is no
    encryption: use it in networks that you trust.

    Example: pipesim stage --listen 0.0.0.0:50051 --log-level info
    """
    try:
        executor_with_logs(log_level, log_file).serve_stage(listen, device)
    except KeyboardInterrupt:
        # PyTorch's threads, if only just begun, may abort a process whose interpreter is taken down beneath them
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
