"""The real driver of a scheduler: carries out its commands on a pipeline, and feeds it what happens, one at a time."""

import logging
import time
from collections.abc import Callable

from backends.control import DraftOrder, DraftReply, ExtendText, Planted, StartText, TraceReply
from backends.frames import Frame, OpenFrame, ReleaseFrame, ResultFrame, RunFrame, Session
from backends.pipeline import Pipeline
from backends.sampling import Sampling
from pipesim.errors import InvariantError, PipesimError
from pipesim.recorder import Recorder
from pipesim.scheduling.commands import (
    CancelRuns,
    Command,
    EmitTokens,
    ReleaseSession,
    RequestDraft,
    SubmitRun,
)
from pipesim.scheduling.events import DraftReturned, Event, GenerationStarted, RunReturned, StopStringMet

_log = logging.getLogger(__name__)


class Head:
    """One generation on ``pipeline``. A pipeline serves one head after another, as long as each comes to its end.

    ``on_tokens`` hears committed tokens at once. It answers None, or after how many tokens of the generation the text
    has come to a stop string.
    """

    def __init__(
        self, pipeline: Pipeline, recorder: Recorder, on_tokens: Callable[[tuple[int, ...]], int | None]
    ) -> None:
        self._pipeline = pipeline
        self._recorder = recorder
        self._on_tokens = on_tokens
        self._drafter = pipeline.drafter if recorder.scheduler.policy.limits.nodes else None
        self._session: Session = pipeline.new_session()
        self._names = ["head", *(f"stage {index}" for index in range(len(pipeline.stages))), "head"]
        self._released = False
        self._stopped_after: int | None = None
        self._stopped = False

    async def generate(self, started: GenerationStarted, sampling: Sampling, planted: Planted | None = None) -> None:
        """Returns when the user has all tokens, all runs are home, and the stages have forgotten the session.

        ``planted`` is what a planted drafter needs to know. The clock is ``time.monotonic()``.

        Raises:
            BadInputError: the generation cannot be started as asked.
            StageFailedError: a stage or the drafter died, hung or failed; the pipeline is of no use any more.
        """
        recorder, scheduler = self._recorder, self._recorder.scheduler
        commands = recorder.handle(started, time.monotonic())
        opening = OpenFrame(self._session, scheduler.kv_cells, scheduler.sequences, sampling)
        self._sent(0, self._pipeline.send(opening))
        if self._drafter:
            self._order(StartText(self._session.number, started.prompt, sampling, planted))
        self._carry_out(commands)
        while not self._released:
            news = await self._pipeline.inbox.get()
            if isinstance(news, PipesimError):
                raise news
            what, size = news
            if isinstance(what, TraceReply):
                raise InvariantError("the drafter answered a trace request of an earlier session")
            event = self._note_draft(what, size) if isinstance(what, DraftReply) else self._note_frame(what, size)
            if event:
                self._carry_out(recorder.handle(event, time.monotonic()))
            if self._stopped_after is not None and not self._stopped:
                self._stopped = True
                self._carry_out(recorder.handle(StopStringMet(self._stopped_after), time.monotonic()))

    # -- commands ------------------------------------------------------------------------------------------------------

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case SubmitRun(run):
                    _log.debug("submit run %d: %s, %d rows", run.run_id, run.kind, run.rows)
                    self._sent(0, self._pipeline.send(RunFrame(self._session, run)))
                case RequestDraft():
                    self._order(DraftOrder(command))
                case CancelRuns(run_ids):
                    _log.debug("cancel runs %s", run_ids)
                    size = self._pipeline.cancel(self._session, run_ids)
                    for stage in self._names[1:-1]:
                        self._recorder.link_sent(f"head to {stage} (control)", size)
                case EmitTokens(_, tokens):
                    self._stopped_after = self._on_tokens(tokens)
                    if self._drafter:
                        self._order(ExtendText(tokens))
                case ReleaseSession():
                    self._sent(0, self._pipeline.send(ReleaseFrame(self._session)))

    def _order(self, message: StartText | ExtendText | DraftOrder) -> None:
        if not self._drafter:
            raise InvariantError("the policy asks for drafts, but the pipeline was started without a drafter")
        self._recorder.link_sent("head to drafter", self._pipeline.order(message))

    # -- events --------------------------------------------------------------------------------------------------------

    def _note_draft(self, reply: DraftReply, size: int) -> Event | None:
        if reply.session != self._session.number or not self._drafter:
            return None  # a straggler of the last generation
        offset = self._drafter.clock_offset
        tokens = len(reply.tree.tokens) if reply.tree else 0
        self._recorder.link_sent("drafter to head", size)
        self._recorder.draft_span(reply.request_id, reply.start - offset, reply.end - offset, tokens)
        return DraftReturned(reply.request_id, reply.tree) if reply.tree is not None else None

    def _note_frame(self, frame: Frame, size: int) -> Event | None:
        if frame.session != self._session:
            raise InvariantError(f"a frame of session {frame.session.number} came home in {self._session.number}")
        self._sent(len(self._names) - 2, size)
        if isinstance(frame, ReleaseFrame):
            self._released = True
        if not isinstance(frame, ResultFrame):
            return None
        if [stamp.stage for stamp in frame.stamps] != list(range(len(self._pipeline.stages))):
            raise InvariantError(f"run {frame.run_id} came home with the stamps {frame.stamps}: not one per stage")
        for stage, stamp in zip(self._pipeline.stages, frame.stamps, strict=True):
            offset = stage.clock_offset
            stage.last_run = max(stage.last_run, frame.run_id)
            self._recorder.stage_span(stamp.stage, frame.run_id, stamp.start - offset, stamp.end - offset, stamp.void)
            if stamp.stage:
                self._sent(stamp.stage, stamp.received_bytes)
        return RunReturned(frame.run_id, frame.predictions)

    def _sent(self, hop: int, size: int) -> None:
        self._recorder.link_sent(f"{self._names[hop]} to {self._names[hop + 1]}", size)
