"""The gRPC side of a node: takes one head at a time, and makes a stage or a drafter of itself as that head asks."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, cast

import grpc
import grpc.aio

from backends.compute import ComputeLoop
from backends.control import TO_NODE, ConfigureDrafter, ConfigureStage, Failed, pack, unpack
from backends.drafter_server import DrafterLease
from backends.flow import Joiner
from backends.frames import FrameError, StrangerError, decode
from backends.lease import Lease, LoadLayers, Passage, StageLease
from backends.transport import CONTROL, DATA, DRAFT, RESULTS, SERVICE

_log = logging.getLogger(__name__)
_Context = Any  # grpc.aio.ServicerContext: grpc ships no types
_Code = grpc.StatusCode
_Handler = Callable[[Any, _Context], Awaitable[None]]
_MAX_CONTROL_BYTES = 2**20
_MAX_DRAFT_BYTES = 2**24  # a whole text, twice
_CANCELLED_WITHIN_S = 1.0
_NOT_OURS = "no head has configured this stage for the sender"


def load_layers(order: ConfigureStage, device: str = "cpu") -> Any:
    """Reads the layers that a stage was told to serve, on ``device`` unless it was told another.

    Imports PyTorch, which other nodes do without.
    """
    from backends import stage_worker

    return stage_worker.load_layers(order, device)


class NodeServer:
    """Serves the four streams of ``transport.py`` on ``compute``. ``load`` reads the layers of a stage."""

    def __init__(self, compute: ComputeLoop, load: LoadLayers = load_layers) -> None:
        self._compute = compute
        self._load = load
        self._lease: Lease | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the streams; messages are raw bytes in both directions."""
        handlers = {
            CONTROL: grpc.stream_stream_rpc_method_handler(_until_hung_up(self._control)),
            DATA: grpc.stream_stream_rpc_method_handler(_until_hung_up(self._data)),
            RESULTS: grpc.unary_stream_rpc_method_handler(_until_hung_up(self._results)),
            DRAFT: grpc.stream_stream_rpc_method_handler(_until_hung_up(self._draft)),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def close(self) -> None:
        """Ends the service of a head that is still there."""
        if self._lease:
            self._lease.close()

    async def _control(self, _: Any, context: _Context) -> None:
        data = await context.read()
        if data is grpc.aio.EOF:
            return
        if self._lease is not None:
            await _refuse(context, _Code.FAILED_PRECONDITION, "this stage serves another head at the moment")
        try:
            order = unpack(TO_NODE, _bounded(data, _MAX_CONTROL_BYTES))
        except FrameError as error:
            await _refuse(context, _Code.INVALID_ARGUMENT, str(error))
        if isinstance(order, ConfigureStage | ConfigureDrafter) and (refusal := _threads_refusal(order.threads)):
            await context.write(pack(Failed(refusal, bad_input=True)))
            return
        if isinstance(order, ConfigureStage):
            lease: Lease = StageLease(order, self._compute, self._load)
        elif isinstance(order, ConfigureDrafter):
            lease = DrafterLease(order, self._compute)
        else:
            await _refuse(context, _Code.INVALID_ARGUMENT, "the first message must configure the node")
        self._lease = lease
        answers = _answering(_answer(lease, context))
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                lease.handle(unpack(TO_NODE, _bounded(data, _MAX_CONTROL_BYTES)))
        except FrameError as error:
            await _refuse(context, _Code.INVALID_ARGUMENT, str(error))
        finally:
            _log.info("the head at %s left", context.peer())
            lease.close()
            self._lease = None
            await _finish(answers)

    async def _data(self, _: Any, context: _Context) -> None:
        await context.send_initial_metadata(())  # tells the predecessor that it is connected
        messages = Joiner(context)
        passage: Passage | None = None
        reason = "closed by the predecessor"
        try:
            while (data := await messages.read()) is not grpc.aio.EOF:
                try:
                    frame = decode(data, self._admits_to_stage)
                    lease = cast(StageLease, self._lease)  # which has admitted the frame
                    if passage is None:
                        if lease.passage.has_predecessor:
                            await _refuse(context, _Code.FAILED_PRECONDITION, "this stage has a predecessor already")
                        passage = lease.passage
                        passage.has_predecessor = True
                    lease.receive(frame, len(data))
                except StrangerError:
                    await _refuse(context, _Code.PERMISSION_DENIED, _NOT_OURS)
                except FrameError as error:
                    reason = f"refused a frame: {error}"
                    await _refuse(context, _Code.INVALID_ARGUMENT, str(error))
        except asyncio.CancelledError:
            reason = "the predecessor is gone"
            raise
        finally:
            if passage is not None:
                lease.predecessor_left(passage, reason)

    async def _results(self, token: bytes, context: _Context) -> None:
        lease = await self._lease_for(StageLease, token, context)
        outgoing = lease.passage.outgoing
        await context.send_initial_metadata(())
        await outgoing.carry(context.write)

    async def _draft(self, _: Any, context: _Context) -> None:
        token = await context.read()
        if token is grpc.aio.EOF:
            return
        lease = await self._lease_for(DrafterLease, token, context)
        answers = _answering(lease.answer(context))
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                lease.receive(_bounded(data, _MAX_DRAFT_BYTES))
        except FrameError as error:
            await _refuse(context, _Code.INVALID_ARGUMENT, str(error))
        finally:
            lease.hang_up()
            await _finish(answers)

    async def _lease_for(self, kind: type[Any], token: bytes, context: _Context) -> Any:
        """The lease under way, if it is of this kind and the sender has its token; otherwise ends the stream."""
        lease = self._lease
        if not isinstance(lease, kind) or not lease.admits(token):
            await _refuse(context, _Code.PERMISSION_DENIED, _NOT_OURS)
        return lease

    def _admits_to_stage(self, token: bytes) -> bool:
        return isinstance(self._lease, StageLease) and self._lease.admits(token)


def _until_hung_up(handler: _Handler) -> _Handler:
    """gRPC cancels the handler of a caller who is gone, and would log that as a defect.

    A write under way at that moment may break just before the cancellation arrives.
    """

    async def handle(request: Any, context: _Context) -> None:
        try:
            try:
                await handler(request, context)
            except grpc.aio.InternalError as error:
                if not context.cancelled() and not context.done():
                    await asyncio.sleep(_CANCELLED_WITHIN_S)  # ended by the cancellation
                    raise
                _log.debug("the caller is gone: %r", error)
        except asyncio.CancelledError as cancelled:
            _log.debug("the caller is gone: %r", cancelled.__context__ or cancelled)

    return handle


def _bounded(data: bytes, limit: int) -> bytes:
    """``data``, unless it would keep the event loop busy for long."""
    if len(data) > limit:
        raise FrameError(f"a message of {len(data)} bytes, {limit} are allowed")
    return data


def _threads_refusal(threads: int) -> str | None:
    """Why so many threads cannot be had: PyTorch crashes when the system has no more of them."""
    processors = os.cpu_count() or 1
    if 1 <= threads <= processors:
        return None
    return f"execution.threads_per_stage {threads}: this machine has {processors} processors, use 1 to {processors}"


async def _answer(lease: Lease, context: _Context) -> None:
    while (message := await lease.to_head.get()) is not None:
        await context.write(pack(message))


def _answering(answers: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Starts a stream's answers. What ends them is logged: mostly the head has left in the middle of a write."""

    def note(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            _log.debug("the last answers did not arrive: %r", error)

    task = asyncio.create_task(answers)
    task.add_done_callback(note)
    return task


async def _finish(answers: asyncio.Task[None]) -> None:
    """Lets a write under way come to its end: gRPC cannot close a stream during one."""
    await asyncio.wait((answers,), timeout=1.0)
    answers.cancel()


async def _refuse(context: _Context, code: grpc.StatusCode, why: str) -> NoReturn:
    """Ends the stream with a status; nothing else in the process notices."""
    _log.warning("refused a stream of %s: %s", context.peer(), why)
    await context.abort(code, why)
    raise AssertionError("abort raises")
