"""The real driver of a scheduler: carries out its commands on a pipeline, and feeds it what happens, one at a time."""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from backends.control import DraftOrder, DraftReply, EndText, ExtendText, Planted, StartText, TraceReply
from backends.emulation import PacedHead
from backends.frames import Frame, Hop, OpenFrame, ReleaseFrame, ResultFrame, RunFrame
from backends.logs import event
from backends.node import Node
from backends.pacing import LEAD_S, HeadPace
from backends.pipeline import DrafterBack, Pipeline
from backends.sampling import Sampling
from pipesim.calibration.observations import HeadSample
from pipesim.errors import InvariantError, PipesimError, StageFailedError
from pipesim.recorder import Observer
from pipesim.scheduling.commands import (
    CancelRuns,
    Command,
    EmitTokens,
    ReleaseSession,
    RequestDraft,
    SubmitRun,
)
from pipesim.scheduling.events import (
    DraftReturned,
    Event,
    GenerationStarted,
    PipelineRestored,
    RunReturned,
    StageLost,
    StopStringMet,
)
from pipesim.scheduling.tree import DraftTree

_logger = logging.getLogger(__name__)
_NO_DRAFT = DraftTree()
_URGENT = (SubmitRun, CancelRuns)  # stages wait for these: users and drafter hear the news after them


