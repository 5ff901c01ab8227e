"""The head's end of a node's control stream: configuration, heartbeats, the node's clock, and the news of its end."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import grpc
import grpc.aio

from backends.control import (
    FROM_NODE,
    Beat,
    ConfigureDrafter,
    ConfigureStage,
    Connect,
    Connected,
    Failed,
    Heartbeat,
    LinkLost,
    Ready,
    Reset,
    ToNode,
    pack,
    unpack,
)
from backends.frames import FrameError
from backends.logs import event
from backends.outbox import Outbox
from backends.processes import NodeProcess
from backends.transport import CONTROL, describe_rpc_error, open_channel, path
from pipesim.errors import BadInputError, PipesimError, StageFailedError

_log = logging.getLogger(__name__)
HEARTBEAT_S = 0.5
MISSED_BEATS = 5
"""So many heartbeats in a row without an answer, and the node counts as hung (2.5 s)."""
_CLOCK_SAMPLES = 8
_CONNECT_S = 5.0
_RESET_S = 10.0

LinkLostHandler = Callable[["Node", int, str], None]


class Node:
    """A stage or the drafter, as the head sees it.

    ``on_failure`` hears once when the node is dead, hung or says that it failed; ``on_link_lost`` when it lost a
    neighbour. ``name`` is for people: part, address, layers. ``clock_offset`` is the node's clock minus ours, in
    seconds, by the fastest heartbeat so far; ``last_run`` is the last run that it is known to have handled. ``process``
    is None for a node that somebody else started; ``ready`` says that it has done all that it was asked for, and
    ``watched`` that a missing heartbeat would be noticed. ``arithmetic`` is what a configured stage computes with.
    """

    def __init__(
        self,
        name: str,
        address: str,
        process: NodeProcess | None,
        on_failure: Callable[["Node", PipesimError], None],
        on_link_lost: LinkLostHandler,
    ) -> None:
        self.name = name
        self.address = address
        self.channel = open_channel(address)
        self.clock_offset = 0.0
        self.last_run = -1
        self.arithmetic = ""
        self.failure: PipesimError | None = None
        self.process = process
        self.ready = False
        self.watched = False
        self._on_failure, self._on_link_lost = on_failure, on_link_lost
        self._outbox = Outbox(name)
        self._call: grpc.aio.StreamStreamCall | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._awaited: type[Ready | Connected] = Ready
        self._beats: dict[int, float] = {}  # unanswered heartbeat -> when it was sent
        self._next_beat = 0
        self._best_round_trip = float("inf")
        self._beaten = asyncio.Event()

    def send(self, message: ToNode) -> int:
        """Sends a message, after those before it; returns its size in bytes."""
        data = pack(message)
        self._outbox.send(data)
        return len(data)

    async def configure(self, order: ConfigureStage | ConfigureDrafter) -> None:
        """Connects, and returns when the node has loaded what it was told to.

        Raises:
            BadInputError: nobody answers there, it serves another head, or it cannot load what the user wants.
            StageFailedError: it failed.
        """
        try:
            await asyncio.wait_for(self.channel.channel_ready(), _CONNECT_S)
        except TimeoutError:
            await self._give_up()
        self._call = self.channel.stream_stream(path(CONTROL))()
        self._tasks = [asyncio.create_task(self._write(self._call)), asyncio.create_task(self._read(self._call))]
        await self._ask(order, Ready)

    async def _give_up(self) -> None:
        if self.process:
            raise StageFailedError(f"{self.name} does not answer, it {self.process.fate}")
        raise BadInputError(
            f"{self.name} does not answer: start it with `pipesim stage --listen {self.address}`, or fix the address"
        )

    async def connect(self, successor: str | None) -> None:
        """Makes a stage open its data stream to ``successor`` (None: it is the last)."""
        await self._ask(Connect(successor), Connected)

    async def reset(self, token: bytes) -> None:
        """Makes a stage that has lost a neighbour forget everything but its layers; it serves ``token`` then.

        What it says about lost links before this returns is about the links that it has forgotten.

        Raises:
            StageFailedError: it failed, or does not answer within ``_RESET_S``.
        """
        try:
            await asyncio.wait_for(self._ask(Reset(token), Ready), _RESET_S)
        except TimeoutError:
            self.fail(f"did not let go of its links within {_RESET_S:g} s")
            raise self.failure or StageFailedError(self.name) from None

    def interrupt(self, error: PipesimError) -> None:
        """Whoever waits for an answer of this node waits in vain: ``error`` happened, though not to the node."""
        if not self._reply.done():
            self._reply.set_exception(error)
            self._reply.exception()  # nobody need be waiting

    async def _ask(self, message: ToNode, awaited: type[Ready | Connected]) -> None:
        if self.failure:
            raise self.failure
        self.ready = False
        self._awaited = awaited  # a late answer to an earlier question is of another type
        self._reply = asyncio.get_running_loop().create_future()
        self.send(message)
        await self._reply
        self.ready = True

    async def watch(self) -> None:
        """Measures the node's clock, then goes on with heartbeats.

        Raises:
            PipesimError: it failed, or does not answer.
        """
        self.ready = False
        for _ in range(_CLOCK_SAMPLES):
            if not self.failure:
                self._beaten.clear()
                self._beat()
                try:
                    await asyncio.wait_for(self._beaten.wait(), HEARTBEAT_S * MISSED_BEATS)
                except TimeoutError:
                    self.fail(f"does not answer heartbeats, for {HEARTBEAT_S * MISSED_BEATS} s: it hangs")
            if self.failure:
                raise self.failure
        self.ready = self.watched = True
        self._tasks.append(asyncio.create_task(self._keep_beating()))

    def _beat(self) -> None:
        self._beats[self._next_beat] = time.monotonic()
        self.send(Heartbeat(self._next_beat))
        self._next_beat += 1

    async def _keep_beating(self) -> None:
        # Unanswered beats are counted, not timed: if we are suspended, nobody else is to blame.
        while len(self._beats) < MISSED_BEATS:
            self._beat()
            await asyncio.sleep(HEARTBEAT_S)
        self.fail(f"has not answered {MISSED_BEATS} heartbeats, {HEARTBEAT_S * MISSED_BEATS} s: it hangs")

    def _hear_beat(self, beat: Beat) -> None:
        now, sent = time.monotonic(), self._beats.get(beat.number)
        if sent is None:
            raise FrameError(f"{self.name} answered heartbeat {beat.number}, which was not open")
        for number in [number for number in self._beats if number <= beat.number]:
            del self._beats[number]
        self.last_run = beat.last_run
        if now - sent < self._best_round_trip:
            self._best_round_trip = now - sent
            self.clock_offset = beat.clock - (now + sent) / 2
        self._beaten.set()

    async def _write(self, call: "grpc.aio.StreamStreamCall") -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # the reader hears why it broke
            await self._outbox.carry(call.write)

    async def _read(self, call: "grpc.aio.StreamStreamCall") -> None:
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                match unpack(FROM_NODE, data):
                    case Beat() as beat:
                        self._hear_beat(beat)
                    case Failed(message, bad_input):
                        self._failed(
                            BadInputError(f"{self.name}: {message}")
                            if bad_input
                            else self.as_error(f"failed: {message}")
                        )
                    case LinkLost(neighbour, reason):
                        self._on_link_lost(self, neighbour, reason)
                    case Ready() | Connected() as answer if type(answer) is self._awaited and not self._reply.done():
                        if isinstance(answer, Ready) and answer.arithmetic:
                            self.arithmetic = answer.arithmetic
                        self._reply.set_result(None)
            self.fail("has hung up")
        except FrameError as error:
            self.fail(f"talks nonsense: {error}")
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                self._failed(BadInputError(f"{self.name} is not free: {error.details()}"))
                return
            if self.process and await self.process.ended(within_s=0.5):
                self.fail(f"is dead, its process {self.process.fate}")
            else:
                self.fail(f"is gone ({describe_rpc_error(error)})")

    def fail(self, what: str) -> None:
        """Declares the node lost: ``what`` completes the sentence that begins with its name."""
        self._failed(self.as_error(what))

    def as_error(self, what: str) -> StageFailedError:
        """An error that begins with the node's name, goes on with ``what``, and ends with its last frame."""
        last = "it had handled no frame" if self.last_run < 0 else f"the last frame it handled: run {self.last_run}"
        return StageFailedError(f"{self.name} {what}; {last}")

    def _failed(self, error: PipesimError) -> None:
        if self.failure:
            return
        self.failure = error
        event(_log, logging.DEBUG, str(error))
        self.interrupt(error)
        self._beaten.set()  # nobody need wait for a beat any more
        self._on_failure(self, error)

    async def close(self) -> None:
        """Gives the node back, or ends its process if it is ours."""
        self.failure = self.failure or StageFailedError(f"{self.name} was closed")
        for task in self._tasks:
            task.cancel()
        self._reply.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._call:
            self._call.cancel()
        await self.channel.close()
