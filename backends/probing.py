"""What things cost on a running pipeline, measured in scratch sessions while nothing else runs.

Everything is measured in rounds, each kind once per round: a slower minute of the machine hits all kinds alike. Rounds
may be spread between generations, since a pipeline keeps several sessions.
"""

import time
from dataclasses import dataclass

from backends.control import (
    DraftOrder,
    DraftReply,
    EndText,
    ExtendText,
    Planted,
    StartText,
    ToDrafter,
    TraceReply,
    TraceText,
)
from backends.frames import Frame, OpenFrame, ReleaseFrame, ResultFrame, RunFrame, Session, encode
from backends.pipeline import DrafterBack, Pipeline
from backends.sampling import Sampling
from pipesim.calibration import DraftSample, FloodSample, RunSample
from pipesim.errors import InvariantError, PipesimError, StageFailedError
from pipesim.scheduling.commands import RequestDraft
from pipesim.scheduling.runs import END, KvOperation, Run, RunKind, SequenceRemove
from pipesim.scheduling.tree import Candidate, Detour

ROWS = (*range(1, 9), 12, 16)
"""Of drafted runs. Kernels read weights once for a few rows, so their time has steps, at 6 to 7 rows for instance."""
LEVELS = (1, 2, 4, 8)
_FLOOD_ROWS = (1, 4, 8, 12)
"""Of runs that stages on one machine compute at once. With more rows weights are read more slowly, and cores disturb
each other less: all of them together tell whether the model of that holds (the residual ``floods``)."""
_FLOODS_PER_STAGE = 3

Drafts = tuple[tuple[tuple[Candidate, ...], ...], tuple[Detour, ...] | None]
"""A drafter's candidates for each token of a text, and its detours; see ``Drafter.trace`` and ``Drafter.detours``."""


