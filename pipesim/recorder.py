"""Sits between a driver, simulated or real, and its scheduler, and sees what passes."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from typing import TextIO

from pipesim.errors import InvariantError
from pipesim.event_log import EventLogWriter
from pipesim.metrics import Metrics, Tally
from pipesim.pace import judge
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
from pipesim.scheduling.events import Event, GenerationStarted, RunReturned, StopStringMet
from pipesim.scheduling.runs import Run, RunKind
from pipesim.scheduling.scheduler import Scheduler
from pipesim.summary import Summary
from pipesim.trace import DraftSpan, Emission, Latency, PaceSample, RunRecord, StageSpan, Trace


class Observer(ABC):
    """Passes events on to ``scheduler``, writes the event log, and sees to it that every run ends once (I1).

    A ``Recorder`` keeps all that passes, a ``Meter`` only sums it up, a ``TextMeter`` has the text beside. The driver
    adds what only it can know: stage and drafter spans, bytes on links, latencies. Times are on the driver's own clock,
    in ticks of ``1 / ticks_per_s``; the first event is time zero.
    """

    def __init__(self, scheduler: Scheduler, seed: int, events: TextIO | None = None, ticks_per_s: float = 1) -> None:
        self.scheduler = scheduler
        self._seed = seed
        self._log = EventLogWriter(events, scheduler, seed) if events else None
        self._ticks_per_s = ticks_per_s
        self._started: float | None = None
        self._prompt_tokens = 0
        self._open: set[int] = set()  # runs that have not ended
        self._link_bytes: dict[str, int] = {}
        self._reason: FinishReason | None = None
        self._finished: float | None = None
        self._drained: float | None = None
        self._pace: tuple[PaceSample, ...] = ()

    def handle(self, event: Event, now: float) -> list[Command]:
        """What ``Scheduler.handle`` answers."""
        if self._started is None:
            self._started = now
        if type(event) is RunReturned:
            self._returned(event.run_id, now)
        elif type(event) is GenerationStarted:
            self._prompt_tokens = len(event.prompt)
        elif type(event) is StopStringMet:
            self._reason = FinishReason.STOP  # though the length may have ended it at the same time
            self._cut(self._prompt_tokens + event.tokens)
        commands = self.scheduler.handle(event, now / self._ticks_per_s)
        if self._log:
            self._log.write(now / self._ticks_per_s, event, commands)
        for command in commands:
            kind = type(command)  # a match statement would cost more than all the rest
            if kind is SubmitRun:
                run: Run = command.run  # type: ignore[union-attr]
                self._open.add(run.run_id)
                self._submitted(run, now)
            elif kind is EndRun:
                self._end(command, now)  # type: ignore[arg-type]
            elif kind is EmitTokens:
                self._emitted(command, now)  # type: ignore[arg-type]
            elif kind is FinishGeneration:
                self._reason, self._finished = command.reason, now  # type: ignore[union-attr]
                self._all_emitted(now)
            elif kind is ReleaseSession:
                if self._open:
                    raise InvariantError(f"the session is over, but runs {sorted(self._open)} have not ended (I1)")
                self._drained = now
        return commands

    def _end(self, end: EndRun, now: float) -> None:
        if end.run_id not in self._open:
            raise InvariantError(f"run {end.run_id} ended twice or was never submitted (I1)")
        self._open.remove(end.run_id)
        self._ended(end, now)

    def link_sent(self, link: str, size_bytes: int) -> None:
        """Adds to the bytes that were sent over a link."""
        self._link_bytes[link] = self._link_bytes.get(link, 0) + size_bytes

    def paced(self, samples: Sequence[PaceSample]) -> None:
        """How well an emulated cluster kept its pace; its times count from the prompt."""
        self._pace = tuple(samples)

    @abstractmethod
    def stage_span(self, stage: int, run_id: int, start: float, end: float, void: bool) -> None:
        """A run left a stage."""

    @abstractmethod
    def draft_span(self, request_id: int, start: float, end: float, tokens: int) -> None:
        """The drafter answered (or abandoned, ``tokens=0``) a request."""

    @abstractmethod
    def latency(self, latency: Latency) -> None:
        """How the time until the newest emission was spent; from the first on or never."""

    @abstractmethod
    def _submitted(self, run: Run, now: float) -> None: ...

    @abstractmethod
    def _returned(self, run_id: int, now: float) -> None: ...

    @abstractmethod
    def _ended(self, end: EndRun, now: float) -> None: ...

    @abstractmethod
    def _emitted(self, emitted: EmitTokens, now: float) -> None: ...

    @abstractmethod
    def _all_emitted(self, now: float) -> None: ...

    def _cut(self, end: int) -> None:
        """What was emitted from position ``end`` on is no text."""
        raise InvariantError("a stop string was met where nobody keeps the text")


class Recorder(Observer):
    """Keeps everything for a trace. Rows are plain tuples until the end: this code runs once per simulated event."""

    def __init__(
        self,
        scheduler: Scheduler,
        seed: int,
        stages: Sequence[str],
        events: TextIO | None = None,
        ticks_per_s: float = 1,
    ) -> None:
        super().__init__(scheduler, seed, events, ticks_per_s)
        self._stages = tuple(stages)
        self._runs: list[tuple[int, RunKind, int, float]] = []
        self._returns: dict[int, float] = {}
        self._ends: dict[int, tuple[Outcome, int, float | None]] = {}  # with the time of a run that never returned
        self._emissions: list[tuple[float, EmitTokens]] = []
        self._latencies: list[Latency] = []
        self._spans: list[tuple[int, int, float, float, bool]] = []
        self._drafts: list[tuple[int, float, float, int]] = []

    def stage_span(self, stage: int, run_id: int, start: float, end: float, void: bool) -> None:
        """A run left a stage."""
        self._spans.append((stage, run_id, start, end, void))

    def draft_span(self, request_id: int, start: float, end: float, tokens: int) -> None:
        """The drafter answered (or abandoned, ``tokens=0``) a request."""
        self._drafts.append((request_id, start, end, tokens))

    def latency(self, latency: Latency) -> None:
        """How the time until the newest emission was spent; from the first on or never."""
        self._latencies.append(latency)

    def _submitted(self, run: Run, now: float) -> None:
        self._runs.append((run.run_id, run.kind, run.rows, now))

    def _returned(self, run_id: int, now: float) -> None:
        self._returns[run_id] = now

    def _ended(self, end: EndRun, now: float) -> None:
        self._ends[end.run_id] = (end.outcome, end.useful_rows, None if end.run_id in self._returns else now)

    def _emitted(self, emitted: EmitTokens, now: float) -> None:
        self._emissions.append((now, emitted))

    def _all_emitted(self, now: float) -> None:
        pass

    def _cut(self, end: int) -> None:
        self._emissions = [
            (now, EmitTokens(one.position, one.tokens[: end - one.position]))
            for now, one in self._emissions
            if one.position < end
        ]

    def trace(self) -> Trace:
        """All that was recorded so far."""
        zero, ticks_per_s = self._started or 0, self._ticks_per_s

        def at(time: float) -> float:
            return (time - zero) / ticks_per_s

        def since(time: float | None) -> float | None:
            return None if time is None else at(time)

        def record(run_id: int, kind: RunKind, rows: int, submitted: float) -> RunRecord:
            outcome, useful_rows, lost = self._ends.get(run_id, (None, 0, None))
            returned = since(self._returns.get(run_id))
            return RunRecord(run_id, kind, rows, at(submitted), returned, outcome, useful_rows, since(lost))

        latencies: Sequence[Latency | None] = self._latencies or [None] * len(self._emissions)
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
            spans=tuple(StageSpan(s, run, at(start), at(end), void) for s, run, start, end, void in self._spans),
            drafts=tuple(DraftSpan(request, at(start), at(end), n) for request, start, end, n in self._drafts),
            runs=tuple(record(*run) for run in self._runs),
            emissions=tuple(
                Emission(at(time), emitted.position, emitted.tokens, latency)
                for (time, emitted), latency in zip(self._emissions, latencies, strict=True)
            ),
            pace=self._pace,
        )


class Meter(Observer):
    """Sums up what passes and keeps no trace. Its driver's clock counts whole nanoseconds from 0."""

    def __init__(
        self, scheduler: Scheduler, seed: int, stages: int, events: TextIO | None = None, ticks_per_s: float = 1e9
    ) -> None:
        super().__init__(scheduler, seed, events, ticks_per_s)
        self._tally = Tally(stages)

    def stage_span(self, stage: int, run_id: int, start: float, end: float, void: bool) -> None:
        """A run left a stage."""
        self._tally.span(stage, run_id, start, end)

    def draft_span(self, request_id: int, start: float, end: float, tokens: int) -> None:
        """The drafter answered (or abandoned, ``tokens=0``) a request."""
        self._tally.draft_tokens += tokens

    def latency(self, latency: Latency) -> None:
        """How the time until the newest emission was spent; from the first on or never."""
        self._tally.latency(latency)

    def _submitted(self, run: Run, now: float) -> None:
        self._tally.submitted(run.run_id, run.kind, run.rows)

    def _returned(self, run_id: int, now: float) -> None:
        pass

    def _ended(self, end: EndRun, now: float) -> None:
        self._tally.ended(end.run_id, end.outcome, end.useful_rows)

    def _emitted(self, emitted: EmitTokens, now: float) -> None:
        self._tally.emitted(now, len(emitted.tokens))

    def _all_emitted(self, now: float) -> None:
        self._tally.end = now

    def metrics(self) -> Metrics:
        """The figures of the generation, as ``compute_metrics`` would derive them from its trace.

        Raises:
            InvariantError: it is not over, or ended before all its tokens were there.
        """
        if self._reason is None or self._reason is FinishReason.ABORTED:
            raise InvariantError(f"a generation that did not bring all its tokens has no figures ({self._reason})")
        statistics = self.scheduler.statistics
        return self._tally.metrics(
            statistics.drafted_verified, statistics.drafted_accepted, sum(self._link_bytes.values())
        )


