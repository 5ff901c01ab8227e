"""The head on a made-up pipeline that loses whatever can be lost, whenever it can: the text stays plain decoding's."""

import asyncio
import io
import itertools
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from world import POISON, VOCABULARY, language_model, plain_text

from backends.control import DraftOrder, DraftReply, EndText, ExtendText, StartText, ToDrafter
from backends.frames import Frame, OpenFrame, ResultFrame, RunFrame, Session, StageStamp
from backends.head import Head
from backends.node import Node
from backends.pipeline import DrafterBack, News, Pipeline
from backends.sampling import Sampling
from pipesim.errors import BadInputError, PipesimError, StageFailedError
from pipesim.event_log import replay_log
from pipesim.recorder import Recorder
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.events import GenerationStarted
from pipesim.scheduling.policies.autoregressive import Autoregressive
from pipesim.scheduling.policies.pipeinfer import PipeInfer
from pipesim.scheduling.policies.speculative import Speculative
from pipesim.scheduling.policy import Policy
from pipesim.scheduling.scheduler import Scheduler
from pipesim.scheduling.tree import DraftTree

PROMPT = (1, 4, 1, 4, 2, 1, 4, 3, 0)
POLICIES: dict[str, Policy] = {
    "autoregressive": Autoregressive(),
    "speculative": Speculative(max_nodes=3),
    "pipeinfer": PipeInfer(micro_batch=2),
}


class FakeNode:
    """What the head reads of a node."""

    def __init__(self) -> None:
        self.clock_offset, self.last_run, self.watched = 0.0, -1, True
        self.failure: PipesimError | None = None


class FakePipeline(Pipeline):
    """One stage that computes a run when it comes home, and a drafter. ``fate`` chooses what happens next.

    A stage's world is a cell table and what stands in the cells; it forgets both, and the drafter its text, when lost.
    """

    def __init__(self, fate: Sequence[int], attempts: int = 3) -> None:
        super().__init__(attempts)
        self.fate = iter(fate)
        self.losses = 0
        self.failing = 0  # so many restorations will fail
        self.stages = [cast(Node, FakeNode())]
        self.drafter = cast(Node, FakeNode())
        self.flying: deque[Frame] = deque()
        self.strays: list[News] = []
        self.cancelled: set[tuple[int, int]] = set()
        self.cells: CellTable | None = None
        self.content: dict[int, int] = {}
        self.text: list[int] | None = None
        self.order_open: DraftOrder | None = None
        self.draft_session = 0
        self.replacing = False

    # what the head calls

    def inbox(self, session: Session) -> Any:
        return self

    def send(self, frame: Frame) -> int:
        if self.failure is None:
            assert frame.session.token == self.token, "a frame of an epoch that is over"
            self.flying.append(frame)
        return 1

    def cancel(self, session: Session, run_ids: Sequence[int], hops: Sequence[Any] = ()) -> int:
        self.cancelled |= {(session.number, run_id) for run_id in run_ids}
        return 1

    def order(self, message: ToDrafter) -> int:
        if isinstance(message, StartText):
            self.text, self.draft_session, self.order_open = list(message.prompt), message.session, None
        assert self.text is not None, "a drafter got work before it knew its text"
        if isinstance(message, EndText):
            self.text, self.order_open = None, None
            return 1
        assert message.session == self.draft_session
        if isinstance(message, ExtendText):
            self.text += message.tokens
        if isinstance(message, DraftOrder):
            assert message.request.frontier == len(self.text)
            self.order_open = message
        return 1

    async def restore(self, failure: PipesimError) -> None:
        assert failure is self.failure
        await asyncio.sleep(0)
        self.token = bytes([self.losses % 256]) * 16
        self.flying.clear()
        self.cells = None
        if self.failing:
            self.failing -= 1
            self.failure = StageFailedError("stage 0 was lost again")
            self.strays.append(self.failure)
            raise self.failure
        self.failure = None

    def replace_drafter(self) -> None:
        self.replacing = True

    # what happens

    async def get(self) -> News:
        await asyncio.sleep(0)
        while True:
            match next(self.fate, 0) % 12:
                case 7 if self.failure is None:
                    return self.lose_stage()
                case 8 if self.failure is None:
                    self.failing = min(2, self.attempts - 1)
                    return self.lose_stage()
                case 9 if not self.replacing:
                    return self.lose_drafter()
                case 10 if self.replacing:
                    self.replacing = False
                    self.drafter, self.text = cast(Node, FakeNode()), None
                    return DrafterBack(), 1
                case 11 if self.strays:
                    return self.strays.pop()
                case 5 | 6 if self.order_open:
                    return self.draft(self.order_open), 1
                case _ if self.flying:
                    return self.come_home(self.flying.popleft()), 1
                case _ if self.order_open:
                    return self.draft(self.order_open), 1
                case _:
                    assert self.flying or self.order_open or self.failure, "the head waits for nothing"

    def lose_stage(self) -> PipesimError:
        self.losses += 1
        self.failure = StageFailedError(f"stage 0 was lost, number {self.losses}")
        self.strays += [(self.result(frame, (1,)), 1) for frame in self.flying if isinstance(frame, RunFrame)]
        self.strays.append(self.failure)
        return self.failure

    def lose_drafter(self) -> PipesimError:
        assert self.drafter
        self.drafter.failure = StageFailedError("the drafter was lost")
        self.order_open, self.text = None, None
        self.strays.append(self.drafter.failure)
        return self.drafter.failure

    def draft(self, order: DraftOrder) -> DraftReply:
        """A chain of two, the first one right more often than not."""
        assert self.text is not None
        self.order_open, context = None, [*self.text, *order.request.path]
        right = language_model(context)
        first = right if next(self.fate, 0) % 3 else (right + 1) % VOCABULARY
        tree = DraftTree((first, language_model([*context, first])), (-1, 0), (0.9, 0.9))
        return DraftReply(self.draft_session, order.request.request_id, tree, 0.0, 0.0)

    def come_home(self, frame: Frame) -> Frame:
        if isinstance(frame, OpenFrame):
            self.cells, self.content = CellTable(frame.kv_cells, frame.sequences), {}
        if not isinstance(frame, RunFrame):
            return frame
        assert self.cells, "the session was not opened in this epoch"
        run, void = frame.run, (frame.session.number, frame.run.run_id) in self.cancelled
        for cell, token in zip(self.cells.admit(run), run.tokens, strict=True):
            self.content[cell] = POISON if void else token
        if void:
            return self.result(frame, None)
        seen = [
            [self.content[cell] for cell in self.cells.visible(run.positions[row], run.sequences[row])]
            for row in range(run.first_output_row, run.rows)
        ]
        return self.result(frame, tuple(language_model([max(token, 0) for token in row]) for row in seen))

    def result(self, frame: RunFrame, predictions: tuple[int, ...] | None) -> ResultFrame:
        stamp = StageStamp(0, 0.0, 0.0, predictions is None, 1)
        return ResultFrame(frame.session, frame.run.run_id, predictions, (stamp,))


