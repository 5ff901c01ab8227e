"""A stage by itself: server and stub layers in this process, the head played by the test."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from node_thread import node_thread

from backends import stage_server
from backends.compute import ComputeLoop
from backends.control import (
    FROM_NODE,
    Beat,
    Cancel,
    ConfigureDrafter,
    ConfigureStage,
    Connect,
    Connected,
    Failed,
    FromNode,
    Heartbeat,
    LinkLost,
    Ready,
    ToNode,
    pack,
    unpack,
)
from backends.flow import PIECE_BYTES, Flow
from backends.frames import (
    TOKEN_BYTES,
    Activation,
    Frame,
    FrameError,
    OpenFrame,
    ReleaseFrame,
    ResultFrame,
    RunFrame,
    Session,
    decode,
    encode,
)
from backends.lease import StageLease
from backends.outbox import MAX_WAITING, Outbox
from backends.sampling import Sampling
from backends.stage_worker import StageWorker
from backends.transport import CONTROL, DATA, RESULTS, bind, new_server, open_channel, path
from pipesim.errors import BadInputError
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import Run, RunKind

TOKEN = b"secret-secret-se"
SESSION = Session(TOKEN, 1, 0)
LAYERS = 6
TIMEOUT_S = 20.0


class StubLayers:
    """Six layers; each takes until the test lets it go or stops it. Predicts position + 1 for every row."""

    is_last = True
    arithmetic = "stub"

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.layers_run: dict[int, int] = {}
        self.admitted: list[int] = []
        self.tables: dict[int, CellTable] = {}

    def let_through(self, runs: int = 1) -> None:
        self.go.release(runs * LAYERS)

    async def entered_a_layer(self) -> None:
        await asyncio.to_thread(self.entered.acquire, timeout=TIMEOUT_S)

    def open_session(self, session: int, kv_cells: int, sequences: int, sampling: Sampling) -> None:
        self.tables[session] = CellTable(kv_cells, sequences)

    def close_session(self, session: int) -> None:
        del self.tables[session]

    def admit(self, session: int, run: Run) -> list[int]:
        self.admitted.append(run.run_id)
        return self.tables[session].admit(run)

    def forward(
        self,
        session: int,
        run: Run,
        hidden: torch.Tensor | None,
        cells: Sequence[int],
        should_stop: Callable[[], bool],
    ) -> torch.Tensor | list[int] | None:
        for layer in range(LAYERS):
            if should_stop():
                return None
            self.layers_run[run.run_id] = layer + 1
            self.entered.release()
            while not self.go.acquire(timeout=0.01):
                if should_stop():
                    return None
        return [position + 1 for position in run.positions[run.first_output_row :]]


class TestHead:
    """The head's part, by hand."""

    __test__ = False

    def __init__(self, address: str, layers: StubLayers) -> None:
        self.address, self.layers = address, layers
        self.channel = open_channel(address)
        self.control = self.channel.stream_stream(path(CONTROL))()
        self.data = self.channel.stream_stream(path(DATA))()
        self.results: Any = None

    async def configure(self) -> None:
        await self.say(ConfigureStage(TOKEN, 0, "stub", "", 0, LAYERS, "float32", "auto", 1))
        assert isinstance(await self.hear(), Ready)
        await self.say(Connect(None))
        assert isinstance(await self.hear(), Connected)
        self.results = self.channel.unary_stream(path(RESULTS))(TOKEN)
        await self.send(OpenFrame(SESSION, 50, 1, Sampling()))
        assert isinstance(await self.receive(), OpenFrame)

    async def say(self, message: ToNode) -> None:
        await self.control.write(pack(message))

    async def hear(self) -> FromNode:
        return unpack(FROM_NODE, await asyncio.wait_for(self.control.read(), TIMEOUT_S))

    async def send(self, frame: Frame) -> None:
        await self.data.write(encode(frame))

    async def receive(self) -> Frame:
        return decode(await asyncio.wait_for(self.results.read(), TIMEOUT_S))


def a_run(run_id: int, rows: int = 1) -> RunFrame:
    positions = tuple(range(10 * run_id, 10 * run_id + rows))
    run = Run(run_id, 0, RunKind.CANONICAL, positions, positions, (1,) * rows)
    return RunFrame(SESSION, run)


