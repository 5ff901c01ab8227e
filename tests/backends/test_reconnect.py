"""Stages that somebody else started, links that break, heads that freeze: the text goes on wherever it can."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest
from pipelines import CONTEXT, LAYERS, VOCABULARY, RunningPipeline, running
from tiny_models import save_tiny

from backends import cluster, node, pipeline
from backends.cluster import ClusterPlan, DrafterPart, stage_parts
from backends.models.loading import open_model
from backends.models.stage_model import StageModel
from backends.processes import NodeProcess, Nursery
from backends.reference import generate_in_one_process

PROMPT = [5, 9, 5, 9, 17, 5, 9, 5, 33, 80] * 10
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("eight-layers"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    return generate_in_one_process(StageModel(open_model(model), 0, LAYERS), PROMPT, NEW_TOKENS)


@contextlib.contextmanager
def servers(count: int) -> Iterator[list[NodeProcess]]:
    """Stage servers of another owner, as far as a head can tell."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[Nursery, list[NodeProcess]]:
        nursery = await Nursery.start(preload=True)
        return nursery, await nursery.spawn(count)

    try:
        nursery, nodes = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
        try:
            yield nodes
        finally:
            asyncio.run_coroutine_threadsafe(nursery.stop(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def pipeline_on(model: Path, hosts: list[str | None], *spares: str) -> Iterator[RunningPipeline]:
    drafter = DrafterPart("ngram", VOCABULARY, CONTEXT)
    with running(ClusterPlan(str(model), stage_parts([3, 5], hosts), drafter, spares=spares)) as pipeline:
        yield pipeline


def generate(pipeline: RunningPipeline, strike: Callable[[], object]) -> list[int]:
    return pipeline.generate("pipeinfer", PROMPT, NEW_TOKENS, strikes={8: lambda: strike() and None})


def test_a_spare_takes_over_and_a_server_that_wakes_up_is_the_next_spare(
    model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is frozen for longer than any timeout. Woken up, it does no harm, and is soon of use again."""
    monkeypatch.setattr(cluster, "_RETURN_S", 1.0)
    monkeypatch.setattr(node, "_CONNECT_S", 1.0)
    with servers(2) as (first, spare), pipeline_on(model, [None, first.address], spare.address) as pipeline:
        frozen = psutil.Process(first.pid)
        assert generate(pipeline, frozen.suspend) == expected
        assert pipeline.pipeline.stages[1].address == spare.address
        assert generate(pipeline, frozen.resume) == expected
        assert generate(pipeline, spare.kill) == expected
        assert pipeline.pipeline.stages[1].address == first.address


def test_a_server_that_was_frozen_is_called_again_at_its_address(model: Path, expected: list[int]) -> None:
    with servers(1) as (server,), pipeline_on(model, [None, server.address]) as pipeline:
        frozen = psutil.Process(server.pid)

        def freeze_for_a_while() -> None:
            frozen.suspend()
            threading.Timer(4.0, frozen.resume).start()

        assert generate(pipeline, freeze_for_a_while) == expected
        assert pipeline.pipeline.stages[1].address == server.address


def test_a_broken_link_between_two_living_stages_is_made_anew(
    model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_LINK_GRACE_S", 0.2)
    with (
        servers(2) as (first, second),
        running_proxy(second.address) as (address, connections),
        pipeline_on(model, [first.address, address]) as running_one,
    ):
        stages = list(running_one.pipeline.stages)
        assert len(connections) == 2, "the head's, and the first stage's"
        assert generate(running_one, connections[1].close) == expected
        assert running_one.pipeline.stages == stages, "nobody was replaced"
        assert len(connections) == 3


class Connection:
    """Passes bytes on in both directions until it is closed, from any thread."""

    def __init__(self, *ends: asyncio.StreamWriter) -> None:
        self.ends, self.loop = ends, asyncio.get_running_loop()

    def close(self) -> None:
        for end in self.ends:
            self.loop.call_soon_threadsafe(end.close)


@contextlib.contextmanager
def running_proxy(target: str) -> Iterator[tuple[str, list[Connection]]]:
    """An address that leads to ``target``, and the connections made to it so far."""
    host, port = target.split(":")
    connections: list[Connection] = []
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        connections.append(Connection(writer, back))
        await asyncio.gather(pump(reader, back), pump(there, writer))

    @contextlib.asynccontextmanager
    async def listening() -> AsyncIterator[str]:
        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        server.close()

    try:
        context = listening()
        address = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(10)
        yield address, connections
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(10)
    finally:
        for connection in connections:
            connection.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


HEAD_PROGRAM = """
import asyncio, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from pipelines import tiny_plan
from backends.cluster import running_pipeline
from backends.head import Head
from backends.sampling import Sampling
from pipesim.recorder import Recorder
from pipesim.scheduling.events import GenerationStarted
from pipesim.scheduling.policies.pipeinfer import PipeInfer
from pipesim.scheduling.scheduler import Scheduler

async def main():
    async with running_pipeline(tiny_plan(Path(sys.argv[2]), 2)) as pipeline:
        print(json.dumps([node.process.pid for node in pipeline.nodes]), flush=True)
        tokens = []
        def on_tokens(news):
            tokens.extend(news)
            if len(tokens) == 1:
                print("begun", flush=True)
        recorder = Recorder(Scheduler(PipeInfer()), 0, ["0", "1"])
        started = GenerationStarted(tuple(json.loads(sys.argv[3])), int(sys.argv[4]))
        await Head(pipeline, recorder, on_tokens).generate(started, Sampling())
        print(json.dumps(tokens), flush=True)

asyncio.run(main())
"""


@contextlib.contextmanager
def head_at_work(model: Path, new_tokens: int) -> Iterator[tuple["subprocess.Popen[str]", list[psutil.Process]]]:
    """A head as a process of its own in the middle of its text; its nursery and nodes."""
    here = Path(__file__).parent
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD_PROGRAM, str(here), str(model), json.dumps(PROMPT), str(new_tokens)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert head.stdout
        nodes = [psutil.Process(pid) for pid in json.loads(head.stdout.readline())]
        assert head.stdout.readline() == "begun\n"
        yield head, [nodes[0].parent(), *nodes]
    finally:
        head.kill()
        head.communicate()


def gone(processes: list[psutil.Process], within_s: float = 5.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_ctrl_c_during_a_restoration_leaves_no_process(model: Path) -> None:
    with head_at_work(model, 700) as (head, processes):
        nursery, stage, *_ = processes
        nursery.suspend()  # no new stage will be born
        stage.kill()
        assert head.stderr
        assert "restoring the pipeline, attempt 1 of 3" in head.stderr.readline()
        head.send_signal(signal.SIGINT)
        assert gone(processes)
        head.wait(5.0)


@pytest.mark.slow
def test_a_frozen_head_finds_its_stages_lost_and_goes_on(model: Path) -> None:
    expected = generate_in_one_process(StageModel(open_model(model), 0, LAYERS), PROMPT, 650)
    with head_at_work(model, 650) as (head, processes):
        head.send_signal(signal.SIGSTOP)
        time.sleep(8.0)  # its stages take it for dead after 5
        head.send_signal(signal.SIGCONT)
        printed, errors = head.communicate(timeout=60)
        assert json.loads(printed) == expected
        assert "restoring the pipeline" in errors
        assert gone(processes)
