"""The commands that need no model: simulate, replay, profiles, schema."""

import json
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from pipesim.cli.common import (
    EventsOption,
    JsonOption,
    PlotOption,
    RepeatsOption,
    ScenarioArgument,
    SeedOption,
    SetOption,
    TraceOption,
    WindowOption,
    app,
    check_outputs,
    diagnostic,
    fail,
    load,
    parse_window,
    printing,
    report,
    write_files,
    writing,
)
from pipesim.cli.repeats import report_repeats
from pipesim.event_log import replay_log
from pipesim.hardware.tables import profile_tables
from pipesim.scenario import MarkovAcceptance, json_schema
from pipesim.summary import summarise


@app.command("simulate")
def simulate_command(
    scenario: ScenarioArgument,
    overrides: SetOption = None,
    seed: SeedOption = None,
    repeats: RepeatsOption = 1,
    as_json: JsonOption = False,
    trace: TraceOption = None,
    plot: PlotOption = None,
    plot_window: WindowOption = None,
    events: EventsOption = None,
) -> None:
    """Simulate a scenario.

    With --repeats every figure is a mean over seeds with its 95 % confidence interval. In JSON `metrics` and `bound`
    are then the means, `seeds` the seeds, and `intervals_95` has [low, high] in the place of each mean (those of
    `bound` under its name); `tokens`, and files that are written, are those of the first seed.

    Example: pipesim simulate scenarios/demo.yaml --set policy.name=speculative --set policy.max_nodes=6 --plot out.png
    """
    from pipesim.simulation.bound import clairvoyant_bound
    from pipesim.simulation.pipeline import simulate  # other commands need not wait for it to load

    first, *others = load(scenario, overrides, seed).with_seeds(repeats)
    window = parse_window(plot_window)
    check_outputs(trace, events, plot=plot)
    if isinstance(first.acceptance, MarkovAcceptance):
        share, rate = first.acceptance.good_share, first.acceptance.rate
        diagnostic(f"in the long run {share:.1%} of positions are good, {rate:.1%} of first candidates are right")
    with writing(events) as stream:
        outcome = simulate(first, stream)
    stages, bound, summary = first.stage_summaries(), clairvoyant_bound(first), summarise(outcome)
    if not others:
        report(
            summary,
            outcome,
            as_json=as_json,
            trace_file=trace,
            plot_file=plot,
            stages=stages,
            bound=bound,
            window=window,
        )
        return
    outcomes = chain([(summary, bound)], ((summarise(simulate(one)), clairvoyant_bound(one)) for one in others))
    problems = report_repeats(outcomes, stages, as_json=as_json)
    write_files(outcome, trace, plot, window)
    fail(problems)


@app.command("replay")
def replay_command(
    events: Annotated[Path, typer.Argument(metavar="EVENTS.jsonl", help="Event log that --events wrote.")],
) -> None:
    """Feed a logged generation to a fresh scheduler: it must give the logged commands exactly.

    Exit status 1 and both commands are shown if it does not; status 1, too, for a log that was cut off.

    Example: pipesim simulate scenarios/demo.yaml --events out.jsonl && pipesim replay out.jsonl
    """
    outcome = replay_log(events)
    if outcome.difference:
        with printing():
            print(outcome.difference)
        raise typer.Exit(1)
    if not outcome.released:
        diagnostic(f"{events}: {outcome.events} events agree; the log ends before the generation did")
        raise typer.Exit(1)
    diagnostic(f"{events}: {outcome.events} events, and a fresh scheduler gives the same commands")


@app.command("profiles")
def profiles_command() -> None:
    """List the devices, links, models and quantizations that scenarios know by name, with sources (Markdown tables).

    Example: pipesim profiles | less -S
    """
    with printing():
        print(profile_tables(), end="")


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of scenario files, for editors and other programs.

    Example: pipesim schema > scenario.schema.json
    """
    with printing():
        print(json.dumps(json_schema(), indent=2))