@contextlib.asynccontextmanager
async def stage() -> AsyncIterator[TestHead]:
    """A configured stage with its session open."""
    async with serving() as head:
        await head.configure()
        yield head


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[TestHead]:
    layers = StubLayers()
    async with node_thread(load=lambda order: layers) as address:
        head = TestHead(address, layers)
        try:
            yield head
        finally:
            layers.go.release(10**6)
            await head.channel.close()


def on_a_stage(test: Callable[[TestHead], Awaitable[None]]) -> None:
    async def run() -> None:
        async with stage() as head:
            await test(head)

    asyncio.run(run())


def test_a_run_comes_home_with_its_tokens_and_a_stamp() -> None:
    async def test(head: TestHead) -> None:
        head.layers.let_through()
        await head.send(a_run(0, rows=3))
        result = await head.receive()
        assert isinstance(result, ResultFrame)
        assert result.predictions == (1, 2, 3)
        (stamp,) = result.stamps
        assert (stamp.stage, stamp.void) == (0, False)
        assert stamp.start <= stamp.end
        assert stamp.received_bytes == len(encode(a_run(0, rows=3)))

    on_a_stage(test)


def test_a_long_frame_comes_in_pieces() -> None:
    async def test(head: TestHead) -> None:
        head.layers.let_through()
        activation = Activation("float32", (1, PIECE_BYTES), bytes(4 * PIECE_BYTES))
        long, outbox = encode(dataclasses.replace(a_run(0), activation=activation)), Outbox("the stage")
        writing = asyncio.create_task(Flow(head.data).carry(outbox))
        outbox.send(long)
        result = await head.receive()
        assert isinstance(result, ResultFrame)
        assert result.stamps[0].received_bytes == len(long)
        writing.cancel()

    on_a_stage(test)


def test_a_cancelled_run_is_aborted_between_layers() -> None:
    async def test(head: TestHead) -> None:
        await head.send(a_run(0))
        for _ in range(3):
            await head.layers.entered_a_layer()
            if head.layers.layers_run[0] < 3:
                head.layers.go.release()
        await head.say(Cancel(SESSION.number, SESSION.epoch, (0,)))
        await head.say(Heartbeat(1))  # answered after the cancellation was heard
        assert isinstance(await head.hear(), Beat)
        result = await head.receive()
        assert isinstance(result, ResultFrame)
        assert result.predictions is None
        assert result.stamps[0].void
        assert head.layers.layers_run[0] == 3, "layers 4 to 6 were computed for a dead run"

    on_a_stage(test)


def test_a_run_cancelled_before_it_arrives_is_admitted_but_not_computed() -> None:
    async def test(head: TestHead) -> None:
        await head.say(Cancel(SESSION.number, SESSION.epoch, (1,)))
        await head.say(Heartbeat(1))
        assert isinstance(await head.hear(), Beat)
        head.layers.let_through(2)
        for number in range(3):
            await head.send(a_run(number))
        results = [await head.receive() for _ in range(3)]
        assert [isinstance(one, ResultFrame) and one.predictions is None for one in results] == [False, True, False]
        assert head.layers.admitted == [0, 1, 2]
        assert sorted(head.layers.layers_run) == [0, 2]
        assert head.layers.tables[1].allocated == 3

    on_a_stage(test)


def test_cancellations_of_a_long_generation_leave_nothing_behind() -> None:
    layers = StubLayers()
    worker = StageWorker(0, layers, lambda: None)
    worker.handle(OpenFrame(SESSION, 2000, 1, Sampling()), 0)
    for number in range(1000):
        worker.cancel(SESSION.number, SESSION.epoch, (number,))  # in time: the run is void
        worker.handle(a_run(number), 0)
        worker.cancel(SESSION.number, SESSION.epoch, (number - 1, number))  # too late: these have passed
    assert not any(worker._cancelled.values())
    worker.handle(ReleaseFrame(SESSION), 0)
    worker.cancel(SESSION.number, SESSION.epoch, (1000,))
    assert not worker._cancelled


def test_a_cancellation_of_another_epoch_cancels_nothing() -> None:
    async def test(head: TestHead) -> None:
        await head.say(Cancel(SESSION.number, SESSION.epoch + 1, (0,)))
        await head.say(Heartbeat(1))
        assert isinstance(await head.hear(), Beat)
        head.layers.let_through()
        await head.send(a_run(0))
        result = await head.receive()
        assert isinstance(result, ResultFrame)
        assert result.predictions == (1,)

    on_a_stage(test)


