"""A node in the service of one head: from the head's first control message until its control stream ends."""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from backends.compute import ComputeLoop
from backends.control import (
    Beat,
    Cancel,
    ConfigureStage,
    Connect,
    Connected,
    Failed,
    FromNode,
    Heartbeat,
    LinkLost,
    Ready,
    Reset,
    ToNode,
)
from backends.flow import Flow
from backends.frames import Frame, FrameError, encode
from backends.logs import event, name_node
from backends.outbox import MAX_WAITING, Outbox
from backends.transport import DATA, describe_rpc_error, open_channel, path
from pipesim.errors import BadInputError, PipesimError

if TYPE_CHECKING:
    from backends.stage_worker import Layers, StageWorker

_log = logging.getLogger(__name__)
_CONNECT_S = 10.0

LoadLayers = Callable[[ConfigureStage], "Layers"]


class Lease:
    """What stages and drafters have in common: the token, the way back to the head, heartbeats, failure.

    ``to_head`` is sent on the control stream by the server, up to a None. A lease belongs to the node's one thread.
    """

    def __init__(self, token: bytes, compute: ComputeLoop) -> None:
        self.to_head: asyncio.Queue[FromNode | None] = asyncio.Queue()
        self.failed = False
        self.closed = False
        self.compute = compute
        self._token = token

    def admits(self, token: bytes) -> bool:
        """Whether the sender was sent by our head."""
        return hmac.compare_digest(token, self._token)

    def tell(self, message: FromNode) -> None:
        """Sends ``message`` to the head."""
        self.to_head.put_nowait(message)

    def fail(self, error: Exception) -> None:
        """Reports the error that ends the service."""
        if self.closed or self.failed:
            return
        self.failed = True
        if not isinstance(error, PipesimError):
            _log.error("unexpected %s", type(error).__name__, exc_info=error)
        message = str(error) if isinstance(error, PipesimError) else f"{type(error).__name__}: {error}"
        self.tell(Failed(message, isinstance(error, BadInputError)))

    def handle(self, message: ToNode) -> None:
        """Takes one message of the head. Raises FrameError for one that makes no sense here."""
        if not isinstance(message, Heartbeat):
            raise FrameError(f"a {type(message).__name__} message is out of place here")
        self.tell(Beat(message.number, time.monotonic(), self.last_run))

    @property
    def last_run(self) -> int:
        """The last run that was handled, -1 if none was."""
        return -1

    def close(self) -> None:
        """The head has left."""
        self.closed = True
        self.to_head.put_nowait(None)


class Passage:
    """One epoch's way through a stage. A later epoch has its own: what is still on the way here gets no further.

    ``outgoing`` takes encoded frames for the successor or, on the last stage, the head.
    """

    def __init__(self) -> None:
        self.outgoing = Outbox("what comes after this stage")
        self.has_predecessor = False
        self.link: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Hangs up."""
        if self.link:
            self.link.cancel()
        self.outgoing.close()


class StageLease(Lease):
    """A stage of a pipeline; ``passage`` is the way of its frames at present."""

    def __init__(self, order: ConfigureStage, compute: ComputeLoop, load: LoadLayers) -> None:
        super().__init__(order.token, compute)
        self.passage = Passage()
        self._stage = order.stage
        name_node(f"stage {order.stage}")
        self._worker: StageWorker | None = None
        compute.submit(lambda: self._load(order, load), self.fail)

    @property
    def last_run(self) -> int:
        """The last run that was handled, -1 if none was."""
        return self._worker.last_run if self._worker else -1

    def _load(self, order: ConfigureStage, load: LoadLayers) -> None:
        from backends.stage_worker import StageWorker  # imports PyTorch

        start = time.monotonic()
        layers = load(order)
        compute = self.compute
        self._worker = StageWorker(
            order.stage, layers, compute.checkpoint, compute.pause, order.emulated, order.compression
        )
        event(
            *(_log, logging.INFO, "loaded"),
            model=order.model,
            layers=[order.first_layer, order.last_layer],
            arithmetic=layers.arithmetic,
            seconds=round(time.monotonic() - start, 3),
        )
        self.tell(Ready(layers.arithmetic))

    def handle(self, message: ToNode) -> None:
        """Takes one message of the head."""
        match message:
            case Cancel(session, epoch, run_ids, hop) if self._worker:
                self._worker.cancel(session, epoch, run_ids, hop)
            case Connect(successor) if self._worker and not self.passage.link:
                self.passage.link = asyncio.create_task(self._serve_link(self.passage, successor))
            case Reset(token) if self._worker:
                self._reset(self._worker, token)
            case _:
                super().handle(message)

    def _reset(self, worker: "StageWorker", token: bytes) -> None:
        """Stops computing for the epoch that broke, and serves ``token`` from then on."""
        self._token = token
        self.passage.close()
        self.passage = Passage()
        worker.abandon()

        def forget() -> None:
            worker.close()
            self.tell(Ready())

        self.compute.submit(forget, self.fail)

    def receive(self, frame: Frame, received_bytes: int) -> None:
        """Queues one frame from the predecessor. Raises FrameError if it sends more than may ever be in flight."""
        if self.compute.waiting >= MAX_WAITING:
            raise FrameError(f"{MAX_WAITING} frames wait here: the sender does not heed what may be in flight")
        passage, received = self.passage, time.monotonic()
        self.compute.submit(lambda: self._compute(passage, frame, received_bytes, received), self.fail)

    def _compute(self, passage: Passage, frame: Frame, received_bytes: int, received: float) -> None:
        if self.failed or self.closed or passage is not self.passage:
            return
        if self._worker is None:
            raise FrameError(f"stage {self._stage} got a frame before it was ready")
        passage.outgoing.send(encode(self._worker.handle(frame, received_bytes, received)))

    def link_lost(self, passage: Passage, neighbour: int, reason: str) -> None:
        """A data stream broke; the head finds out whose fault it is."""
        if not self.closed and passage is self.passage:
            event(_log, logging.INFO, "link lost", neighbour=neighbour, reason=reason)
            self.tell(LinkLost(neighbour, reason))

    def predecessor_left(self, passage: Passage, reason: str) -> None:
        """The stream that brought our frames ended."""
        passage.has_predecessor = False
        self.link_lost(passage, self._stage - 1, reason)

    async def _serve_link(self, passage: Passage, successor: str | None) -> None:
        if successor is None:
            self.tell(Connected())
            return
        async with open_channel(successor) as channel:
            call = channel.stream_stream(path(DATA))()
            try:
                await asyncio.wait_for(call.wait_for_connection(), _CONNECT_S)
                self.tell(Connected())
                ended = asyncio.create_task(call.code())
                sending = asyncio.create_task(Flow(call).carry(passage.outgoing))
                await asyncio.wait((ended, sending), return_when=asyncio.FIRST_COMPLETED)
                sending.cancel()
                code = await call.code()
                self.link_lost(passage, self._stage + 1, f"{code.name}: {await call.details()}")
            except TimeoutError:
                self.link_lost(passage, self._stage + 1, f"{successor} does not answer")
            except grpc.RpcError as error:
                self.link_lost(passage, self._stage + 1, describe_rpc_error(error))

    def close(self) -> None:
        """The head has left: stop computing at the next layer, close the sessions, hang up."""
        if self.closed:
            return
        super().close()
        if self._worker:
            self._worker.abandon()
            self.compute.submit(self._worker.close, self.fail)
        self.passage.close()
