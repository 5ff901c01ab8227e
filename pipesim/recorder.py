"""Sits between a driver, simulated or real, and its scheduler, and writes down what passes."""

from collections.abc import Sequence
from typing import TextIO

from pipesim.errors import InvariantError
from pipesim.event_log import EventLogWriter
from pipesim.scheduling.commands import (
    Command,
    EmitTokens,
    EndRun,
    FinishGeneration,
    FinishReason,
    Outcome,
    ReleaseSession,
    SubmitRun,
)
from pipesim.scheduling.events import Event, GenerationStarted, RunReturned
from pipesim.scheduling.runs import Run
from pipesim.scheduling.scheduler import Scheduler
from pipesim.trace import DraftSpan, Emission, RunRecord, StageSpan, Trace


class Recorder:
    """Passes events on to ``scheduler`` and fills a trace from events and commands.

    The driver adds what only it can know: stage and drafter spans, bytes on links. Rows are kept as plain tuples and
    become dataclasses at the end, because this code runs once per simulated event. ``now`` is the driver's own clock
    in seconds; the first event is the trace's time zero.
    """

    def __init__(self, scheduler: Scheduler, seed: int, stages: Sequence[str], events: TextIO | None = None) -> None:
        self.scheduler = scheduler
        self._seed = seed
        self._stages = tuple(stages)
        self._log = EventLogWriter(events, scheduler, seed) if events else None
        self._started: float | None = None
        self._prompt_tokens = 0
        self._submitted: dict[int, tuple[Run, float]] = {}
        self._returned: dict[int, float] = {}
        self._ended: dict[int, tuple[Outcome, int]] = {}
        self._emissions: list[tuple[float, int, tuple[int, ...]]] = []
        self._spans: list[tuple[int, int, float, float, bool]] = []
        self._drafts: list[tuple[int, float, float, int]] = []
        self._link_bytes: dict[str, int] = {}
        self._reason: FinishReason | None = None
        self._finished: float | None = None
        self._drained: float | None = None

    def handle(self, event: Event, now: float) -> list[Command]:
        """What ``Scheduler.handle`` answers."""
        if self._started is None:
            self._started = now
        kind = type(event)
        if kind is RunReturned:
            self._returned[event.run_id] = now  # type: ignore[union-attr]
        elif kind is GenerationStarted:
            self._prompt_tokens = len(event.prompt)  # type: ignore[union-attr]
        commands = self.scheduler.handle(event, now)
        if self._log:
            self._log.write(now, event, commands)
        for command in commands:
            self._note(command, now)
        return commands

    def _note(self, command: Command, now: float) -> None:
        match command:
            case SubmitRun(run):
                self._submitted[run.run_id] = (run, now)
            case EndRun(run_id, outcome, useful_rows):
                if run_id in self._ended or run_id not in self._submitted:
                    raise InvariantError(f"run {run_id} ended twice or was never submitted (I1)")
                self._ended[run_id] = (outcome, useful_rows)
            case EmitTokens(position, tokens):
                self._emissions.append((now, position, tokens))
            case FinishGeneration(reason):
                self._reason, self._finished = reason, now
            case ReleaseSession():
                if lost := self._submitted.keys() - self._ended.keys():
                    raise InvariantError(f"the session is over, but runs {sorted(lost)} have not ended (I1)")
                self._drained = now

    def stage_span(self, stage: int, run_id: int, start: float, end: float, void: bool) -> None:
        """A run left a stage; times on the driver's clock."""
        self._spans.append((stage, run_id, start, end, void))

    def draft_span(self, request_id: int, start: float, end: float, tokens: int) -> None:
        """The drafter answered (or abandoned, ``tokens=0``) a request; times on the driver's clock."""
        self._drafts.append((request_id, start, end, tokens))

    def link_sent(self, link: str, size_bytes: int) -> None:
        """Adds to the bytes that were sent over a link."""
        self._link_bytes[link] = self._link_bytes.get(link, 0) + size_bytes

    def trace(self) -> Trace:
        """All that was recorded so far."""
        zero = self._started or 0.0

        def since(time: float | None) -> float | None:
            return None if time is None else time - zero

        return Trace(
            policy=self.scheduler.policy.name,
            seed=self._seed,
            stages=self._stages,
            prompt_tokens=self._prompt_tokens,
            finish_reason=self._reason,
            finished_s=since(self._finished),
            drained_s=since(self._drained),
            link_bytes=dict(self._link_bytes),
            drafted_verified=self.scheduler.statistics.drafted_verified,
            drafted_accepted=self.scheduler.statistics.drafted_accepted,
            spans=tuple(StageSpan(s, run, start - zero, end - zero, void) for s, run, start, end, void in self._spans),
            drafts=tuple(DraftSpan(r, start - zero, end - zero, n) for r, start, end, n in self._drafts),
            runs=tuple(
                RunRecord(
                    run_id,
                    run.kind,
                    run.rows,
                    submitted - zero,
                    since(self._returned.get(run_id)),
                    *self._ended.get(run_id, (None, 0)),
                )
                for run_id, (run, submitted) in self._submitted.items()
            ),
            emissions=tuple(Emission(time - zero, position, tokens) for time, position, tokens in self._emissions),
        )
