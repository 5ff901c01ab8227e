"""Several generations at once on the same stages: nobody notices anybody else."""

import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny

from backends.drafting.ngram import NgramDrafter
from backends.frames import Frame, OpenFrame, ReleaseFrame, ResultFrame, RunFrame, Session
from backends.models.loading import ModelSource, open_model
from backends.models.stage_model import StageModel
from backends.reference import generate_in_one_process
from backends.sampling import Sampling
from backends.stage_worker import StageWorker
from pipesim.scheduling.commands import CancelRuns, Command, EmitTokens, ReleaseSession, RequestDraft, SubmitRun
from pipesim.scheduling.events import DraftReturned, GenerationStarted, RunReturned
from pipesim.scheduling.policies.pipeinfer import PipeInfer
from pipesim.scheduling.scheduler import Scheduler

TOKEN = b"secret-secret-se"
LAYERS = 4
PROMPTS = [(5, 9, 5, 9, 17, 5, 9, 5), (5, 9, 5, 9, 17, 5, 9, 8, 5, 9), (3,)]
SAMPLINGS = [Sampling(), Sampling(temperature=0.8, seed=4), Sampling(repetition_penalty=1.3)]
NEW_TOKENS = 12


class Stages:
    """Two stages in this process, and the links to, between and after them."""

    def __init__(self, parts: Sequence[StageModel]) -> None:
        self.workers = [StageWorker(index, layers, lambda: None) for index, layers in enumerate(parts)]
        self.links: list[deque[Frame]] = [deque(), deque(), deque()]

    def step(self, stage: int) -> None:
        """A stage handles the next frame."""
        self.links[stage + 1].append(self.workers[stage].handle(self.links[stage].popleft(), 0))

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


class Talk:
    """One generation: a scheduler, an n-gram drafter that answers at once, and a session of the shared stages."""

    def __init__(self, stages: Stages, number: int, sampling: Sampling, prompt: tuple[int, ...]) -> None:
        self.session, self.stages = Session(TOKEN, number, 0), stages
        self.scheduler = Scheduler(PipeInfer(micro_batch=2, branches=2, p_split=0.1, p_accept=0.0))
        self.drafter, self.text, self.now = NgramDrafter(), list[int](), 0.0
        self.drafter.start(prompt, sampling)
        self.released, self.cancelled = False, 0
        commands = self.scheduler.handle(GenerationStarted(prompt, NEW_TOKENS), self.now)
        opening = OpenFrame(self.session, self.scheduler.kv_cells, self.scheduler.sequences, sampling)
        stages.links[0].append(opening)
        self.carry_out(commands)

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case SubmitRun(run):
                    self.stages.links[0].append(RunFrame(self.session, run))
                case CancelRuns(run_ids):
                    self.cancelled += len(run_ids)
                    for worker in self.stages.workers:
                        worker.cancel(self.session.number, self.session.epoch, run_ids)
                case EmitTokens(_, tokens):
                    self.text += tokens
                    self.drafter.extend(tokens)
                case RequestDraft():
                    tree = self.drafter.draft(command, lambda: False)
                    assert tree is not None
                    self.carry_out(self.scheduler.handle(DraftReturned(command.request_id, tree), self.now))
                case ReleaseSession():
                    self.stages.links[0].append(ReleaseFrame(self.session))

    def hear(self, frame: Frame) -> None:
        self.now += 1.0
        if isinstance(frame, ResultFrame):
            self.carry_out(self.scheduler.handle(RunReturned(frame.run_id, frame.predictions), self.now))
        self.released |= isinstance(frame, ReleaseFrame)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder: Path = tmp_path_factory.mktemp("four-layers")
    return open_model(save_tiny(folder, num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def parts(source: ModelSource) -> list[StageModel]:
    return [StageModel(source, 0, 1), StageModel(source, 1, LAYERS)]


@pytest.fixture(scope="module")
def expected(source: ModelSource) -> list[list[int]]:
    whole = StageModel(source, 0, LAYERS)
    texts = zip(PROMPTS, SAMPLINGS, strict=True)
    return [generate_in_one_process(whole, prompt, NEW_TOKENS, sampling=sampling) for prompt, sampling in texts]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), numbers=st.permutations([1, 2, 3]))
def test_interleaved_sessions_give_the_texts_they_give_alone(
    parts: list[StageModel], expected: list[list[int]], seed: int, numbers: list[int]
) -> None:
    """Run ids, cells and cancellations of one mean nothing to another, whoever comes or goes first."""
    stages, chance = Stages(parts), random.Random(seed)
    waiting = list(zip(numbers, SAMPLINGS, PROMPTS, strict=True))
    talks: dict[int, Talk] = {}
    order: list[Talk] = []
    try:
        while waiting or not all(talk.released for talk in order):
            ready = [stage for stage in (0, 1) if stages.links[stage]]
            choices = [*ready, *([2] if stages.links[2] else []), *([3] if waiting else [])]
            match chance.choice(choices):
                case 3:
                    number, sampling, prompt = waiting.pop(0)
                    talks[number] = Talk(stages, number, sampling, prompt)
                    order.append(talks[number])
                case 2:
                    frame = stages.links[2].popleft()
                    talks[frame.session.number].hear(frame)
                case stage:
                    stages.step(stage)
        assert [talk.text for talk in order] == expected
        assert not any(worker._open or any(worker._cancelled.values()) for worker in stages.workers)
    finally:
        stages.close()


def test_a_cancellation_reaches_the_session_it_names_alone(parts: list[StageModel]) -> None:
    stages = Stages(parts)
    talks = [Talk(stages, number, SAMPLINGS[0], PROMPTS[0]) for number in (1, 2)]
    (worker, _) = stages.workers
    worker.cancel(1, 0, (0,))
    try:
        while stages.links[0]:
            stages.step(0)
        voids = {frame.session.number: frame.void for frame in stages.links[1] if isinstance(frame, RunFrame)}
        assert voids == {1: True, 2: False}
        assert not any(talk.released for talk in talks)
    finally:
        stages.close()