def generate(pipeline: FakePipeline, policy: str, new_tokens: int = 20) -> list[int]:
    """What the user gets; the log must replay."""
    log, emitted = io.StringIO(), list[int]()
    scheduler = Scheduler(POLICIES[policy], prefill_chunk=3, prefill_window=2)
    head = Head(pipeline, Recorder(scheduler, 0, ["stage"], log), emitted.extend)
    try:
        asyncio.run(head.generate(GenerationStarted(PROMPT, new_tokens), Sampling()))
    finally:
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.write(log.getvalue())
            file.flush()
            assert not log.getvalue() or replay_log(Path(file.name)).difference is None
    return emitted


@settings(max_examples=150, deadline=None)
@example(policy="pipeinfer", fate=[0, 0, 0, 0, 5])  # cancels runs, which few others do
@given(policy=st.sampled_from(list(POLICIES)), fate=st.lists(st.integers(0, 35), max_size=150))
def test_whatever_is_lost_whenever_the_text_stays(policy: str, fate: list[int]) -> None:
    pipeline = FakePipeline(fate, attempts=1000)
    for _ in range(2):  # what is left of one generation does not harm the next one
        assert generate(pipeline, policy) == plain_text(PROMPT, 20)


@pytest.mark.parametrize("attempts", [0, 1, 3])
def test_what_breaks_again_and_again_is_given_up(attempts: int) -> None:
    pipeline = FakePipeline(itertools.repeat(7), attempts)  # type: ignore[arg-type]
    with pytest.raises(StageFailedError, match=f"stage 0 was lost, number {attempts + 1}"):
        generate(pipeline, "pipeinfer")


def test_attempts_are_counted_anew_after_every_token() -> None:
    pipeline = FakePipeline([0] * 6 + [7, *[0] * 14] * 10, attempts=1)
    assert generate(pipeline, "autoregressive") == plain_text(PROMPT, 20)
    assert pipeline.losses == 3


def test_a_drafter_that_dies_without_a_draft_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = FakePipeline([9, 10] * 4, attempts=3)
    assert generate(pipeline, "pipeinfer") == plain_text(PROMPT, 20)
    assert "no more drafts" in caplog.text
    assert not pipeline.replacing


def test_bad_input_is_not_tried_again() -> None:
    pipeline = FakePipeline([])
    pipeline.failure = BadInputError("stage 0: too many cells")
    with pytest.raises(BadInputError, match="too many cells"):
        generate(pipeline, "autoregressive")
