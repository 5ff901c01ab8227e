"""The commands that hold the simulator against reality: calibrate, compare, report."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from pipesim.cli.common import (
    JsonOption,
    LogFileOption,
    LogLevelOption,
    PlotOption,
    SeedOption,
    SetOption,
    app,
    check_outputs,
    check_pace,
    diagnostic,
    failures,
    load,
    pace_table,
    printing,
    show,
    writing,
)
from pipesim.cli.real import describe_run, executor_with_logs, interruptible
from pipesim.cli.streaming import TextScreen
from pipesim.errors import BadInputError, InvariantError
from pipesim.event_log import replay
from pipesim.executors import Executor, Measurement
from pipesim.pace import judge
from pipesim.scenario import Calibration, Scenario
from pipesim.scenario_file import apply_overrides, build_scenario

if TYPE_CHECKING:
    from pipesim.comparison import Figure, Prediction

_ROUNDS = 6
_PROMPT = (
    "Rewrite this list with one name on each line, and change nothing else: Ada Lovelace, Charles Babbage, Alan "
    "Turing, Grace Hopper, John von Neumann, Claude Shannon, Ada Lovelace, Edsger Dijkstra, Barbara Liskov."
)


@app.command("calibrate")
def calibrate_command(
    scenario: Annotated[
        Path | None, typer.Argument(metavar="[SCENARIO]", help="Scenario file (YAML); or say --model, --stages.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PROFILE", help="File to write (YAML).")] = Path(
        "profile.yaml"
    ),
    model: Annotated[str, typer.Option(help="As generate's, where there is no scenario.")] = "smollm2-135m",
    stages: Annotated[int | None, typer.Option(help="Start so many stage processes here (default: 2).")] = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML list of running stages, HOST:PORT each, in order.")
    ] = None,
    drafter: Annotated[str, typer.Option(help="As generate's, where there is no scenario.")] = "ngram",
    prompt: Annotated[str, typer.Option(help="The text whose acceptance is recorded.")] = _PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="How far: costs are measured up to this length.")] = 64,
    rounds: Annotated[int, typer.Option(min=2, help="How often to measure everything, in turns.")] = 2 * _ROUNDS,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    log_level: LogLevelOption = None,
    log_file: LogFileOption = None,
) -> None:
    """Measure what a pipeline costs, and write one profile that can be simulated and that scenarios can name.

    Brings the pipeline up, generates, and sends made-up runs of all sizes down it. The profile is a scenario itself;
    in others, `calibration: profile.yaml` puts its costs in the place of theirs.

    Example: pipesim calibrate --cluster hosts.yaml -o profile.yaml
    """
    from pipesim.calibration import fit_costs, make_profile, write_profile  # numerics: others need not wait for them

    executor = executor_with_logs(log_level, log_file)
    check_outputs(output)
    if scenario is not None:
        loaded = load(scenario, overrides, None)
    else:
        workload = {"prompt": prompt, "max_new_tokens": max_new_tokens, "chat": True, "ignore_eos": True}
        loaded = _describe(executor, model, stages, cluster, drafter, workload, overrides)
    with tempfile.TemporaryDirectory() as folder:
        measured = _measure(executor, loaded, 0, rounds, Path(folder), as_json).observed
    fit = fit_costs(measured.costs, measured.shared_by_all)
    profile = make_profile(loaded, fit, measured.here, measured.cores, rounds, measured.acceptance)
    with writing(output) as stream:
        assert stream
        write_profile(profile, stream)
    with printing():
        if as_json:
            print(json.dumps({"profile": str(output), "values": fit.values, **profile["calibration"]}))
        else:
            show(_fit_table(fit.values, fit.intervals))
            print(f"Relative errors of the fits (root mean square): {_listed(fit.residuals)}.")
            print(f"{output}: pipesim simulate {output}; pipesim compare {output}")


def _describe(
    executor: Executor,
    model: str,
    stages: int | None,
    cluster: Path | None,
    drafter: str,
    workload: dict[str, Any],
    overrides: list[str] | None,
) -> Scenario:
    """A scenario from the options, without costs. Raises BadInputError."""
    raw = describe_run(executor, model, stages, cluster, drafter)
    raw |= {"workload": workload, "policy": {"name": "pipeinfer"}}
    apply_overrides(raw, overrides or ())
    return build_scenario(raw, "calibrate")


def _measure(
    executor: Executor, scenario: Scenario, repeats: int, rounds: int, logs: Path, as_json: bool
) -> Measurement:
    with interruptible():
        if as_json:
            return executor.measure(scenario, repeats, rounds, logs)
        diagnostic("starting the pipeline; the first text is plain decoding's:")
        with TextScreen.open() as screen:
            measurement = executor.measure(scenario, repeats, rounds, logs, screen.show)
        with printing():
            print()
        return measurement


def _fit_table(values: Any, intervals: Any) -> Table:
    table = Table(title="measured costs", box=box.SIMPLE_HEAD)
    table.add_column("key", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("95 % confidence", justify="right", no_wrap=True)
    for key, value in values.items():
        limits = intervals.get(key)
        table.add_row(key, f"{value:.4g}", f"{limits[0]:.4g} .. {limits[1]:.4g}" if limits else "-")
    return table


def _listed(residuals: Any) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in residuals.items())


@app.command("compare")
def compare_command(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="Scenario file (YAML), or a profile.")],
    repeats: Annotated[int, typer.Option(min=1, help="Real runs to compare with.")] = 3,
    rounds: Annotated[
        int | None,
        typer.Option(min=0, help=f"Rounds of measuring costs, between the runs; default {_ROUNDS}, 0 with a profile."),
    ] = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a self-contained page: timelines, verdicts.")
    ] = None,
    plot_file: PlotOption = None,
    profile_file: Annotated[
        Path | None, typer.Option("--profile", metavar="FILE", help="Write what was measured, as calibrate does.")
    ] = None,
    log_level: LogLevelOption = None,
    log_file: LogFileOption = None,
) -> None:
    """Hold the simulator against reality: measure costs on a real pipeline, predict, run for real, show both.

    The prediction never sees the runs it is compared with. A scenario with a `calibration` is predicted from that
    profile alone, an emulated cluster from its own costs. Every real run must give plain decoding's text, and its event
    log must replay exactly.

    Verdicts: *agrees*, where several real runs and the prediction's interval cannot be told apart (*too noisy*, if the
    runs spread by more than a fifth); *within* 10 % of their median; *deviates*, further off.

    Example: pipesim compare scenarios/demo.yaml --repeats 5 --html both.html
    """
    from pipesim.calibration import write_profile  # the simulation: other commands need not wait for it to load
    from pipesim.comparison import compare, measured_profile, predict

    loaded = load(scenario, overrides, seed)
    check_outputs(html_file, profile_file, plot=plot_file)
    if rounds is None:
        rounds = 0 if isinstance(loaded.calibration, Calibration) or loaded.execution.emulate else _ROUNDS
    if rounds and loaded.execution.emulate:
        raise BadInputError(f"--rounds {rounds}: an emulated cluster has the costs of the file, leave it out")
    if profile_file and not rounds:
        raise BadInputError("--profile: nothing is measured in 0 rounds, use --rounds or leave it out")
    executor = executor_with_logs(log_level, log_file)
    with tempfile.TemporaryDirectory() as folder:
        measurement = _measure(executor, loaded, repeats, rounds, Path(folder), as_json)
        for log in sorted(Path(folder).iterdir()):
            if difference := replay(log):
                raise InvariantError(f"{log.name} does not replay (I9): {difference}")
    measured = loaded
    if rounds:
        profile = measured_profile(loaded, measurement.observed)
        measured = build_scenario(profile, "the measured scenario")
        with writing(profile_file) as stream:
            if stream:
                write_profile(profile, stream)
    prediction = predict(measured, measurement.observed.acceptance)
    traces = measurement.runs
    figures = compare(prediction, traces, measurement.observed.acceptance.tokens)
    pace = judge([sample for trace in traces for sample in trace.pace])
    shown = {
        "scenario": str(scenario),
        "policy": loaded.policy.name,
        "seed": loaded.seed,
        "repeats": repeats,
        "replays_identical": len(traces),
        "calibration": _evidence(measured),
        **({"lossy": lossy} if (lossy := loaded.execution.lossy) else {}),
        "metrics": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
    }
    kept = pace is None or pace.kept
    if pace:
        shown["pace"] = pace.as_dict()
    if not kept:
        del shown["metrics"]
    with printing():
        if as_json:
            print(json.dumps(shown, allow_nan=False))
        else:
            if kept:
                show(_comparison_table(loaded, figures, repeats), whole=True)
            if pace:
                show(pace_table(pace))
            if kept:
                print(closing_note(measured, repeats))
    check_pace(pace)
    _draw(prediction, measurement, shown, closing_note(measured, repeats), html_file, plot_file)


@app.command("report")
def report_command(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="Rows of a sweep (Parquet), or what --json printed.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="HTML file to write.")],
) -> None:
    """Write results as one self-contained page: tables, figures, verdicts.

    Example: pipesim report rows.parquet comparison.json -o report.html
    """
    from analysis.report import report_page  # drawing libraries take a second to load

    check_outputs(output)
    content = report_page(results)
    with writing(output) as stream:
        assert stream
        stream.write(content)


def _evidence(scenario: Scenario) -> dict[str, Any] | None:
    evidence = scenario.calibration
    return evidence.model_dump(mode="json") if isinstance(evidence, Calibration) else None


def closing_note(scenario: Scenario, repeats: int) -> str:
    """How a comparison was made, for people."""
    evidence = scenario.calibration
    note = "Costs, links and devices are those of the file. "
    if isinstance(evidence, Calibration):
        note = (
            f"Costs, links and devices were measured ({evidence.date}, {evidence.machine}): {evidence.how}; "
            f"medians of {evidence.rounds} rounds. Relative errors of the fits (root mean square): "
            f"{_listed(evidence.residuals)}. "
        )
    if lossy := scenario.execution.lossy:
        note += f"Lossy: {lossy}. "
    return (
        f"{note}Acceptance: the drafter's candidates along the text of plain decoding. The prediction saw none of the "
        f"{repeats} runs. All texts were equal, all event logs replayed exactly."
    )


def _draw(
    prediction: "Prediction",
    measurement: Measurement,
    shown: dict[str, Any],
    note: str,
    html_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Writes the page and the picture. Raises PipesimError if that fails."""
    first = measurement.runs[0]
    if html_file:
        from analysis.comparison_page import comparison_page

        with writing(html_file) as stream:
            assert stream
            stream.write(comparison_page(shown, {"predicted": prediction.trace, "measured": first}, note))
        diagnostic(f"timelines and verdicts: {html_file}")
    if plot_file:
        from analysis.plots import plot_timelines  # drawing libraries take a second to load

        with failures(str(plot_file)):
            plot_timelines({"predicted": prediction.trace, "measured": first}, plot_file)
        diagnostic(f"timelines of the prediction and the first run: {plot_file}")


def _comparison_table(scenario: Scenario, figures: "dict[str, Figure]", repeats: int) -> Table:
    title = f"{scenario.policy.name}, seed {scenario.seed}: simulation and {repeats} real runs"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("metric", no_wrap=True)
    for heading in ("predicted", "interval", "measured (median)", "lowest .. highest", "error", "verdict"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, figure in figures.items():
        values = ["-" if value is None else f"{value:.4g}" for value in (figure.predicted, figure.measured)]
        ranges = ["-" if one is None else f"{one[0]:.4g} .. {one[1]:.4g}" for one in (figure.interval, figure.spread)]
        error = "-" if figure.error is None else f"{figure.error:+.1%}"
        table.add_row(name, values[0], ranges[0], values[1], ranges[1], error, figure.verdict)
    return table
