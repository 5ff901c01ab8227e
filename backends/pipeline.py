"""A pipeline of connected nodes, as the head uses it: frames go in, results and replies come out, failures too."""

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
from backends.flow import Flow
from backends.frames import TOKEN_BYTES, Frame, FrameError, Hop, Session, decode, encode
from backends.logs import event
from backends.node import Node
from backends.outbox import Outbox
from backends.transport import DATA, DRAFT, RESULTS, describe_rpc_error, path
from pipesim.errors import PipesimError, StageFailedError

_log = logging.getLogger(__name__)
_LINK_GRACE_S = 3.0
"""A broken link is mostly the work of a dead node: its own news, more telling, may take this long."""


@dataclass(frozen=True, slots=True)
class DrafterBack:
    """A lost drafter was replaced by one that knows no text yet."""


News = tuple[Frame, int] | tuple[FromDrafter, int] | tuple[DrafterBack, int] | PipesimError
"""What reaches the head, with its size in bytes; an error says that the pipeline broke, or lost its drafter."""


class Mender(Protocol):
    """Replaces what a pipeline has lost. ``cluster.py`` has the one that knows how."""

    async def restore(self) -> None:
        """Replaces lost stages and links all of them anew. Raises StageFailedError."""

    async def replace_drafter(self) -> None:
        """Replaces a lost drafter. Raises StageFailedError."""


