"""What all commands share: the application, option types, error handling, and how results are shown."""

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TextIO

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from pipesim.errors import BadInputError, PipesimError
from pipesim.metrics import LatencyShares
from pipesim.pace import Pace
from pipesim.perfetto import write_perfetto
from pipesim.scenario import Scenario, StageSummary
from pipesim.scenario_file import load_scenario
from pipesim.summary import Summary
from pipesim.trace import Trace

if TYPE_CHECKING:
    from pipesim.simulation.bound import Bound


class _Commands(TyperGroup):
    """Turns the project's own errors into one message on stderr and an exit status, for every command."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            with printing():  # what a command left in the buffer
                return result
        except BadInputError as problem:
            diagnostic(f"error: {problem}")
            ctx.exit(2)
        except PipesimError as problem:
            diagnostic(f"error: {problem}")
            ctx.exit(1)


app = typer.Typer(
    cls=_Commands,
    help="Speculative LLM inference over pipelines of machines: one scheduler, simulated and executed for real.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ScenarioArgument = Annotated[Path, typer.Argument(metavar="SCENARIO", help="Scenario file (YAML).")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key by its dotted path; may be repeated."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Override the scenario's seed.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
TraceOption = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="Write a timeline for ui.perfetto.dev (JSON).")
]
PlotOption = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the timeline (PNG, PDF or SVG).")]
WindowOption = Annotated[
    str | None,
    typer.Option("--plot-window", "--window", metavar="FROM:TO", help="Draw only this stretch of time, in seconds."),
]
EventsOption = Annotated[
    Path | None, typer.Option("--events", metavar="FILE", help="Write the event log for `pipesim replay` (JSONL).")
]
LogLevelOption = Annotated[
    str | None,
    typer.Option(
        "--log-level",
        metavar="LEVEL",
        envvar="PIPESIM_LOG",
        help="debug (each run), info (sessions, loading, links), warning (losses) or error. [default: warning]",
    ),
]
LogFileOption = Annotated[
    Path | None,
    typer.Option(
        "--log-file",
        metavar="FILE",
        envvar="PIPESIM_LOG_FILE",
        help="Append JSON lines of all processes here, from level info on by default; stderr keeps the warnings.",
    ),
]
RepeatsOption = Annotated[int, typer.Option(min=1, help="So many seeds: the scenario's, and those that follow it.")]

INTERRUPTED = 130
"""Exit status that shells expect after Ctrl-C."""
_ANY = 10_000  # as many columns as a table may want
PLOT_ENDINGS = (".png", ".pdf", ".svg")


def diagnostic(message: str) -> None:
    """Prints for people, on stderr: stdout is for results."""
    print(message, file=sys.stderr)


def load(path: Path, overrides: list[str] | None, seed: int | None) -> Scenario:
    """The scenario that the options describe. Raises BadInputError."""
    return load_scenario(path, [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])])


def check_outputs(*paths: Path | None, plot: Path | None = None) -> None:
    """Refuses what cannot be written before hours are spent on it; touches no file. Raises BadInputError."""
    if plot and plot.suffix.lower() not in PLOT_ENDINGS:
        raise BadInputError(f"{plot}: the plot cannot be written, use one of the endings {', '.join(PLOT_ENDINGS)}")
    for path in (*paths, plot):
        if path is None:
            continue
        place = path if path.exists() else path.parent
        if path.is_dir() or not os.access(place, os.W_OK):
            fix = "it is a folder" if path.is_dir() else f"{place} is not there or may not be written to"
            raise BadInputError(f"{path}: cannot be written, {fix}")


@contextlib.contextmanager
def writing(path: Path | None) -> Iterator[TextIO | None]:
    """An output file, if one is asked for. What was in it goes with the first write, not before.

    Raises BadInputError at once if it plainly cannot be written, PipesimError if a write fails.
    """
    if path is None:
        yield None
        return
    check_outputs(path)
    with io.TextIOWrapper(_OutputFile(path), encoding="utf-8") as stream:
        yield stream


class _OutputFile(io.BufferedIOBase):
    """Opened with the first write; failures are the project's own errors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    @property
    def name(self) -> str:
        return str(self._path)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with failures(self.name):
            if self._file is None:
                self._file = self._path.open("wb")
            return self._file.write(data)

    def flush(self) -> None:
        if self._file:
            with failures(self.name):
                self._file.flush()

    def close(self) -> None:
        file, self._file = self._file, None
        super().close()
        if file:
            with failures(self.name):
                file.close()


