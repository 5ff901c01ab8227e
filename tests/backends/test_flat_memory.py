"""What grows with a long text in head and drafter, counted in bytes per token: little more than the text itself."""

import asyncio
import gc
import random
import tracemalloc
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from backends.compute import ComputeLoop
from backends.control import ConfigureDrafter, DraftOrder, DraftReply, ExtendText, StartText, ToDrafter, pack
from backends.drafter_server import DrafterLease
from backends.frames import Frame, ReleaseFrame, ResultFrame, RunFrame, Session, StageStamp
from backends.head import Head
from backends.node import Node
from backends.pipeline import News, Pipeline
from backends.sampling import Sampling
from pipesim.recorder import Observer, Recorder, TextMeter
from pipesim.scheduling.commands import RequestDraft
from pipesim.scheduling.events import GenerationStarted
from pipesim.scheduling.policies.pipeinfer import PipeInfer
from pipesim.scheduling.runs import Run
from pipesim.scheduling.scheduler import Scheduler
from pipesim.scheduling.tree import DraftTree

VOCABULARY = 5000
FROM, TO = 2000, 4000


def following(token: int, position: int) -> int:
    """The text of this file: the token after ``token`` at ``position``."""
    return (31 * token + 7 * position + 1) % VOCABULARY


class Watched:
    """What the head reads of a node."""

    clock_offset, last_run, watched, failure = 0.0, -1, True, None


class InstantPipeline(Pipeline):
    """A stage that knows the text, and a drafter that errs in every fifth draft."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = [cast(Node, Watched())]
        self.drafter = cast(Node, Watched())
        self.news: deque[News] = deque()
        self.drafts = 0
        self.text: list[int] = []

    def inbox(self, session: Session) -> Any:
        return self

    async def get(self) -> News:
        await asyncio.sleep(0)
        return self.news.popleft()

    def send(self, frame: Frame) -> int:
        if isinstance(frame, RunFrame):
            run = frame.run
            rows = list(zip(run.tokens, run.positions, strict=True))[run.first_output_row :]
            stamp = StageStamp(0, 0.0, 0.0, False, 1)
            frame = ResultFrame(frame.session, run.run_id, tuple(following(*row) for row in rows), (stamp,))
        if isinstance(frame, ResultFrame | ReleaseFrame):
            self.news.append((frame, 1))
        return 1

    def cancel(self, session: Session, run_ids: Sequence[int], hops: Sequence[Any] = ()) -> int:
        return 1

    def order(self, message: ToDrafter) -> int:
        if isinstance(message, StartText):
            self.text = list(message.prompt[-1:])
            self.at = len(message.prompt) - 1
        if isinstance(message, ExtendText):
            self.at += len(message.tokens)
            self.text = list(message.tokens[-1:])
        if isinstance(message, DraftOrder):
            self.drafts += 1
            position = message.request.frontier - 1 + len(message.request.path)
            token = [*self.text, *message.request.path][-1]
            first = following(token, position) + (self.drafts % 5 == 0)
            tree = DraftTree((first, following(first, position + 1)), (-1, 0), (0.9, 0.9))
            self.news.appendleft((DraftReply(message.session, message.request.request_id, tree, 0.0, 0.0), 1))
        return 1


def growth(work: Callable[[Callable[[int], None]], None]) -> float:
    """Bytes per token that are kept between tokens ``FROM`` and ``TO``; ``work`` tells how many there are."""
    kept: dict[int, int] = {}

    def at(tokens: int) -> None:
        for mark in (FROM, TO):
            if tokens >= mark and mark not in kept:
                gc.collect()
                kept[mark] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        work(at)
    finally:
        tracemalloc.stop()
    return (kept[TO] - kept[FROM]) / (TO - FROM)


def generate(observer: Observer, at: Callable[[int], None]) -> None:
    count = 0

    def on_tokens(tokens: tuple[int, ...]) -> None:
        nonlocal count
        count += len(tokens)
        at(count)

    head = Head(InstantPipeline(), observer, on_tokens)
    asyncio.run(head.generate(GenerationStarted((1, 2, 3), TO + 10), Sampling()))


def scheduler() -> Scheduler:
    return Scheduler(PipeInfer(micro_batch=2, partitions=3))


def test_a_head_that_keeps_no_trace_grows_by_its_text_and_cells_alone() -> None:
    """The scheduler's own share: 36 bytes for a token in a list, some 80 for a position of the cell table."""
    meter = TextMeter(scheduler(), 0, 1)
    assert growth(lambda at: generate(meter, at)) < 140
    assert len(meter.tokens) == TO + 10
    assert 0.5 < (meter.summary().metrics.acceptance_rate or 0) < 1
    runs = sum(type(one) is Run for one in gc.get_objects())
    assert runs < 50, "runs outlive their return"


def test_a_trace_is_what_makes_a_head_grow() -> None:
    """Otherwise the test above could not fail."""
    recorder = Recorder(scheduler(), 0, ["stage 0"])
    assert growth(lambda at: generate(recorder, at)) > 500


class AtOnce(ComputeLoop):
    """Runs what it gets."""

    def submit(self, job: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        job()

    def checkpoint(self) -> None:
        pass


@pytest.mark.parametrize("distinct", [40, VOCABULARY], ids=["pairs that come again", "hardly a pair comes again"])
def test_an_ngram_drafter_grows_by_its_text_and_index_alone(distinct: int) -> None:
    async def work(at: Callable[[int], None]) -> None:
        drafter = DrafterLease(ConfigureDrafter(b"", "ngram", "", VOCABULARY, TO, "float32", "auto", 1, None), AtOnce())
        drafter.receive(pack(StartText(1, (1, 2, 3), Sampling(), None)))
        draw = random.Random(0)
        for number in range(TO + 10):
            drafter.receive(pack(ExtendText(1, (draw.randrange(distinct),))))
            drafter.receive(pack(DraftOrder(1, RequestDraft(number, number + 4, (), 4, 1, 0.1, 1.0))))
            assert isinstance(drafter._replies.get_nowait(), DraftReply)
            at(number)

    assert growth(lambda at: asyncio.run(work(at))) < 60