class TextMeter(Meter):
    """Keeps the text beside the sums, for a driver whose clock counts seconds from anywhere: the real head.

    What grows with the text is 12 bytes per token.
    """

    def __init__(self, scheduler: Scheduler, seed: int, stages: int, events: TextIO | None = None) -> None:
        super().__init__(scheduler, seed, stages, events, ticks_per_s=1)
        self._text = array("i")

    def _ns(self, now: float) -> int:
        return round((now - (self._started or 0.0)) * 1e9)

    def stage_span(self, stage: int, run_id: int, start: float, end: float, void: bool) -> None:
        """A run left a stage."""
        super().stage_span(stage, run_id, self._ns(start), self._ns(end), void)

    def _emitted(self, emitted: EmitTokens, now: float) -> None:
        super()._emitted(emitted, self._ns(now))
        self._text.extend(emitted.tokens)

    def _all_emitted(self, now: float) -> None:
        super()._all_emitted(self._ns(now))

    def _cut(self, end: int) -> None:
        tokens = end - self._prompt_tokens
        del self._text[tokens:]
        self._tally.cut(tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The text so far, prompt excluded."""
        return tuple(self._text)

    def summary(self) -> Summary:
        """What ``summarise`` would make of the generation's trace.

        Raises:
            InvariantError: as :meth:`metrics`.
        """
        metrics, policy = self.metrics(), self.scheduler.policy.name
        return Summary(policy, self._seed, self.tokens, self._reason, metrics, judge(self._pace))