@contextlib.contextmanager
def failures(name: str) -> Iterator[None]:
    """Raises PipesimError, with the file's name, where writing it fails."""
    try:
        yield
    except OSError as problem:
        raise PipesimError(f"{name}: cannot be written ({problem.strerror})") from None


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Printing a result on stdout: it is out at the end, or PipesimError. A reader that left is click's to handle."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as problem:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again at its end
        raise PipesimError(f"stdout: cannot be written ({problem.strerror})") from None


def result(
    summary: Summary,
    text: str | None = None,
    stages: Sequence[StageSummary] = (),
    bound: "Bound | None" = None,
    lossy: str | None = None,
) -> dict[str, Any]:
    """The object that ``--json`` prints; ``text``, ``lossy`` only for real runs, ``stages``, ``bound`` only for
    simulated ones."""
    shown: dict[str, Any] = {"policy": summary.policy, "seed": summary.seed, "tokens": list(summary.tokens)}
    if text is not None:
        shown["text"] = text
    if lossy is not None:
        shown["lossy"] = lossy
    shown["metrics"] = summary.metrics.as_dict()
    if stages:
        shown["stages"] = [dataclasses.asdict(stage) for stage in stages]
    if bound is not None:
        shown["bound"] = bound.as_dict(summary.metrics.e2e_s)
    if summary.pace:
        shown["pace"] = summary.pace.as_dict()
    return shown


def report(
    summary: Summary,
    trace: Trace | None,
    *,
    as_json: bool,
    trace_file: Path | None,
    plot_file: Path | None,
    text: str | None = None,
    stages: Sequence[StageSummary] = (),
    bound: "Bound | None" = None,
    window: tuple[float, float] | None = None,
    lossy: str | None = None,
) -> None:
    """Shows the result and writes the files that were asked for; exits with status 1 unless all tokens are there.

    Files need the ``trace``.
    """
    with printing():
        if as_json:
            print(json.dumps(result(summary, text, stages, bound, lossy), allow_nan=False))
        else:
            if summary.pace is None or summary.pace.kept:
                show(metrics_table(summary, bound))
            if stages:
                show(stages_table(stages))
            if summary.pace:
                show(pace_table(summary.pace))
    if trace:
        write_files(trace, trace_file, plot_file, window)
    check_pace(summary.pace)
    fail([problem for problem in [early_end(summary)] if problem])


def show(table: Table, whole: bool = False) -> None:
    """Prints a table on stdout. Only a terminal that is too narrow cuts it, and not if it is to be ``whole``."""
    console = Console()
    if whole or not sys.stdout.isatty():
        console.width = max(console.width, console.measure(table, options=console.options.update(width=_ANY)).maximum)
    console.print(table)


def pace_table(pace: Pace) -> Table:
    """How well an emulated cluster kept its times."""
    table = Table(title="emulation: lateness of what was due", box=box.SIMPLE_HEAD)
    for heading in ("part", "events", "asked ms", "got ms", "late p50", "p95", "max ms", "overruns"):
        table.add_column(heading, justify="left" if heading == "part" else "right", no_wrap=True)
    for part in pace.parts:
        spans = ["-" if ms is None else f"{ms:.2f}" for ms in (part.requested_ms, part.achieved_ms)]
        late = [f"{ms:.2f}" for ms in part.late_ms]
        table.add_row(part.part, str(part.events), *spans, *late, f"{part.overruns:.1%}")
    return table


def check_pace(pace: Pace | None) -> None:
    """Ends the command with status 1 if an emulated cluster could not keep its pace: its figures would mean nothing."""
    if pace and not pace.kept:
        for problem in pace.problems:
            diagnostic(f"  {problem}")
        fail(
            [
                "this machine could not keep the emulated cluster's pace, figures would mean nothing: use a smaller "
                "execution.stand_in, fewer stages, or a faster machine"
            ]
        )


def write_files(
    trace: Trace, trace_file: Path | None, plot_file: Path | None, window: tuple[float, float] | None = None
) -> None:
    """Writes the timeline and draws it, or ``window`` of it, as far as that was asked for."""
    with writing(trace_file) as stream:
        if stream:
            write_perfetto(trace, stream)
    if plot_file:
        plot(trace, plot_file, window)


def early_end(summary: Summary) -> str | None:
    """What is wrong with a generation that did not bring all its tokens."""
    if summary.complete:
        return None
    return f"the generation ended early, after {len(summary.tokens)} tokens ({summary.finish_reason})"


