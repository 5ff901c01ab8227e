"""Real executors: found through the entry point ``pipesim.executors``, so that pipesim never imports them otherwise."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, TextIO

from pipesim.acceptance_trace import AcceptanceTrace
from pipesim.errors import BadInputError
from pipesim.scenario import Model, Scenario
from pipesim.trace import Trace

GROUP = "pipesim.executors"


@dataclass(frozen=True, slots=True)
class RealResult:
    """One real generation: its text, without special tokens, what was recorded of it, and what of its drafter."""

    text: str
    trace: Trace
    acceptance: AcceptanceTrace | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Handed over with each piece of text: tokens so far, and the acceptance rate so far (None without drafts)."""

    text: str
    tokens: int
    acceptance_rate: float | None


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured on an otherwise idle pipeline, all medians, before the runs to be predicted.

    Attributes:
        rows_ms: per stage, the time of a run by its number of rows.
        prefill_row_ms: per stage, the time of one prompt row in a prefill run.
        link_ms: one hop: from the end of a run on one stage to its start on the next.
        head_ms: what the head takes for one event.
        level_ms: what the drafter takes for one level of a tree.
        draft_prefill_row_ms: what the drafter takes for one prompt token before its first draft.
        acceptance: the text that plain decoding gave, and the drafter's candidates all along it.
    """

    rows_ms: tuple[Mapping[int, float], ...]
    prefill_row_ms: tuple[float, ...]
    link_ms: float
    head_ms: float
    level_ms: float
    draft_prefill_row_ms: float
    acceptance: AcceptanceTrace


@dataclass(frozen=True, slots=True)
class Measurement:
    """What ``compare`` needs: the probe, taken first, and then the scenario's own runs."""

    probe: Probe
    runs: tuple[RealResult, ...]


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
    ) -> RealResult:
        """Runs a scenario for real; ``on_text`` hears text as it is committed. Writes the event log to ``events``.

        ``record_acceptance``: afterwards, ask the drafter for its candidates all along the text.
        """

    def measure(
        self, scenario: Scenario, repeats: int, logs: Path, on_text: Callable[[Progress], None] | None = None
    ) -> Measurement:
        """Probes a pipeline, then runs the scenario ``repeats`` times; leaves one event log per run in ``logs``.

        ``on_text`` hears the first run's text as it is committed.
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