class Head:
    """One generation on ``pipeline``. A pipeline serves one head after another, as long as each comes to its end.

    ``on_tokens`` hears committed tokens at once. It answers None, or after how many tokens of the generation the text
    has come to a stop string. ``emulated``: the generation keeps to the times of another cluster, whose parts the
    pipeline's nodes were told. ``handling`` gathers the processor time that each event took to handle.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        observer: Observer,
        on_tokens: Callable[[tuple[int, ...]], int | None],
        emulated: PacedHead | None = None,
        handling: list[HeadSample] | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._observer = observer
        self._on_tokens = on_tokens
        self._drafts = pipeline.drafter is not None and observer.scheduler.policy.limits.nodes > 0
        self._drafter: Node | None = None  # the one that knows our text
        self._session = pipeline.new_session()
        self._sampling = Sampling()
        self._planted: Planted | None = None
        self._names = ["head", *(f"stage {index}" for index in range(len(pipeline.stages))), "head"]
        self._due: deque[Event] = deque()  # what happened to us without the inbox
        self._attempts = 0  # restorations since the last token
        self._drafter_attempts = 0  # new drafters since the last draft
        self._released = False
        self._handling = handling
        self._emulated = emulated
        self._pace: HeadPace | None = None
        self._stopped_after: int | None = None

    async def generate(self, started: GenerationStarted, sampling: Sampling, planted: Planted | None = None) -> None:
        """Returns when the user has all tokens, all runs are home, and the stages have forgotten the session.

        ``planted`` is what a planted drafter needs to know. The clock is ``time.monotonic()``. A lost stage is replaced
        and the text prefilled; a lost drafter is replaced meanwhile, or done without.

        Raises:
            BadInputError: the generation cannot be started as asked.
            StageFailedError: a stage or the drafter was lost, and cannot be replaced; the pipeline is of no use any
                more.
        """
        pipeline = self._pipeline
        self._sampling, self._planted = sampling, planted
        if pipeline.failure:  # it broke after the last generation had all its tokens
            await self._restore(pipeline.failure)
            self._session = pipeline.renewed(self._session, epoch=0)
        if pipeline.drafter and pipeline.drafter.failure:
            self._lose_drafter(pipeline.drafter.failure)
        try:
            await self._run(started)
        finally:
            pipeline.forget(self._session)

    async def _run(self, started: GenerationStarted) -> None:
        submitted = time.monotonic() + (LEAD_S if self._emulated else 0.0)
        if self._emulated:
            self._pace = HeadPace(self._emulated, self._pipeline.inbox(self._session), submitted)
        commands = self._observer.handle(started, submitted)
        self._open()
        self._tell_drafter()
        if self._pace:
            await self._pace.until_start()
        self._carry_out(commands)
        while not self._released:
            happened = self._due.popleft() if self._due else await self._next_event()
            if happened is None:
                continue
            begun = time.thread_time()
            self._carry_out(self._observer.handle(happened, time.monotonic()))
            if self._handling is not None:
                self._handling.append(HeadSample(isinstance(happened, DraftReturned), time.thread_time() - begun))
            if isinstance(happened, StageLost):
                await self._recover()
        if self._pace:
            self._observer.paced(self._pace.samples)
        if self._drafts:
            self._order(EndText(self._session.number))

    async def _next_event(self) -> Event | None:
        inbox = self._pipeline.inbox(self._session)
        news = await (self._pace.next() if self._pace else inbox.get())
        if isinstance(news, PipesimError):
            return self._note_loss(news)
        what, size = news
        if isinstance(what, DrafterBack):
            self._tell_drafter()
            return None
        if isinstance(what, TraceReply):
            raise InvariantError("the drafter answered a trace request of an earlier session")
        return self._note_draft(what, size) if isinstance(what, DraftReply) else self._note_frame(what, size)

    # -- commands ------------------------------------------------------------------------------------------------------

    def _carry_out(self, commands: list[Command]) -> None:
        for command in sorted(commands, key=lambda one: not isinstance(one, _URGENT)):
            match command:
                case SubmitRun(run):
                    self._log(logging.DEBUG, "run submitted", run=run.run_id, kind=run.kind, rows=run.rows)
                    hops = (self._pace.model.submit(run),) if self._pace else ()
                    self._sent(0, self._pipeline.send(RunFrame(self._session, run, hops=hops)), *hops)
                case RequestDraft():
                    hop = self._pace.model.request(command) if self._pace else None
                    self._order(DraftOrder(self._session.number, command, hop))
                case CancelRuns(run_ids):
                    self._log(logging.DEBUG, "runs cancelled", runs=run_ids)
                    calls = self._pace.model.cancel(len(run_ids)) if self._pace else []
                    size = self._pipeline.cancel(self._session, run_ids, calls)
                    for stage in self._names[1:-1]:
                        self._observer.link_sent(f"head to {stage} (control)", calls[0].size if calls else size)
                case EmitTokens(_, tokens):
                    self._attempts = 0
                    self._log(logging.DEBUG, "tokens committed", tokens=tokens)
                    self._stop_after(self._on_tokens(tokens))
                    if self._drafts:
                        self._order(ExtendText(self._session.number, tokens))
                case ReleaseSession():
                    self._log(logging.INFO, "session over")
                    self._sent(0, self._pipeline.send(ReleaseFrame(self._session)))

    def _open(self) -> None:
        scheduler = self._observer.scheduler
        origins = None
        if self._pace:
            origins = tuple(self._pace.origin + stage.clock_offset for stage in self._pipeline.stages)
        opening = OpenFrame(self._session, scheduler.kv_cells, scheduler.sequences, self._sampling, origins)
        self._log(logging.INFO, "session begins", kv_cells=scheduler.kv_cells, text=scheduler.generation.frontier)
        self._sent(0, self._pipeline.send(opening))

    def _stop_after(self, tokens: int | None) -> None:
        if tokens is not None and self._stopped_after is None:
            self._stopped_after = tokens
            self._due.append(StopStringMet(tokens))

    def _tell_drafter(self) -> None:
        """Tells a drafter that does not know it yet the text so far."""
        drafter = self._pipeline.drafter
        if self._drafts and drafter and drafter is not self._drafter and drafter.watched:
            self._drafter = drafter
            text = tuple(self._observer.scheduler.generation.text)
            origin = self._pace.origin + drafter.clock_offset if self._pace else None
            self._order(StartText(self._session.number, text, self._sampling, self._planted, origin))

    def _order(self, message: StartText | ExtendText | DraftOrder | EndText) -> None:
        if not self._drafts:
            raise InvariantError("the policy asks for drafts, but the pipeline was started without a drafter")
        if self._drafter and not self._drafter.failure:
            size = self._pipeline.order(message)
            if self._pace:  # the model's drafter hears of new text with requests only
                size = message.hop.size if isinstance(message, DraftOrder) and message.hop else 0
            self._observer.link_sent("head to drafter", size)
        elif isinstance(message, DraftOrder):
            self._due.append(DraftReturned(message.request.request_id, _NO_DRAFT))

    # -- losses --------------------------------------------------------------------------------------------------------

    def _note_loss(self, error: PipesimError) -> Event | None:
        """What an error in the inbox means: a stage is lost, or the drafter, or it is an old story."""
        pipeline = self._pipeline
        restored_without_us = self._session.token != pipeline.token
        if pipeline.failure or restored_without_us:
            return StageLost(pipeline.broken_at, str(pipeline.failure or error))
        if pipeline.drafter and error is pipeline.drafter.failure:
            self._lose_drafter(error)
            waiting = self._observer.scheduler.generation.draft_id
            return None if waiting is None else DraftReturned(waiting, _NO_DRAFT)
        return None

    def _lose_drafter(self, error: PipesimError) -> None:
        """Has it replaced, unless that was tried too often since the last draft. Raises ``error`` without recovery."""
        if not self._pipeline.attempts:
            raise error
        if self._drafter_attempts < self._pipeline.attempts:
            self._drafter_attempts += 1
            self._log(logging.WARNING, f"{error}; another one is started, without drafts until then")
            self._pipeline.replace_drafter()
        else:
            self._log(logging.WARNING, f"{error}; no more drafts: the text goes on without speculation")

    async def _recover(self) -> None:
        """Goes on with the same text, if it is not complete, on a pipeline that forgot everything."""
        pipeline, scheduler = self._pipeline, self._observer.scheduler
        if scheduler.released:  # no frame will tell us: stages that are reset forget the session by themselves
            self._released = True
            return
        if pipeline.failure:  # otherwise another session's head was faster
            await self._restore(pipeline.failure)
        self._session = pipeline.renewed(self._session, scheduler.generation.epoch + 1)
        self._open()
        if self._pace:
            self._pace.catch_up()
        self._due.append(PipelineRestored())

    async def _restore(self, error: PipesimError) -> None:
        """Repairs the pipeline. Raises what broke it, once that was tried often enough, or if it is no use."""
        pipeline = self._pipeline
        while isinstance(error, StageFailedError) and self._attempts < pipeline.attempts:
            self._attempts += 1
            attempt = f"attempt {self._attempts} of {pipeline.attempts}"
            self._log(logging.WARNING, f"{error}; restoring the pipeline, {attempt}")
            try:
                await pipeline.restore(error)
                return
            except StageFailedError as again:
                error = again
        raise error

    # -- events --------------------------------------------------------------------------------------------------------

    def _note_draft(self, reply: DraftReply, size: int) -> Event | None:
        if reply.session != self._session.number or not self._drafter:
            return None  # a straggler of the last generation
        if reply.tree is not None:
            self._drafter_attempts = 0
        offset = self._drafter.clock_offset
        tokens = len(reply.tree.tokens) if reply.tree else 0
        if self._pace:
            size = sum(hop.size for hop in reply.hops[1:])
        self._observer.link_sent("drafter to head", size)
        self._observer.draft_span(reply.request_id, reply.start - offset, reply.end - offset, tokens)
        return DraftReturned(reply.request_id, reply.tree) if reply.tree is not None else None

    def _note_frame(self, frame: Frame, size: int) -> Event | None:
        if frame.session.token != self._session.token:
            return None  # it was on its way when the pipeline broke
        if frame.session != self._session:
            raise InvariantError(f"a frame of session {frame.session.number} came home in {self._session.number}")
        hops = frame.hops if isinstance(frame, ResultFrame) else ()
        self._sent(len(self._names) - 2, size, *hops[-1:])
        if isinstance(frame, ReleaseFrame):
            self._released = True
        if not isinstance(frame, ResultFrame):
            return None
        if [stamp.stage for stamp in frame.stamps] != list(range(len(self._pipeline.stages))):
            raise InvariantError(f"run {frame.run_id} came home with the stamps {frame.stamps}: not one per stage")
        for stage, stamp in zip(self._pipeline.stages, frame.stamps, strict=True):
            offset = stage.clock_offset
            stage.last_run = frame.run_id
            self._observer.stage_span(stamp.stage, frame.run_id, stamp.start - offset, stamp.end - offset, stamp.void)
            if stamp.stage:
                self._sent(stamp.stage, stamp.received_bytes, *hops[stamp.stage : stamp.stage + 1])
        self._log(logging.DEBUG, "run returned", run=frame.run_id, void=frame.predictions is None)
        return RunReturned(frame.run_id, frame.predictions)

    def _log(self, level: int, what: str, **fields: Any) -> None:
        event(_logger, level, what, session=self._session.number, epoch=self._session.epoch, **fields)

    def _sent(self, hop: int, size: int, *modelled: Hop) -> None:
        """Counts a frame's bytes; in an emulated cluster those of the model, which knows of runs alone."""
        if self._pace:
            size = sum(one.size for one in modelled)
        self._observer.link_sent(f"{self._names[hop]} to {self._names[hop + 1]}", size)