def fail(problems: Sequence[str]) -> None:
    """Shows what is wrong; exits with status 1 if anything is."""
    for problem in problems:
        diagnostic(f"error: {problem}")
    if problems:
        raise typer.Exit(1)


def parse_window(text: str | None) -> tuple[float, float] | None:
    """The stretch of time that ``FROM:TO`` names, in seconds. Raises BadInputError."""
    if text is None:
        return None
    try:
        start, end = map(float, text.split(":"))
    except ValueError:
        start = end = 0.0
    if not 0 <= start < end < math.inf:
        raise BadInputError(f"--plot-window {text}: give two times in seconds, the earlier one first, e.g. 0.5:2")
    return start, end


def plot(trace: Trace, path: Path, window: tuple[float, float] | None = None) -> None:
    """Draws the timeline. Raises BadInputError for a file name that cannot be right, PipesimError if writing fails."""
    from analysis.plots import plot_timeline  # drawing libraries take a second to load

    check_outputs(plot=path)
    with failures(str(path)):
        plot_timeline(trace, path, window)


def metrics_table(summary: Summary, bound: "Bound | None" = None) -> Table:
    """The figures for people."""
    metrics, title = summary.metrics, f"{summary.policy}, seed {summary.seed}: {len(summary.tokens)} tokens"
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")

    def add(name: str, value: float | None, form: str, unit: str = "") -> None:
        table.add_row(name, "-" if value is None else f"{value:{form}}{unit}")

    add("speed", metrics.tokens_per_second, ".2f", " tokens/s")
    add("time to first token", metrics.ttft_s, ".3f", " s")
    if metrics.itl_s:
        itl = metrics.itl_s
        times = " / ".join(f"{1e3 * value:.1f}" for value in (itl.mean, itl.p50, itl.p95, itl.p99))
        table.add_row("gap between tokens, mean / p50 / p95 / p99", f"{times} ms")
    if metrics.latency_breakdown_s:
        table.add_row("first token, spent on", _shares(metrics.latency_breakdown_s.ttft))
        if metrics.latency_breakdown_s.itl:
            table.add_row("mean gap, spent on", _shares(metrics.latency_breakdown_s.itl))
    add("end to end", metrics.e2e_s, ".3f", " s")
    if bound is not None and metrics.e2e_s:
        table.add_row("of what is possible", f"{bound.fraction(metrics.e2e_s):.0%} of the clairvoyant bound")
    add("acceptance rate", metrics.acceptance_rate, ".1%")
    table.add_row("stage utilization", " ".join(f"{value:.0%}" for value in metrics.stage_utilization))
    add("bubbles", metrics.bubble_fraction, ".1%")
    runs = metrics.runs
    table.add_row(
        "runs",
        f"{runs.submitted}: {runs.accepted} accepted, {runs.rejected} rejected, "
        f"{runs.cancelled} cancelled, {runs.drained} drained",
    )
    if metrics.wasted_compute_fraction:
        add("wasted compute", metrics.wasted_compute_fraction.total, ".1%")
    add("sent over links", metrics.link_bytes / 1e6, ".2f", " MB")
    add("drafted tokens", metrics.draft_tokens, "d")
    return table


def _shares(times: LatencyShares) -> str:
    """The parts of a time in milliseconds, the largest first, without those that round to nothing."""
    parts = sorted(((seconds * 1e3, name) for name, seconds in dataclasses.asdict(times).items()), reverse=True)
    return " + ".join(f"{ms:.1f} {name}" for ms, name in parts if ms >= 0.05) + " ms"


def stages_table(stages: Sequence[StageSummary]) -> Table:
    """What the stages are, for people; equal neighbours share a row."""
    table = Table(title=f"stages; c: cost slope of micro-batches, by {stages[0].slope_rows} rows")
    table.add_column("stage", no_wrap=True)
    for name in ("layers", "device", "memory", "one row", "c"):
        table.add_column(name, justify="right", no_wrap=True)
    for figures, group in groupby(stages, lambda stage: dataclasses.replace(stage, name="")):
        names = [stage.name for stage in group]
        table.add_row(
            names[0] + (f"-{names[-1].rpartition(' ')[2]}" if len(names) > 1 else ""),
            str(figures.layers),
            figures.device or "its own",
            "-" if figures.memory_bytes is None else f"{figures.memory_bytes / 2**30:.2f} GiB",
            f"{figures.run_ms:.2f} ms",
            f"{figures.slope_c:.3f}",
        )
    return table