class Pipeline:
    """Stages in order and maybe a drafter, with the head's own streams to them. Several sessions may share them.

    A broken pipeline (``failure`` says why) carries nothing until :meth:`restore`. Then it has another ``token``:
    sessions of the old one are gone from all stages, and what is sent in their name goes nowhere. ``attempts`` is how
    often in a row restoring should be tried, 0 without a ``mender``.
    """

    def __init__(self, attempts: int = 0) -> None:
        self.stages: list[Node] = []
        self.drafter: Node | None = None
        self.failure: PipesimError | None = None
        self.broken_at = 0
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.attempts = attempts
        self.mender: Mender | None = None
        self._down_until = float("-inf")
        self._sessions = 0  # so many there were
        self._inboxes: dict[int, asyncio.Queue[News]] = {}  # by session
        self._restoring = asyncio.Lock()
        self._linked = True  # or meant to be: between unlink and connect, nobody wonders about lost links
        self._frames = Outbox("the first stage")
        self._orders = Outbox("the drafter")
        self._links: list[asyncio.Task[None]] = []  # streams to and from the stages
        self._drafts: list[asyncio.Task[None]] = []  # and the drafter
        self._mending: asyncio.Task[None] | None = None  # of the drafter
        self._grace: list[asyncio.TimerHandle] = []  # of broken links

    @property
    def nodes(self) -> list[Node]:
        """Stages in order, then the drafter."""
        return [*self.stages, self.drafter] if self.drafter else list(self.stages)

    def new_session(self) -> Session:
        """A session that was never used before, with an inbox; :meth:`forget` it in the end."""
        self._sessions += 1
        self._inboxes[self._sessions] = asyncio.Queue()
        return Session(self.token, self._sessions, epoch=0)

    def renewed(self, session: Session, epoch: int) -> Session:
        """The same session on the restored pipeline, which takes no frames of earlier epochs."""
        return Session(self.token, session.number, epoch)

    def inbox(self, session: Session) -> asyncio.Queue[News]:
        """What the session hears, in order of arrival: answers to what it has in flight, and losses."""
        return self._inboxes[session.number]

    def forget(self, session: Session) -> None:
        """Nobody reads the session's inbox any more."""
        self._inboxes.pop(session.number, None)

    def _deliver(self, number: int, news: News) -> None:
        if number in self._inboxes:  # otherwise a straggler
            self._inboxes[number].put_nowait(news)

    def _tell_all(self, news: News) -> None:
        for inbox in self._inboxes.values():
            inbox.put_nowait(news)

    # -- links -------------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Links the stages, and opens the data stream to the first one and the result stream from the last.

        Raises:
            StageFailedError: a stage refuses, or is lost.
        """
        self.failure = next((stage.failure for stage in self.stages if stage.failure), None)
        if self.failure:
            raise self.failure
        self._linked = True
        successors = [*(stage.address for stage in self.stages[1:]), None]
        await together(stage.connect(to) for stage, to in zip(self.stages, successors, strict=True))
        first, last = self.stages[0], self.stages[-1]
        data = first.channel.stream_stream(path(DATA))()
        results = last.channel.unary_stream(path(RESULTS))(self.token)
        try:
            await data.wait_for_connection()
            await results.wait_for_connection()
        except grpc.RpcError as error:
            raise StageFailedError(f"{first.name} or {last.name} refuses: {describe_rpc_error(error)}") from error
        streams = (
            self._write(Flow(data).carry(self._frames)),
            self._watch(data, first, -1),
            self._read_results(results, last),
        )
        self._links = [asyncio.create_task(stream) for stream in streams]

    async def unlink(self) -> None:
        """Ends the streams to the stages; whatever was or will be said about links up to :meth:`connect` is void."""
        self._linked = False
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._frames = Outbox("the first stage")
        for timer in self._grace:
            timer.cancel()
        self._grace.clear()
        await _end(self._links)

    async def connect_drafter(self, token: bytes) -> None:
        """Opens the draft stream to a drafter that was configured with ``token``."""
        assert self.drafter
        self._orders = Outbox(self.drafter.name)
        orders = self.drafter.channel.stream_stream(path(DRAFT))()
        try:
            await orders.write(token)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise self.drafter.failure or self.drafter.as_error(f"takes no orders ({error})") from error
        streams = (self._write(self._orders.carry(orders.write)), self._read_drafts(orders, self.drafter))
        self._drafts = [asyncio.create_task(stream) for stream in streams]

    # -- loss and repair ---------------------------------------------------------------------------------------------

    def node_failed(self, node: Node, error: PipesimError) -> None:
        """The first failure of a stage breaks the pipeline; the others come to light when it is repaired."""
        if node is self.drafter:
            if self._mending is None or self._mending.done():  # else whoever replaces it hears of it
                self._tell_all(error)
        else:
            self._break(node, error)

    def link_lost(self, node: Node, neighbour: int, reason: str) -> None:
        """A stream between nodes broke. Unless a node turns out to be dead, the link itself is to blame."""
        if node in self.stages and not self._linked:
            return  # we take the links down ourselves
        other = self.stages[neighbour].name if 0 <= neighbour < len(self.stages) else "the head"
        what = f"lost its link with {other} ({reason})"
        self._grace.append(asyncio.get_running_loop().call_later(_LINK_GRACE_S, self._give_link_up, node, what))

    def _give_link_up(self, node: Node, what: str) -> None:
        """No node was found dead: the drafter is as good as lost with its stream, stages can be linked anew."""
        if node not in self.stages or not self.attempts:
            node.fail(what)
            return
        error = node.as_error(what)
        for waiting in self.stages:  # on answers about links that will never be
            waiting.interrupt(error)
        self._break(node, error)

    def _break(self, node: Node, error: PipesimError) -> None:
        """Nothing is carried any more, as every session hears, until somebody restores the pipeline."""
        if self.failure is None:
            self.failure = error
            self.broken_at = self.stages.index(node) if node in self.stages else 0
            self._tell_all(error)

    async def restore(self, failure: PipesimError) -> None:
        """Replaces lost stages and links all of them anew, unless that was done since ``failure``.

        Raises:
            StageFailedError: that did not succeed; it may be tried again.
        """
        async with self._restoring:
            if self.failure is not failure:
                return
            if self.mender is None:
                raise failure
            try:
                await self.mender.restore()
            except StageFailedError as error:
                self.failure = error
                self._tell_all(error)  # whoever came too late to try begins with this one
                raise
            await asyncio.sleep(self._down_until - time.monotonic())

    def not_restored_before(self, moment: float) -> None:
        """:meth:`restore` ends no sooner, on the clock ``time.monotonic()``: a modelled outage."""
        self._down_until = max(self._down_until, moment)

    async def drafter_at_work(self) -> None:
        """Waits for a drafter that is being replaced. Raises StageFailedError if there is none in the end."""
        if self._mending:
            await asyncio.wait((self._mending,))
        if not self.drafter or self.drafter.failure:
            raise (self.drafter and self.drafter.failure) or StageFailedError("the pipeline has no drafter")

    def replace_drafter(self) -> None:
        """Replaces a lost drafter in the background; ``DrafterBack`` tells of success, a warning of failure."""
        if self._mending is None or self._mending.done():
            self._mending = asyncio.create_task(self._replace_drafter())

    async def _replace_drafter(self) -> None:
        assert self.mender
        await _end(self._drafts)
        try:
            await self.mender.replace_drafter()
        except PipesimError as error:
            event(_log, logging.WARNING, f"{error}; no more drafts: the text goes on without speculation")
        else:
            self._tell_all((DrafterBack(), 0))

    # -- to the nodes ------------------------------------------------------------------------------------------------

    def send(self, frame: Frame) -> int:
        """Sends a frame into the first stage; returns its size in bytes."""
        data = encode(frame)
        if frame.session.token == self.token:
            self._frames.send(data)
        return len(data)

    def cancel(self, session: Session, run_ids: Sequence[int], hops: Sequence[Hop] = ()) -> int:
        """Tells every stage that runs are dead; returns the size of one such message in bytes.

        ``hops``: how the word comes to each of the stages of an emulated cluster.
        """
        orders = [Cancel(session.number, session.epoch, tuple(run_ids), hop) for hop in hops or (None,)]
        return max(stage.send(order) for stage, order in zip(self.stages, itertools.cycle(orders), strict=False))

    def order(self, message: ToDrafter) -> int:
        """Sends a message to the drafter; returns its size in bytes."""
        data = pack(message)
        self._orders.send(data)
        return len(data)

    async def _write(self, writing: Coroutine[Any, Any, None]) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # whoever reads the call hears why
            await writing

    # -- from the nodes ----------------------------------------------------------------------------------------------

    async def _read_results(self, call: "grpc.aio.UnaryStreamCall", last: Node) -> None:
        reason = "it closed the result stream"
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                frame = decode(data)
                self._deliver(frame.session.number, (frame, len(data)))
        except grpc.RpcError as error:
            reason = describe_rpc_error(error)
        except FrameError as error:
            reason = f"malformed result: {error}"
        self.link_lost(last, len(self.stages), reason)

    async def _read_drafts(self, call: "grpc.aio.StreamStreamCall", drafter: Node) -> None:
        reason = "it closed the draft stream"
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                reply = unpack(FROM_DRAFTER, data)
                self._deliver(reply.session, (reply, len(data)))
        except grpc.RpcError as error:
            reason = describe_rpc_error(error)
        except FrameError as error:
            reason = f"malformed draft: {error}"
        self.link_lost(drafter, -1, reason)

    async def _watch(self, call: "grpc.aio.StreamStreamCall", node: Node, neighbour: int) -> None:
        try:
            code = await call.code()
            self.link_lost(node, neighbour, f"{code.name}: {await call.details()}")
        finally:
            call.cancel()

    async def close(self) -> None:
        """Ends all streams, gives foreign nodes back, ends our own processes."""
        self.failure = self.failure or StageFailedError("the pipeline was closed")
        for timer in self._grace:
            timer.cancel()
        await _end([*self._links, *self._drafts, *([self._mending] if self._mending else [])])
        await asyncio.gather(*(node.close() for node in self.nodes))


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Does all of ``work`` at once and to the end; then raises the first error, if there was one."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
