"""Real executors: found through the entry point ``pipesim.executors``, so that pipesim never imports them otherwise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, TextIO

from pipesim.acceptance_trace import AcceptanceTrace
from pipesim.calibration.observations import Observations
from pipesim.errors import BadInputError
from pipesim.scenario import Model, Scenario
from pipesim.summary import Summary
from pipesim.trace import Trace

GROUP = "pipesim.executors"


@dataclass(frozen=True, slots=True)
class RealResult:
    """One real generation: its text, without special tokens, its figures, and what else was asked for."""

    text: str
    summary: Summary
    trace: Trace | None = None
    acceptance: AcceptanceTrace | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Handed over with each piece of text: tokens so far, and the acceptance rate so far (None without drafts)."""

    text: str
    tokens: int
    acceptance_rate: float | None


@dataclass(frozen=True, slots=True)
class Observed:
    """What was measured on a running pipeline.

    Attributes:
        costs: of runs, links, head and drafter, in rounds.
        rounds: how many of them.
        here: for each stage, whether it shares the head's machine.
        cores: of that machine, as far as stages can use them at the same time; None where it has no stage.
        acceptance: the text that plain decoding gave, and the drafter's candidates all along it.
    """

    costs: Observations
    rounds: int
    here: tuple[bool, ...]
    cores: int | None
    acceptance: AcceptanceTrace

    @property
    def shared_by_all(self) -> int | None:
        """The cores, where no stage is elsewhere: only then floods tell contention."""
        return self.cores if all(self.here) else None


@dataclass(frozen=True, slots=True)
class Measurement:
    """What ``compare`` needs: measured costs (no rounds: none but the acceptance), and the scenario's own runs."""

    observed: Observed
    runs: tuple[Trace, ...]


class Executor(Protocol):
    """What the command line asks of an executor. All methods block; Ctrl-C leaves no process behind."""

    def describe(self, model: str, stages: int) -> tuple[Model, tuple[int, ...]]:
        """The model's section of a scenario, and a balanced number of layers for each of ``stages`` stages."""

    def execute(
        self,
        scenario: Scenario,
        events: TextIO | None = None,
        on_text: Callable[[Progress], None] | None = None,
        record_acceptance: bool = False,
        keep_trace: bool = False,
    ) -> RealResult:
        """Runs a scenario for real; ``on_text`` hears text as it is committed. Writes the event log to ``events``.

        ``record_acceptance``: afterwards, ask the drafter for its candidates all along the text. ``keep_trace``: keep
        what happened to each run; otherwise memory stays flat however long the text becomes.
        """

    def measure(
        self,
        scenario: Scenario,
        repeats: int,
        rounds: int,
        logs: Path,
        on_text: Callable[[Progress], None] | None = None,
    ) -> Measurement:
        """Measures costs in ``rounds``, spread between ``repeats`` runs of the scenario.

        Leaves one event log per run in ``logs``. ``on_text`` hears the first generation's text as it is committed.
        """

    def execute_all(
        self, scenarios: Sequence[Scenario], logs: Path, on_result: Callable[[int, RealResult], None]
    ) -> None:
        """Runs scenarios that differ in policy, acceptance and seed alone on one pipeline, one after the other.

        ``on_result`` hears of each by its index as soon as it is done; its event log is ``logs``/run-INDEX.jsonl.
        """

    def serve_stage(self, listen: str, device: str) -> None:
        """Serves heads at ``host:port`` until interrupted."""


def find_executor() -> Executor:
    """The installed executor.

    Raises:
        BadInputError: none is installed, or it lacks its libraries.
    """
    hint = 'real runs need more packages: install "pipesim[real]"'
    for entry_point in entry_points(group=GROUP):
        try:
            executor: Executor = entry_point.load()()
        except ImportError as problem:
            raise BadInputError(f"{hint} ({problem})") from problem
        return executor
    raise BadInputError(hint)