def test_heartbeats_are_answered_in_the_middle_of_a_run() -> None:
    async def test(head: TestHead) -> None:
        await head.send(a_run(0))
        await head.layers.entered_a_layer()
        await head.say(Heartbeat(5))
        beat = await head.hear()
        assert isinstance(beat, Beat)
        assert (beat.number, beat.last_run) == (5, 0)

    on_a_stage(test)


def test_a_void_frame_passes_through_in_order() -> None:
    async def test(head: TestHead) -> None:
        void = a_run(1)
        head.layers.let_through(2)
        for frame in (a_run(0), RunFrame(SESSION, void.run, void=True), a_run(2)):
            await head.send(frame)
        home = [await head.receive() for _ in range(3)]
        assert [one.run_id for one in home if isinstance(one, ResultFrame)] == [0, 1, 2]
        assert head.layers.admitted == [0, 1, 2]

    on_a_stage(test)


def test_a_sender_that_heeds_no_bound_is_refused() -> None:
    class BusyLoop(ComputeLoop):
        waiting = MAX_WAITING

    async def test() -> None:
        order = ConfigureStage(TOKEN, 0, "stub", "", 0, LAYERS, "float32", "torch", 1)
        lease = StageLease(order, BusyLoop(), lambda _: StubLayers())
        with pytest.raises(FrameError, match=f"{MAX_WAITING} frames wait here"):
            lease.receive(a_run(0), 0)

    asyncio.run(test())


def test_a_successor_that_never_reads_is_an_error_and_not_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.outbox.MAX_WAITING", 8)

    async def test() -> None:
        async with serving() as head:
            await head.say(ConfigureStage(TOKEN, 0, "stub", "", 0, LAYERS, "float32", "torch", 1))
            assert isinstance(await head.hear(), Ready)
            await head.say(Connect(None))
            assert isinstance(await head.hear(), Connected)
            head.layers.let_through(50)
            await head.send(OpenFrame(SESSION, 50, 1, Sampling()))
            for number in range(8):
                await head.send(a_run(number))
            failed = await head.hear()
            assert isinstance(failed, Failed)
            assert "does not read: 8 messages wait for it" in failed.message

    asyncio.run(test())


def test_release_closes_the_session_and_comes_home() -> None:
    async def test(head: TestHead) -> None:
        await head.send(ReleaseFrame(SESSION))
        assert await head.receive() == ReleaseFrame(SESSION)
        assert not head.layers.tables

    on_a_stage(test)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([a_run(1), a_run(1)], "run 1 reached stage 0 after run 1"),
        ([a_run(2), a_run(0)], "run 0 reached stage 0 after run 2"),
        ([RunFrame(SESSION._replace(number=9), a_run(0).run)], "session 9"),
        ([RunFrame(SESSION._replace(epoch=1), a_run(0).run)], "epoch 1"),
        ([ResultFrame(SESSION, 0, None, ())], "only runs may"),
        ([ReleaseFrame(SESSION), a_run(0)], "not open"),
    ],
)
def test_frames_that_contradict_the_stream_are_reported_to_the_head(frames: list[Frame], message: str) -> None:
    async def test(head: TestHead) -> None:
        head.layers.let_through(9)
        for frame in frames:
            await head.send(frame)
        failed = await head.hear()
        assert isinstance(failed, Failed)
        assert message in failed.message
        assert not failed.bad_input

    on_a_stage(test)


def test_a_new_epoch_begins_with_empty_cells() -> None:
    async def test(head: TestHead) -> None:
        head.layers.let_through(2)
        later = SESSION._replace(epoch=1)
        await head.send(a_run(5))
        await head.send(OpenFrame(later, 50, 1, Sampling()))
        run = Run(0, 1, RunKind.CANONICAL, (1,), (1,), (1,))
        await head.send(RunFrame(later, run))
        for _ in range(2):
            await head.receive()
        result = await head.receive()
        assert isinstance(result, ResultFrame)
        assert result.predictions == (2,)
        assert head.layers.tables[1].allocated == 1

    on_a_stage(test)


