"""The command that runs a scenario many times, with keys varied."""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipesim.cli.common import (
    INTERRUPTED,
    RepeatsOption,
    ScenarioArgument,
    SeedOption,
    SetOption,
    app,
    check_outputs,
    diagnostic,
    failures,
    printing,
)
from pipesim.errors import BadInputError
from pipesim.metrics import Metrics
from pipesim.scenario_file import read_scenario
from pipesim.sweep import cross, parse_axis, run_points

if TYPE_CHECKING:
    import pandas as pd

_ERRORS_SHOWN = 5


@app.command("sweep")
def sweep_command(
    scenario: ScenarioArgument,
    output: Annotated[Path, typer.Option("-o", metavar="FILE", help="Parquet file for the rows.")],
    vary: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUES",
            help="Vary a key: KEY=a,b,c (YAML), KEY=low:high:log8 or KEY=low:high:lin5; several: all combinations.",
        ),
    ],
    overrides: SetOption = None,
    seed: SeedOption = None,
    repeats: RepeatsOption = 1,
    jobs: Annotated[int | None, typer.Option(min=1, help="Points at once (default: one per core).")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: the cluster at RAY_ADDRESS, else one started here.")] = (
        "local"
    ),
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the metric (PNG, PDF or SVG).")] = None,
    metric: Annotated[str, typer.Option(help="What is tabled and drawn: a column such as itl_s.p95.")] = (
        "tokens_per_second"
    ),
) -> None:
    """Simulate a scenario with keys varied: a row per point and seed in a Parquet file, and a summary (Markdown) here.

    Every policy meets the others with its own settings: `policies` in the scenario file has them, --set
    policies.speculative.max_nodes=6 changes them, and --vary policy.name=... picks them up. Keys that belong together
    are varied as a section: --vary 'policy={name: pipeinfer, micro_batch: 2},{name: pipeinfer, micro_batch: 8}'.

    Finished points are kept in FILE.journal. The same command goes on after an interruption, and one with more values
    or repeats runs only what is new: a point is run again only if its scenario, with all defaults and files, or
    pipesim's code has changed. A failing point is a row with its error, and the exit status is then 1.

    Example: pipesim sweep scenarios/ablation.yaml --vary policy.name=speculative,pipeinfer
    --vary acceptance.rate=0.3:0.9:lin7 --repeats 10 -o rates.parquet --plot rates.png
    """
    from analysis.sweeps import Layout, summary  # takes a second to load

    axes = [parse_axis(text) for text in vary]
    points = cross(axes)
    if repeats > 1 and any(axis.key == "seed" for axis in axes):
        raise BadInputError(f"--repeats {repeats}: seeds are varied already, leave one of the two out")
    if metric.split(".")[0] not in {field.name for field in dataclasses.fields(Metrics)}:
        raise BadInputError(f"--metric {metric}: there is no such metric, see the columns of {output}")
    check_outputs(output, _journal(output), plot=plot)
    layout = Layout.of(axes, repeats, metric)
    if plot:
        layout.check_plot()
    base = read_scenario(scenario, [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])])
    try:
        with _progress() as progress:
            frame = run_points(
                base,
                points,
                repeats=repeats,
                jobs=jobs,
                engine=engine,
                journal=_journal(output),
                folder=scenario.parent,
                progress=progress,
            )
    except KeyboardInterrupt:
        diagnostic("interrupted; what is finished is kept, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    with failures(str(output)):
        _write(frame, output)
    with printing():
        print(summary(frame, layout, scenario, shlex.join(["pipesim", *sys.argv[1:]]), plot), end="")
    if plot:
        from analysis.sweep_figure import plot_sweep

        with failures(str(plot)):
            plot_sweep(frame, layout, plot)
    _report_failures(frame)


def _journal(output: Path) -> Path:
    return output.with_name(f"{output.name}.journal")


def _write(frame: "pd.DataFrame", path: Path) -> None:
    """All or nothing: an interruption leaves the old file."""
    beside = path.with_name(f"{path.name}.new")
    frame.to_parquet(beside, index=False)
    os.replace(beside, path)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("points"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:

        def show(done: int, total: int) -> None:
            if not bar.tasks:  # what was finished before says nothing about the speed
                bar.add_task("points", completed=done, total=total)
            bar.update(bar.tasks[0].id, completed=done)

        yield show


def _report_failures(frame: "pd.DataFrame") -> None:
    """Says what failed; exits with status 1 if anything did."""
    errors = frame["error"].dropna()
    if errors.empty:
        return
    for text, count in errors.value_counts(sort=False).head(_ERRORS_SHOWN).items():
        diagnostic(f"{count} rows: {text}")
    diagnostic(f"error: {len(errors)} of {len(frame)} rows failed; the column `error` has the reasons")
    raise typer.Exit(1)
