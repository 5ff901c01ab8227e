"""What dies in a real pipeline is replaced, and the text is that of an undisturbed one (I3)."""

import io
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from pipelines import LAYERS, RunningPipeline, running, tiny_plan
from tiny_models import save_tiny

from backends.cluster import Recovery
from backends.control import ConfigureStage
from backends.models.loading import open_model
from backends.models.stage_model import StageModel
from backends.node import Node
from backends.probing import Prober, Text
from backends.reference import generate_in_one_process
from backends.sampling import Sampling
from pipesim.errors import PipesimError
from pipesim.event_log import replay_log
from pipesim.scheduling.commands import Outcome

PROMPT = [5, 9, 5, 9, 17, 5, 9, 5, 33, 80] * 20  # four prefill chunks, and worth looking up n-grams in
SAMPLED = Sampling(temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=11)
NEW_TOKENS = 30
POLICIES = {
    "autoregressive": {},
    "speculative": {"max_nodes": 5, "branches": 2},
    "pipeinfer": {"micro_batch": 3, "branches": 2, "p_split": 0.1},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("eight-layers"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    return generate_in_one_process(StageModel(open_model(model), 0, LAYERS), PROMPT, NEW_TOKENS, sampling=SAMPLED)


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Iterator[RunningPipeline]:
    """One pipeline for all tests: it must outlive what they do to it."""
    with running(tiny_plan(model, 3)) as pipeline:
        yield pipeline


def kill(node: Node | None, number: signal.Signals = signal.SIGKILL) -> None:
    assert node is not None
    assert node.process is not None
    os.kill(node.process.pid, number)


def mend(pipeline: RunningPipeline, lost: Node | None) -> None:
    """A drafter lost near the end of a text is noticed, and replaced, by the next ones."""
    while pipeline.pipeline.drafter is lost:
        pipeline.generate("pipeinfer", PROMPT, NEW_TOKENS)
    pipeline.wait(pipeline.pipeline.drafter_at_work())


def check(
    pipeline: RunningPipeline,
    expected: list[int],
    policy: str,
    strikes: dict[int, Callable[[], None]],
    tmp_path: Path,
) -> None:
    """A generation with ``strikes`` gives the expected text, and its log replays (I9)."""
    log = io.StringIO()
    tokens = pipeline.generate(policy, PROMPT, NEW_TOKENS, POLICIES[policy], SAMPLED, events=log, strikes=strikes)
    assert tokens == expected
    file = tmp_path / "events.jsonl" if tmp_path.is_dir() else tmp_path
    file.write_text(log.getvalue())
    replayed = replay_log(file)
    assert replayed.difference is None
    assert replayed.released
    trace = pipeline.traces[-1]
    assert trace.complete
    if any(run.outcome is Outcome.DRAINED for run in trace.runs):
        last = max(run.run_id for run in trace.runs if run.returned_s is not None)
        assert {span.stage for span in trace.spans if span.run_id == last} == {0, 1, 2}, "one trace over all epochs"


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("moment", [2, 15], ids=["mid-prefill", "mid-text"])
def test_a_killed_stage_is_replaced(
    pipeline: RunningPipeline, expected: list[int], policy: str, victim: int, moment: int, tmp_path: Path
) -> None:
    stages = pipeline.pipeline.stages
    others = {node.process.pid for index, node in enumerate(stages) if index != victim and node.process}
    check(pipeline, expected, policy, {moment: lambda: kill(stages[victim])}, tmp_path)
    assert others < {node.process.pid for node in stages if node.process}, "only the lost stage loads again"


def test_a_frozen_stage_is_replaced_and_its_process_ended(
    pipeline: RunningPipeline, expected: list[int], tmp_path: Path
) -> None:
    frozen = pipeline.pipeline.stages[1].process
    assert frozen
    check(pipeline, expected, "pipeinfer", {12: lambda: kill(pipeline.pipeline.stages[1], signal.SIGSTOP)}, tmp_path)
    assert not psutil.pid_exists(frozen.pid)


def test_losses_may_follow_each_other_and_come_together(
    pipeline: RunningPipeline, expected: list[int], tmp_path: Path
) -> None:
    stages = pipeline.pipeline.stages

    def both() -> None:
        kill(stages[0])
        kill(stages[2])

    check(pipeline, expected, "pipeinfer", {3: lambda: kill(stages[2]), 20: both}, tmp_path)


def test_a_lost_drafter_is_replaced_while_the_text_goes_on(
    pipeline: RunningPipeline, expected: list[int], tmp_path: Path
) -> None:
    for policy in ("speculative", "pipeinfer"):
        lost = pipeline.pipeline.drafter
        check(pipeline, expected, policy, {8: lambda: kill(pipeline.pipeline.drafter)}, tmp_path)
        mend(pipeline, lost)


def test_what_asks_for_drafts_next_waits_for_the_new_drafter(
    pipeline: RunningPipeline, expected: list[int], tmp_path: Path
) -> None:
    lost = pipeline.pipeline.drafter
    check(pipeline, expected, "pipeinfer", {20: lambda: kill(pipeline.pipeline.drafter)}, tmp_path)
    mend(pipeline, lost)
    text = Text(tuple(PROMPT), tuple(expected), SAMPLED, None)
    candidates, _ = pipeline.wait(Prober(pipeline.pipeline, text, 64).trace(tuple(expected)))
    assert len(candidates) == NEW_TOKENS


def test_two_generations_at_once_survive_the_same_loss(
    pipeline: RunningPipeline, expected: list[int], tmp_path: Path
) -> None:
    """They share stages and the drafter, and nothing else; whoever notices first repairs the pipeline for both."""
    under_way: list[str] = []
    lost = pipeline.pipeline.drafter

    def strike_when_both_are_under_way() -> None:
        under_way.append("one")
        if len(under_way) == 2:
            kill(pipeline.pipeline.stages[1])
            kill(pipeline.pipeline.drafter)

    strikes = {8: strike_when_both_are_under_way}
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(check, pipeline, expected, policy, strikes, tmp_path / f"{policy}.jsonl")
            for policy in ("pipeinfer", "speculative")
        ]
        for job in jobs:
            job.result()
    assert len(under_way) == 2
    mend(pipeline, lost)


def test_a_nursery_that_dies_takes_all_along_and_all_are_replaced(
    pipeline: RunningPipeline, expected: list[int], tmp_path: Path
) -> None:
    process = pipeline.pipeline.stages[0].process
    assert process
    nursery = psutil.Process(process.pid).parent()
    check(pipeline, expected, "pipeinfer", {12: nursery.kill}, tmp_path)


@pytest.fixture
def other_arithmetic(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers that a stage on another machine starts with: those stages tell another arithmetic."""
    strange: list[int] = []
    configure = Node.configure

    async def tell(self: Node, order: ConfigureStage) -> None:
        await configure(self, order)
        if isinstance(order, ConfigureStage) and order.first_layer in strange:
            self.arithmetic = "another"

    monkeypatch.setattr(Node, "configure", tell)
    return strange


def test_stages_that_compute_differently_are_named_and_so_is_a_replacement_refused(
    model: Path, other_arithmetic: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with running(tiny_plan(model, 2, recovery=Recovery(attempts=1))):
        assert "compute differently" not in caplog.text
    other_arithmetic.append(4)
    with running(tiny_plan(model, 2, recovery=Recovery(attempts=1))) as pipeline:
        assert "compute differently, another split may yield another text: " in caplog.text
        assert "layers 4..7): another" in caplog.text
        other_arithmetic.append(0)
        with pytest.raises(PipesimError, match="computes with another, the lost stage with"):
            pipeline.generate(
                "autoregressive", PROMPT, NEW_TOKENS, strikes={8: lambda: kill(pipeline.pipeline.stages[0])}
            )