MALFORMED = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x80\x04\x95pickle",
    encode(a_run(0))[:-1],
    encode(a_run(0)) + b"x",
    encode(a_run(0)).replace(b"PSIM", b"PSIX"),
    bytes(10_000),
]


@pytest.mark.parametrize("data", MALFORMED)
def test_a_strangers_malformed_frame_ends_his_stream_and_harms_nobody(data: bytes) -> None:
    async def test(head: TestHead) -> None:
        async with open_channel(head.address) as channel:
            call = channel.stream_stream(path(DATA))()
            await call.write(data)
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        head.layers.let_through()
        await head.send(a_run(0))
        assert isinstance(await head.receive(), ResultFrame)

    on_a_stage(test)


def test_a_strangers_well_formed_frame_is_refused() -> None:
    async def test(head: TestHead) -> None:
        foreign = SESSION._replace(token=b"x" * TOKEN_BYTES)
        async with open_channel(head.address) as channel:
            for frame in (ReleaseFrame(foreign), RunFrame(foreign, a_run(0).run)):
                call = channel.stream_stream(path(DATA))()
                await call.write(encode(frame))
                assert await call.code() is grpc.StatusCode.PERMISSION_DENIED
            results = channel.unary_stream(path(RESULTS))(b"guess")
            assert await results.code() is grpc.StatusCode.PERMISSION_DENIED
        head.layers.let_through()
        await head.send(a_run(0))
        assert isinstance(await head.receive(), ResultFrame)

    on_a_stage(test)


def test_nothing_but_the_token_of_a_strangers_frame_is_read() -> None:
    """Decoding a long one on the event loop would look like a hanging stage."""

    async def test(head: TestHead) -> None:
        header = encode(RunFrame(SESSION._replace(token=b"x" * TOKEN_BYTES), a_run(0).run))[:40]
        async with open_channel(head.address) as channel:
            call = channel.stream_stream(path(DATA))()
            await call.write(header + b"nonsense" * 1_000_000)
            assert await call.code() is grpc.StatusCode.PERMISSION_DENIED  # invalid, had the rest been looked at

    on_a_stage(test)


def test_long_control_messages_are_refused_unread() -> None:
    async def test() -> None:
        async with serving() as head:
            await head.control.write(pack(Cancel(1, 0, tuple(range(10**6)))))
            assert await head.control.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "bytes" in await head.control.details()

    asyncio.run(test())


@pytest.mark.parametrize("threads", [-1, 0, 1_000_000])
def test_threads_that_the_machine_has_not_are_refused_and_the_node_lives_on(threads: int) -> None:
    async def test() -> None:
        async with serving() as head:
            for order in (
                ConfigureStage(TOKEN, 0, "stub", "", 0, LAYERS, "float32", "auto", threads),
                ConfigureDrafter(TOKEN, "ngram", "stub", 10, 10, "float32", "auto", threads, None),
            ):
                other = TestHead(head.address, head.layers)
                await other.say(order)
                answer = await other.hear()
                assert isinstance(answer, Failed)
                assert answer.bad_input
                assert f"threads_per_stage {threads}: this machine has {os.cpu_count()} processors" in answer.message
                await other.channel.close()
            await head.configure()

    asyncio.run(test())


def test_a_write_that_breaks_because_the_caller_left_is_no_defect(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "backends.stage_server")

    class Context:
        def __init__(self, gone: bool) -> None:
            self.gone = gone

        def cancelled(self) -> bool:
            return self.gone

        def done(self) -> bool:
            return False

    async def broken_write(*_: object) -> None:
        raise grpc.aio.InternalError("Failed grpc_call_start_batch: 10")

    handle = stage_server._until_hung_up(broken_write)

    async def test() -> None:
        await handle(None, Context(gone=True))
        cancelled_later = asyncio.ensure_future(handle(None, Context(gone=False)))
        await asyncio.sleep(0.05)
        cancelled_later.cancel()
        await cancelled_later
        with pytest.raises(grpc.aio.InternalError):
            await handle(None, Context(gone=False))

    asyncio.run(test())
    assert caplog.text.count("Failed grpc_call_start_batch") == 2


