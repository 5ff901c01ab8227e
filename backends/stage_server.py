"""The gRPC side of a node: takes one head at a time, and makes a stage or a drafter of itself as that head asks."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio

from backends.compute import ComputeThread
from backends.control import TO_NODE, ConfigureDrafter, ConfigureStage, pack, unpack
from backends.drafter_server import DrafterLease
from backends.frames import FrameError, decode
from backends.lease import Lease, LoadLayers, StageLease
from backends.transport import CONTROL, DATA, DRAFT, RESULTS, SERVICE

_log = logging.getLogger(__name__)
_Context = Any  # grpc.aio.ServicerContext: grpc ships no types
_Code = grpc.StatusCode
_Handler = Callable[[Any, _Context], Awaitable[None]]


def _load_layers(order: ConfigureStage) -> Any:
    from backends.stage_worker import load_layers  # PyTorch is imported here, on the compute thread

    return load_layers(order)


class NodeServer:
    """Serves the four streams of ``transport.py``. ``load`` reads the layers of a stage."""

    def __init__(self, load: LoadLayers = _load_layers) -> None:
        self._compute = ComputeThread()
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
        """Ends the compute thread once it is done with what it has."""
        if self._lease:
            self._lease.close()
        self._compute.stop()

    async def _control(self, _: Any, context: _Context) -> None:
        data = await context.read()
        if data is grpc.aio.EOF:
            return
        try:
            order = unpack(TO_NODE, data)
        except FrameError as error:
            await _refuse(context, _Code.INVALID_ARGUMENT, str(error))
        if self._lease is not None:
            await _refuse(context, _Code.FAILED_PRECONDITION, "this stage serves another head at the moment")
        if isinstance(order, ConfigureStage):
            lease: Lease = StageLease(order, self._compute, self._load)
        elif isinstance(order, ConfigureDrafter):
            lease = DrafterLease(order, self._compute)
        else:
            await _refuse(context, _Code.INVALID_ARGUMENT, "the first message must configure the node")
        self._lease = lease
        answers = asyncio.create_task(_answer(lease, context))
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                lease.handle(unpack(TO_NODE, data))
        except FrameError as error:
            await _refuse(context, _Code.INVALID_ARGUMENT, str(error))
        finally:
            _log.info("the head at %s left", context.peer())
            lease.close()
            self._lease = None
            await _finish(answers)

    async def _data(self, _: Any, context: _Context) -> None:
        await context.send_initial_metadata(())  # tells the predecessor that it is connected
        lease: StageLease | None = None
        reason = "closed by the predecessor"
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                try:
                    frame = decode(data)
                except FrameError as error:
                    reason = f"malformed frame: {error}"
                    await _refuse(context, _Code.INVALID_ARGUMENT, str(error))
                current = await self._lease_for(StageLease, frame.session.token, context)
                if lease is None:
                    if current.has_predecessor:
                        await _refuse(context, _Code.FAILED_PRECONDITION, "this stage has a predecessor already")
                    lease = current
                    lease.has_predecessor = True
                lease.receive(frame, len(data))
        except asyncio.CancelledError:
            reason = "the predecessor is gone"
            raise
        finally:
            if lease is not None:
                lease.predecessor_left(reason)

    async def _results(self, token: bytes, context: _Context) -> None:
        lease = await self._lease_for(StageLease, token, context)
        await context.send_initial_metadata(())
        while (data := await lease.outgoing.get()) is not None:
            await context.write(data)

    async def _draft(self, _: Any, context: _Context) -> None:
        token = await context.read()
        if token is grpc.aio.EOF:
            return
        lease = await self._lease_for(DrafterLease, token, context)
        answers = asyncio.create_task(lease.answer(context))
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                lease.receive(data)
        except FrameError as error:
            await _refuse(context, _Code.INVALID_ARGUMENT, str(error))
        finally:
            lease.hang_up()
            await _finish(answers)

    async def _lease_for(self, kind: type[Any], token: bytes, context: _Context) -> Any:
        """The lease under way, if it is of this kind and the sender has its token; otherwise ends the stream."""
        lease = self._lease
        if not isinstance(lease, kind) or not lease.admits(token):
            await _refuse(context, _Code.PERMISSION_DENIED, "no head has configured this stage for the sender")
        return lease


def _until_hung_up(handler: _Handler) -> _Handler:
    """gRPC cancels the handler of a caller who is gone, and would log that as a defect."""

    async def handle(request: Any, context: _Context) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await handler(request, context)

    return handle


async def _answer(lease: Lease, context: _Context) -> None:
    while (message := await lease.to_head.get()) is not None:
        await context.write(pack(message))


async def _finish(answers: asyncio.Task[None]) -> None:
    """Lets a write under way come to its end: gRPC cannot close a stream during one."""
    await asyncio.wait((answers,), timeout=1.0)
    if not answers.cancel() and not answers.cancelled() and (error := answers.exception()):
        _log.debug("the last answers did not arrive: %r", error)


async def _refuse(context: _Context, code: grpc.StatusCode, why: str) -> NoReturn:
    """Ends the stream with a status; nothing else in the process notices."""
    _log.warning("refused a stream of %s: %s", context.peer(), why)
    await context.abort(code, why)
    raise AssertionError("abort raises")
