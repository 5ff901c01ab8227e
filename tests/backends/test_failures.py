"""What dies, hangs or is torn away, where nothing is restored: an error that names it within five seconds, and no
process left."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from pipelines import LAYERS, RunningPipeline, running, tiny_plan
from tiny_models import save_tiny

from backends.cluster import Recovery, running_pipeline
from backends.frames import ReleaseFrame, RunFrame
from backends.head import Head
from backends.node import Node
from backends.sampling import Sampling
from pipesim.errors import BadInputError, StageFailedError
from pipesim.recorder import Recorder
from pipesim.scheduling.events import GenerationStarted
from pipesim.scheduling.policy import make_policy
from pipesim.scheduling.runs import Run, RunKind
from pipesim.scheduling.scheduler import Scheduler

PROMPT = tuple(range(3, 40))
GIVE_UP = Recovery(attempts=0)
WITHIN_S = 5.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("eight-layers"), num_hidden_layers=LAYERS)


def node_processes() -> list[psutil.Process]:
    """The nurseries and nodes below this process."""
    return [child for child in psutil.Process().children(recursive=True) if "backends.nursery" in child.cmdline()]


def generate_until(running: RunningPipeline, strike: Callable[[], None]) -> tuple[StageFailedError, float]:
    """A generation during which ``strike`` happens after 5 tokens; the error that ends it, and how long that took."""
    struck_at = 0.0
    emitted: list[int] = []

    def on_tokens(tokens: tuple[int, ...]) -> None:
        nonlocal struck_at
        emitted.extend(tokens)
        if len(emitted) >= 5 and not struck_at:
            struck_at = time.monotonic()
            strike()

    scheduler = Scheduler(make_policy("pipeinfer", {}))
    recorder = Recorder(scheduler, 0, [str(i) for i in range(len(running.pipeline.stages))])
    head = Head(running.pipeline, recorder, on_tokens)
    with pytest.raises(StageFailedError) as caught:
        running.wait(head.generate(GenerationStarted(PROMPT, 700), Sampling()))
    return caught.value, struck_at


def kill(node: Node | None, number: signal.Signals) -> None:
    assert node is not None
    assert node.process is not None
    os.kill(node.process.pid, number)


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_stage_is_named_within_five_seconds(model: Path, victim: int, number: signal.Signals) -> None:
    with running(tiny_plan(model, 3, recovery=GIVE_UP)) as pipeline:
        node = pipeline.pipeline.stages[victim]
        error, struck_at = generate_until(pipeline, lambda: kill(node, number))
        assert f"stage {victim} ({node.address}, layers " in str(error)
        assert "last frame it handled: run " in str(error)
        if number is signal.SIGKILL:
            assert "SIGKILL" in str(error)
        else:
            assert "heartbeats" in str(error)
    assert time.monotonic() - struck_at < WITHIN_S
    assert not node_processes()


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "does not answer heartbeats")]
)
def test_a_stage_lost_while_its_clock_is_measured_is_named(
    model: Path, number: signal.Signals, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Node.watch

    async def strike_first(node: Node) -> None:
        if node.name.startswith("stage 1"):
            kill(node, number)
        await watch(node)

    monkeypatch.setattr(Node, "watch", strike_first)

    async def bring_up() -> None:
        async with running_pipeline(tiny_plan(model, 2)):
            pass

    with pytest.raises(StageFailedError, match=rf"stage 1 \(.*{reason}"):
        asyncio.run(bring_up())
    assert not node_processes()


def test_a_pipeline_that_is_late_names_those_who_are_not_ready(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure = Node.configure

    async def freeze_first(node: Node, order: Any) -> None:
        if node.name.startswith("stage 1"):
            kill(node, signal.SIGSTOP)
            await asyncio.Event().wait()
        await configure(node, order)

    monkeypatch.setattr(Node, "configure", freeze_first)

    async def bring_up() -> None:
        async with running_pipeline(tiny_plan(model, 2, startup_timeout_s=12.0)):
            pass

    with pytest.raises(
        StageFailedError, match=r"still waiting for stage 1 \(.*: raise execution.startup_timeout_s"
    ) as caught:
        asyncio.run(bring_up())
    assert "stage 0" not in str(caught.value)
    assert not node_processes()


def test_bad_input_that_a_stage_finds_names_the_stage(model: Path) -> None:
    async def bring_up() -> None:
        async with running_pipeline(tiny_plan(model, 2, dtype="float12")):
            pass

    with pytest.raises(BadInputError, match=r"^stage \d \(.*\): .*float12"):
        asyncio.run(bring_up())
    assert not node_processes()


def test_a_lost_drafter_is_named(model: Path) -> None:
    with running(tiny_plan(model, 2, recovery=GIVE_UP)) as pipeline:
        error, struck_at = generate_until(pipeline, lambda: kill(pipeline.pipeline.drafter, signal.SIGKILL))
        assert "drafter ngram" in str(error)
    assert time.monotonic() - struck_at < WITHIN_S
    assert not node_processes()


def test_a_stage_that_gets_nonsense_says_so(model: Path) -> None:
    async def nonsense() -> None:
        async with running_pipeline(tiny_plan(model, 2, None)) as pipeline:
            session = pipeline.new_session()
            run = Run(0, 0, RunKind.CANONICAL, (1,), (0,), (1,))
            pipeline.send(RunFrame(session, run))
            pipeline.send(ReleaseFrame(session))
            news = await asyncio.wait_for(pipeline.inbox(session).get(), WITHIN_S)
            assert isinstance(news, StageFailedError)
            assert "stage 0" in str(news)
            assert "session 1 epoch 0 is not open" in str(news)

    asyncio.run(nonsense())
    assert not node_processes()


def test_nothing_is_left_after_a_clean_end_or_an_exception(model: Path) -> None:
    with running(tiny_plan(model, 2)):
        assert len(node_processes()) == 4, "a nursery, two stages and a drafter"
    assert not node_processes()
    with pytest.raises(ZeroDivisionError), running(tiny_plan(model, 2)):
        raise ZeroDivisionError
    assert not node_processes()


HEAD_PROGRAM = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from pipelines import tiny_plan
from backends.cluster import Recovery, running_pipeline

async def main():
    async with running_pipeline(tiny_plan(Path(sys.argv[2]), 2)) as pipeline:
        print(*(node.process.pid for node in pipeline.nodes), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("frozen", [False, True], ids=["all-well", "one-stage-frozen"])
def test_stages_end_with_their_head_however_it_ends(model: Path, number: signal.Signals, frozen: bool) -> None:
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD_PROGRAM, str(Path(__file__).parent), str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert head.stdout
    nodes = [psutil.Process(int(pid)) for pid in head.stdout.readline().split()]
    assert len(nodes) == 3
    nodes.append(nodes[0].parent())
    if frozen:
        nodes[0].suspend()
    head.send_signal(number)
    _, alive = psutil.wait_procs(nodes, timeout=3.0)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    head.wait(3.0)