def test_an_idle_stage_takes_no_frames() -> None:
    async def test() -> None:
        async with serving() as head:
            await head.send(a_run(0))
            assert await head.data.code() is grpc.StatusCode.PERMISSION_DENIED

    asyncio.run(test())


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", pack(Heartbeat(1)), pack(Connect(None))])
def test_a_control_stream_must_begin_with_a_configuration(data: bytes) -> None:
    async def test() -> None:
        async with serving() as head:
            await head.control.write(data)
            assert await head.control.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(test())


def test_a_second_head_is_turned_away_while_the_first_is_there() -> None:
    async def test(head: TestHead) -> None:
        other = TestHead(head.address, head.layers)
        await other.say(ConfigureStage(b"o" * TOKEN_BYTES, 0, "stub", "", 0, LAYERS, "float32", "auto", 1))
        assert await other.control.code() is grpc.StatusCode.FAILED_PRECONDITION
        await other.channel.close()

    on_a_stage(test)


def test_a_next_head_is_served_when_the_first_has_left_in_the_middle_of_a_run() -> None:
    async def test(head: TestHead) -> None:
        await head.send(a_run(0))
        await head.layers.entered_a_layer()
        await head.channel.close()
        while True:
            other = TestHead(head.address, head.layers)
            try:
                await other.configure()
                break
            except grpc.RpcError:  # the stage has not noticed yet
                await other.channel.close()
        await other.send(a_run(0))
        head.layers.let_through()
        assert isinstance(await other.receive(), ResultFrame)
        await other.channel.close()

    on_a_stage(test)


def test_errors_of_the_layers_reach_the_head_as_bad_input_or_failure() -> None:
    async def load(error: Exception) -> Failed:
        def broken(_: ConfigureStage) -> StubLayers:
            raise error

        async with node_thread(load=broken) as address:
            head = TestHead(address, StubLayers())
            await head.say(ConfigureStage(TOKEN, 0, "stub", "", 0, LAYERS, "float32", "auto", 1))
            answer = await head.hear()
            await head.channel.close()
        assert isinstance(answer, Failed)
        return answer

    bad = asyncio.run(load(BadInputError("no such layer")))
    assert (bad.message, bad.bad_input) == ("no such layer", True)
    failed = asyncio.run(load(MemoryError("too big")))
    assert (failed.message, failed.bad_input) == ("MemoryError: too big", False)


def test_a_broken_link_to_the_successor_is_reported() -> None:
    async def test() -> None:
        with socket.socket() as listener:  # accepts, but speaks no gRPC
            listener.bind(("127.0.0.1", 0))
            dead = f"127.0.0.1:{listener.getsockname()[1]}"
        async with serving() as head:
            await head.say(ConfigureStage(TOKEN, 0, "stub", "", 0, LAYERS, "float32", "auto", 1))
            assert isinstance(await head.hear(), Ready)
            await head.say(Connect(dead))
            lost = await head.hear()
            assert isinstance(lost, LinkLost)
            assert lost.neighbour == 1
            assert "UNAVAILABLE" in lost.reason

    asyncio.run(test())


def test_activations_of_a_wrong_shape_fail_the_stage_with_both_shapes() -> None:
    async def test(head: TestHead) -> None:
        class Picky(StubLayers):
            def forward(self, session: int, run: Run, hidden: torch.Tensor | None, *_: Any) -> Any:
                assert hidden is not None
                raise BadInputError(f"hidden states must be [1, 8], got {list(hidden.shape)}")

        head.layers.forward = Picky().forward  # type: ignore[method-assign]
        run = a_run(0)
        await head.send(RunFrame(SESSION, run.run, Activation("float32", (1, 4), bytes(16))))
        failed = await head.hear()
        assert isinstance(failed, Failed)
        assert "must be [1, 8], got [1, 4]" in failed.message

    on_a_stage(test)


def test_a_port_in_use_is_bad_input_that_names_it() -> None:
    async def test() -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            with pytest.raises(BadInputError, match=address):
                bind(new_server(), address)

    asyncio.run(test())


@pytest.mark.parametrize("address", ["localhost", "1.2.3.4:", ":5", "host:port", "host:70000", ""])
def test_malformed_addresses_are_bad_input(address: str) -> None:
    async def test() -> None:
        with pytest.raises(BadInputError, match="HOST:PORT"):
            bind(new_server(), address)

    asyncio.run(test())
