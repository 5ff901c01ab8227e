"""A pipeline of connected nodes, as the head uses it: frames go in, results and replies come out, failures too."""

import asyncio
import contextlib
import secrets
from collections.abc import Sequence

import grpc
import grpc.aio

from backends.control import (
    FROM_DRAFTER,
    Cancel,
    FromDrafter,
    ToDrafter,
    pack,
    unpack,
)
from backends.frames import TOKEN_BYTES, Frame, FrameError, Session, decode, encode
from backends.node import Node
from backends.transport import DATA, DRAFT, RESULTS, describe_rpc_error, path
from pipesim.errors import PipesimError, StageFailedError

_LINK_GRACE_S = 3.0
"""A broken link is mostly the work of a dead node: its own news, more telling, may take this long."""

News = tuple[Frame, int] | tuple[FromDrafter, int] | PipesimError
"""What reaches the head, with its size in bytes."""


class Pipeline:
    """Stages in order and maybe a drafter, with the head's own streams to them.

    ``inbox`` holds the news in order of arrival; a PipesimError in it is the last word.
    """

    def __init__(self, token: bytes) -> None:
        self.stages: list[Node] = []
        self.drafter: Node | None = None
        self.inbox: asyncio.Queue[News] = asyncio.Queue()
        self.failure: PipesimError | None = None
        self.token = token
        self._sessions = 0
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self._orders: asyncio.Queue[bytes] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._grace: list[asyncio.TimerHandle] = []

    @property
    def nodes(self) -> list[Node]:
        """Stages in order, then the drafter."""
        return [*self.stages, self.drafter] if self.drafter else list(self.stages)

    @staticmethod
    def new_token() -> bytes:
        """A secret that senders show to a pipeline's nodes."""
        return secrets.token_bytes(TOKEN_BYTES)

    def new_session(self) -> Session:
        """A session that was never used before."""
        self._sessions += 1
        return Session(self.token, self._sessions, epoch=0)

    async def connect(self) -> None:
        """Opens the data stream to the first stage, the result stream from the last, and the drafter's stream.

        Raises:
            StageFailedError: a stage refuses.
        """
        first, last = self.stages[0], self.stages[-1]
        data = first.channel.stream_stream(path(DATA))()
        results = last.channel.unary_stream(path(RESULTS))(self.token)
        try:
            await data.wait_for_connection()
            await results.wait_for_connection()
        except grpc.RpcError as error:
            raise StageFailedError(f"{first.name} or {last.name} refuses: {describe_rpc_error(error)}") from error
        self._serve(self._write(data, self._frames), self._watch(data, first, -1), self._read_results(results, last))
        if self.drafter:
            orders = self.drafter.channel.stream_stream(path(DRAFT))()
            await orders.write(self.token)
            self._serve(self._write(orders, self._orders), self._read_drafts(orders, self.drafter))

    def _serve(self, *streams: "asyncio._CoroutineLike[None]") -> None:
        self._tasks += [asyncio.create_task(stream) for stream in streams]

    # -- to the nodes ------------------------------------------------------------------------------------------------

    def send(self, frame: Frame) -> int:
        """Sends a frame into the first stage; returns its size in bytes."""
        data = encode(frame)
        self._frames.put_nowait(data)
        return len(data)

    def cancel(self, session: Session, run_ids: Sequence[int]) -> int:
        """Tells every stage that runs are dead; returns the size of one such message in bytes."""
        order = Cancel(session.number, session.epoch, tuple(run_ids))
        return max(stage.send(order) for stage in self.stages)

    def order(self, message: ToDrafter) -> int:
        """Sends a message to the drafter; returns its size in bytes."""
        data = pack(message)
        self._orders.put_nowait(data)
        return len(data)

    async def _write(self, call: "grpc.aio.StreamStreamCall", queue: asyncio.Queue[bytes]) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # whoever reads the call hears why
            while True:
                await call.write(await queue.get())

    # -- from the nodes ----------------------------------------------------------------------------------------------

    async def _read_results(self, call: "grpc.aio.UnaryStreamCall", last: Node) -> None:
        reason = "it closed the result stream"
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                self.inbox.put_nowait((decode(data), len(data)))
        except grpc.RpcError as error:
            reason = describe_rpc_error(error)
        except FrameError as error:
            reason = f"malformed result: {error}"
        self.link_lost(last, len(self.stages), reason)

    async def _read_drafts(self, call: "grpc.aio.StreamStreamCall", drafter: Node) -> None:
        reason = "it closed the draft stream"
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                self.inbox.put_nowait((unpack(FROM_DRAFTER, data), len(data)))
        except grpc.RpcError as error:
            reason = describe_rpc_error(error)
        except FrameError as error:
            reason = f"malformed draft: {error}"
        self.link_lost(drafter, -1, reason)

    async def _watch(self, call: "grpc.aio.StreamStreamCall", node: Node, neighbour: int) -> None:
        code = await call.code()
        self.link_lost(node, neighbour, f"{code.name}: {await call.details()}")

    def node_failed(self, node: Node, error: PipesimError) -> None:
        """The first failure ends the pipeline."""
        del node
        if self.failure is None:
            self.failure = error
            self.inbox.put_nowait(error)

    def link_lost(self, node: Node, neighbour: int, reason: str) -> None:
        """A stream between nodes broke. Unless a node turns out to be dead, the link itself is to blame."""
        other = self.stages[neighbour].name if 0 <= neighbour < len(self.stages) else "the head"
        what = f"lost its link with {other} ({reason})"
        self._grace.append(asyncio.get_running_loop().call_later(_LINK_GRACE_S, node.fail, what))

    async def close(self) -> None:
        """Ends all streams, gives foreign nodes back, ends our own processes."""
        self.failure = self.failure or StageFailedError("the pipeline was closed")
        for timer in self._grace:
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(node.close() for node in self.nodes))