@dataclass(frozen=True, slots=True)
class Text:
    """What the drafter needs to know of the text it is measured with."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    sampling: Sampling
    planted: Planted | None


class Prober:
    """Sends made-up runs down ``pipeline``, and requests to its drafter. ``text`` fills the rows."""

    def __init__(self, pipeline: Pipeline, text: Text, chunk: int) -> None:
        self.runs: list[RunSample] = []
        self.floods: list[FloodSample] = []
        self.drafts: list[DraftSample] = []
        self._pipeline = pipeline
        self._text = text
        self._tokens = (*text.prompt, *text.tokens)
        self._chunk = chunk
        self._prefilled: dict[int, Session] = {}  # context -> a session with so many cells in use
        self._scratch = pipeline.new_session()
        self._run_id = 0
        self._requests = 0
        self._round = 0
        self._flood_runs = _FLOODS_PER_STAGE * len(pipeline.stages) if len(pipeline.stages) > 1 else 0

    async def open(self) -> None:
        """Fills sessions with text as long as it is at the beginning, in the middle and at the end of a generation.

        Raises:
            StageFailedError: a stage failed.
        """
        prompt, whole = len(self._text.prompt), len(self._tokens)
        room = max(ROWS) + max(_FLOOD_ROWS) * self._flood_runs
        await self._through(OpenFrame(self._scratch, 2 * self._chunk + max(ROWS), 1, Sampling()))
        for context in sorted({prompt, (prompt + whole) // 2, whole}):
            session = self._prefilled[context] = self._pipeline.new_session()
            await self._through(OpenFrame(session, context + room, 1, Sampling()))
            for start in range(0, context, self._chunk):
                await self._send_alone(session, RunKind.PREFILL, start, min(self._chunk, context - start))

    async def measure_round(self) -> None:
        """Measures every kind once. The first round warms up: it does not count.

        Raises:
            StageFailedError: a stage, or the drafter, failed.
        """
        counts = self._round > 0
        runs, floods, drafts = [], [], []
        for context, session in self._prefilled.items():
            clear = (SequenceRemove(1, context, END),)
            for rows in ROWS:
                runs.append(await self._send_alone(session, RunKind.SPECULATIVE, context, rows, clear))
            runs.append(await self._send_alone(session, RunKind.SPECULATIVE, context, 4, clear, void=True))
        for rows in sorted({1, self._chunk // 4, self._chunk // 2, self._chunk} - {0}):
            clear = (SequenceRemove(1, 0, END),)
            runs.append(await self._send_alone(self._scratch, RunKind.PREFILL, 0, rows, clear))
        runs.append(await self._send_alone(self._scratch, RunKind.PREFILL, self._chunk, self._chunk))
        if self._flood_runs:
            floods = [await self._flood(rows) for rows in _FLOOD_ROWS]
        if self._pipeline.drafter:
            drafts = await self._measure_drafts()
        if counts:
            self.runs += runs
            self.floods += floods
            self.drafts += drafts
        self._round += 1

    async def close(self) -> None:
        """Gives the sessions back."""
        if self._pipeline.drafter:
            self._pipeline.order(EndText(self._scratch.number))
        for session in (self._scratch, *self._prefilled.values()):
            await self._through(ReleaseFrame(session))
            self._pipeline.forget(session)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _run(self, session: Session, kind: RunKind, start: int, rows: int, operations: tuple[KvOperation, ...]) -> Run:
        positions = tuple(range(start, start + rows))
        tokens = tuple(self._tokens[position % len(self._tokens)] for position in positions)
        unread = rows - 1 if kind is RunKind.PREFILL else 0
        self._run_id += 1
        return Run(self._run_id - 1, session.epoch, kind, tokens, positions, (1,) * rows, unread, operations)

    async def _send_alone(
        self,
        session: Session,
        kind: RunKind,
        start: int,
        rows: int,
        operations: tuple[KvOperation, ...] = (),
        void: bool = False,
    ) -> RunSample:
        run = self._run(session, kind, start, rows, operations)
        frame = RunFrame(session, run, void=void)
        submitted = time.monotonic()
        result = await self._through(frame)
        returned = time.monotonic()
        if not isinstance(result, ResultFrame) or result.run_id != run.run_id:
            raise InvariantError(f"run {run.run_id} was sent, {result} came home (I2)")
        offsets = [stage.clock_offset for stage in self._pipeline.stages]
        stamps = result.stamps
        starts = [*(stamp.start - offset for stamp, offset in zip(stamps, offsets, strict=True)), returned]
        ends = [submitted, *(stamp.end - offset for stamp, offset in zip(stamps, offsets, strict=True))]
        sizes = [*(stamp.received_bytes for stamp in stamps), len(encode(result))]
        return RunSample(
            round=self._round,
            kind=kind,
            rows=rows,
            context=sum(run.positions) / rows + 1,
            void=void,
            stages_s=tuple(stamp.end - stamp.start for stamp in stamps),
            hops=tuple((size, to - at) for size, to, at in zip(sizes, starts, ends, strict=True)),
        )

    async def _flood(self, rows: int) -> FloodSample:
        """Many runs at once, one behind the other in the text."""
        context, session = next(iter(self._prefilled.items()))
        count, last = self._flood_runs, -1
        submitted = time.monotonic()
        for number in range(count):
            clear = () if number else (SequenceRemove(1, context, END),)
            run = self._run(session, RunKind.SPECULATIVE, context + number * rows, rows, clear)
            self._pipeline.send(RunFrame(session, run))
            last = run.run_id
        while True:
            result = await self._next_frame(session)
            if isinstance(result, ResultFrame) and result.run_id == last:
                break
        seconds = time.monotonic() - submitted
        return FloodSample(self._round, rows, context + count * rows / 2, count, seconds)

    async def _through(self, frame: Frame) -> Frame:
        pipeline = self._pipeline
        if pipeline.failure or frame.session.token != pipeline.token:
            raise pipeline.failure or StageFailedError("a stage was lost while costs were probed: they are void")
        pipeline.send(frame)
        return await self._next_frame(frame.session)

    async def _next_frame(self, session: Session) -> Frame:
        while isinstance(what := await self._news(session), DraftReply | TraceReply):
            pass  # a straggler
        return what

    async def _news(self, session: Session) -> Frame | DraftReply | TraceReply:
        """What comes next. Raises the error that the pipeline or its drafter is lost by, not one that is repaired."""
        while True:
            news, drafter = await self._pipeline.inbox(session).get(), self._pipeline.drafter
            if isinstance(news, PipesimError):
                if news is self._pipeline.failure or (drafter and news is drafter.failure):
                    raise news
            elif not isinstance(news[0], DrafterBack):
                return news[0]

    # -- the drafter ---------------------------------------------------------------------------------------------------

    async def _measure_drafts(self) -> list[DraftSample]:
        """Chains of all lengths, after the prompt and after the whole text."""
        text, drafts = self._text, []
        await self._pipeline.drafter_at_work()
        self._pipeline.order(StartText(self._scratch.number, text.prompt, text.sampling, text.planted))
        before = 0
        for context in (len(text.prompt), len(self._tokens) - max(LEVELS)):
            if context <= before:
                continue
            drafts.append(await self._draft(context, LEVELS[-1], before))
            drafts += [await self._draft(context, levels, context) for levels in LEVELS]
            before = context
        return drafts

    async def _draft(self, context: int, levels: int, before: int) -> DraftSample:
        """As in a generation: stages have just computed, so that caches are cold, and the drafter hears of new text."""
        start, session = next(iter(self._prefilled.items()))
        await self._send_alone(session, RunKind.SPECULATIVE, start, 1, (SequenceRemove(1, start, END),))
        new = context - before
        self._requests += 1
        request = RequestDraft(self._requests, context, (), levels, 1, 0.0, 1.0)
        asked = time.monotonic()
        self._pipeline.order(ExtendText(self._scratch.number, self._tokens[before:context] if before else ()))
        reply = await self._ask(DraftOrder(self._scratch.number, request))
        seconds = time.monotonic() - asked
        if not isinstance(reply, DraftReply) or reply.tree is None:
            raise InvariantError(f"draft {self._requests} was abandoned, though nothing else was asked for")
        drafting, drafted = reply.end - reply.start, len(reply.tree.tokens)
        return DraftSample(self._round, drafted, context, new, drafting, seconds - drafting)

    async def trace(self, tokens: tuple[int, ...]) -> Drafts:
        """What the drafter proposes for each of ``tokens``. Raises StageFailedError if it fails."""
        text = self._text
        reply = await self._ask(TraceText(self._scratch.number, (*text.prompt, *tokens), text.sampling, text.planted))
        if not isinstance(reply, TraceReply):
            raise InvariantError("the drafter answered something else than was asked for")
        return reply.candidates[len(text.prompt) - 1 :], reply.detours

    async def _ask(self, message: ToDrafter) -> DraftReply | TraceReply | Frame:
        await self._pipeline.drafter_at_work()
        self._pipeline.order(message)
        return await self._news(self._scratch)
