"""What things cost on a running pipeline, measured in a scratch session while nothing else runs."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from backends.control import DraftOrder, DraftReply, Planted, StartText, ToDrafter, TraceReply, TraceText
from backends.frames import Frame, OpenFrame, ReleaseFrame, ResultFrame, RunFrame
from backends.pipeline import DrafterBack, Pipeline
from backends.sampling import Sampling
from pipesim.errors import InvariantError, PipesimError, StageFailedError
from pipesim.scheduling.commands import RequestDraft
from pipesim.scheduling.runs import END, KvOperation, Run, RunKind, SequenceRemove
from pipesim.scheduling.tree import Candidate, Detour

ROWS = (1, 2, 4, 8)
_REPEATS = 9
_DRAFTED = 4


Drafts = tuple[tuple[tuple[Candidate, ...], ...], tuple[Detour, ...] | None]
"""A drafter's candidates for each token of a text, and its detours; see ``Drafter.trace`` and ``Drafter.detours``."""


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Medians in ms: per stage by rows, per stage and prefill row, and for one hop between neighbours."""

    rows_ms: tuple[dict[int, float], ...]
    prefill_row_ms: tuple[float, ...]
    link_ms: float


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """Medians in ms for one level of a tree, and for one prompt token before the first draft."""

    level_ms: float
    prefill_row_ms: float


class Prober:
    """Sends made-up runs down ``pipeline``, one at a time. ``tokens`` fill the rows."""

    def __init__(self, pipeline: Pipeline, tokens: Sequence[int]) -> None:
        self._pipeline = pipeline
        self._tokens = tokens
        self._session = pipeline.new_session()
        self._run_id = 0
        self._results: list[tuple[Run, ResultFrame, float]] = []  # run, result, seconds from submission to return

    async def stage_costs(self, context: int, chunk: int) -> StageCosts:
        """Measures runs that attend to ``context`` cells; prefill runs have ``chunk`` rows.

        Raises:
            StageFailedError: a stage failed.
        """
        await self._through(OpenFrame(self._session, context + max(ROWS), 1, Sampling()))
        for start in range(0, context, chunk):
            await self._probe(RunKind.PREFILL, start, min(chunk, context - start), ())
        for _ in range(_REPEATS):
            for rows in ROWS:
                await self._probe(RunKind.SPECULATIVE, context, rows, (SequenceRemove(1, context, END),))
        await self._through(ReleaseFrame(self._session))
        stages = range(len(self._pipeline.stages))
        decode = {rows: [one for one in self._results if _is_decode(one[0], rows)] for rows in ROWS}
        prefill = [one for one in self._results if one[0].kind is RunKind.PREFILL]
        hops = [
            (seconds - sum(stamp.end - stamp.start for stamp in result.stamps)) / (len(stages) + 1)
            for _, result, seconds in decode[1]
        ]
        return StageCosts(
            tuple({rows: _median_ms(found, stage) for rows, found in decode.items()} for stage in stages),
            tuple(_median_ms(prefill, stage, per_row=True) for stage in stages),
            1e3 * statistics.median(hops),
        )

    async def _probe(self, kind: RunKind, start: int, rows: int, operations: tuple[KvOperation, ...]) -> None:
        positions = tuple(range(start, start + rows))
        tokens = tuple(self._tokens[position % len(self._tokens)] for position in positions)
        unread = rows - 1 if kind is RunKind.PREFILL else 0
        run = Run(self._run_id, self._session.epoch, kind, tokens, positions, (1,) * rows, unread, operations)
        self._run_id += 1
        submitted = time.monotonic()
        result = await self._through(RunFrame(self._session, run))
        if not isinstance(result, ResultFrame) or result.run_id != run.run_id:
            raise InvariantError(f"run {run.run_id} was sent, {result} came home (I2)")
        self._results.append((run, result, time.monotonic() - submitted))

    async def _through(self, frame: Frame) -> Frame:
        self._pipeline.send(frame)
        news = await self._pipeline.inbox.get()
        if isinstance(news, PipesimError):
            raise news
        if isinstance(news[0], DraftReply | TraceReply | DrafterBack):
            raise InvariantError(f"{news[0]} came without a request")
        return news[0]

    async def draft_costs(self, prompt: tuple[int, ...], sampling: Sampling, planted: Planted | None) -> DraftCosts:
        """Measures drafts after ``prompt``. Raises StageFailedError if the drafter fails."""
        self._pipeline.order(StartText(self._session.number, prompt, sampling, planted))
        per_level, first_s = [], 0.0
        for number in range(_REPEATS + 1):
            request = RequestDraft(number, len(prompt), (number,) * (number > 0), _DRAFTED, 1, 0.0, 1.0)
            reply = await self._ask(DraftOrder(self._session.number, request))
            if not isinstance(reply, DraftReply) or reply.tree is None:
                raise InvariantError(f"draft {number} was abandoned, though nothing else was asked for")
            if number == 0:
                first_s = reply.end - reply.start
            else:
                per_level.append((reply.end - reply.start) / max(1, len(reply.tree.tokens)))
        level_s = statistics.median(per_level)
        return DraftCosts(1e3 * level_s, 1e3 * max(0.0, first_s - _DRAFTED * level_s) / len(prompt))

    async def drafts(
        self, prompt: tuple[int, ...], tokens: tuple[int, ...], sampling: Sampling, planted: Planted | None
    ) -> Drafts:
        """What the drafter proposes for each of ``tokens``. Raises StageFailedError if it fails."""
        reply = await self._ask(TraceText(self._session.number, (*prompt, *tokens), sampling, planted))
        if not isinstance(reply, TraceReply):
            raise InvariantError("the drafter answered something else than was asked for")
        return reply.candidates[len(prompt) - 1 :], reply.detours

    async def _ask(self, message: ToDrafter) -> DraftReply | TraceReply | Frame:
        self._pipeline.order(message)
        while True:
            news = await self._pipeline.inbox.get()
            if isinstance(news, PipesimError):
                raise news
            what = news[0]
            if isinstance(what, DrafterBack):
                raise StageFailedError("the drafter was lost while it was probed: its costs are unknown")
            if not isinstance(what, DraftReply) or what.session == self._session.number:
                return what


def _is_decode(run: Run, rows: int) -> bool:
    return run.kind is RunKind.SPECULATIVE and run.rows == rows


def _median_ms(results: Sequence[tuple[Run, ResultFrame, float]], stage: int, per_row: bool = False) -> float:
    stamps = [(result.stamps[stage], run.rows if per_row else 1) for run, result, _ in results]
    return 1e3 * statistics.median((stamp.end - stamp.start) / rows for stamp, rows in stamps)
