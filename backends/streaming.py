"""One generation of a job on a running pipeline, its text handed on as it comes."""

import io
from collections.abc import Callable

from backends.chaos import faults_under_way
from backends.control import Planted
from backends.head import Head
from backends.job import Job
from backends.pacing import LEAD_S
from backends.pipeline import Pipeline
from pipesim.calibration import HeadSample
from pipesim.executors import Progress
from pipesim.recorder import Observer

OnText = Callable[[Progress], None]


async def stream(
    job: Job,
    pipeline: Pipeline,
    observer: Observer,
    planted: Planted | None = None,
    on_text: OnText | None = None,
    handling: list[HeadSample] | None = None,
) -> str:
    """The text of one generation, which ``observer``'s scheduler drives.

    ``planted`` is what a planted drafter must know. ``handling`` gathers what events took the head, of a generation
    that warms up: an emulated cluster's times are none of its business.

    Raises:
        StageFailedError: as ``Head.generate``.
    """
    pieces, text, count = job.stream(), io.StringIO(), 0

    def show(piece: str) -> None:
        text.write(piece)
        if on_text:
            seen = observer.scheduler.statistics
            rate = seen.drafted_accepted / seen.drafted_verified if seen.drafted_verified else None
            on_text(Progress(piece, count, rate))

    def on_tokens(tokens: tuple[int, ...]) -> int | None:
        nonlocal count
        piece = pieces.feed(tokens)
        count = count + len(tokens) if pieces.ended is None else pieces.ended
        show(piece)
        return pieces.ended

    paced = job.paced() if handling is None else None
    head = Head(pipeline, observer, on_tokens, paced, handling)
    async with faults_under_way(job.scenario.faults, pipeline, LEAD_S if paced else 0.0):
        await head.generate(job.started, job.sampling, planted)
    if rest := pieces.finish():
        show(rest)
    return text.getvalue()


async def plain_tokens(job: Job, pipeline: Pipeline) -> tuple[int, ...]:
    """The tokens of plain decoding, which nobody watches: no drafts, no faults, no emulated times.

    Raises:
        StageFailedError: as ``Head.generate``.
    """
    meter, pieces = job.meter(job.plain()), job.stream()

    def on_tokens(tokens: tuple[int, ...]) -> int | None:
        pieces.feed(tokens)
        return pieces.ended

    await Head(pipeline, meter, on_tokens).generate(job.started, job.sampling)
    return meter.tokens
