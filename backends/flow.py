"""Messages cut into pieces, of which no more are on their way than the link carries in about a second.

Whatever else wants to pass (pings, heartbeats, cancellations) waits behind what is on its way, and a link on which it
waits for long would count as broken. The reader acknowledges pieces; how long that takes says how many may be under
way. A message shorter than the least piece is written as it is, and waits for nobody as long as the link keeps up.
"""

import asyncio
import contextlib
import time
from collections import deque
from typing import Any

import grpc
import grpc.aio

from backends.frames import MAX_FRAME_BYTES
from backends.outbox import Outbox

PIECE_BYTES = 2**16
"""Pieces of a message have multiples of it, but the last, which is shorter, maybe empty. So much is acknowledged."""
_QUICK_S, _LATE_S = 0.5, 1.0
"""Acknowledged sooner, more may be under way; later, less."""


class Flow:
    """The writer's end of the stream ``call``."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._window = 2 * PIECE_BYTES  # the least: less than a piece may be unacknowledged for ever
        self._written = self._acknowledged = 0
        self._pieces: deque[tuple[int, float]] = deque()  # bytes written after it, and when
        self._loop = asyncio.get_running_loop()  # which may stand still while somebody sends
        self._room: asyncio.Future[None] | None = None  # what the writer waits for

    async def carry(self, outbox: Outbox) -> None:
        """Writes what ``outbox`` has, until it is closed. Raises what the stream's ``write`` raises."""
        listening = asyncio.create_task(self._listen())
        try:
            await outbox.carry(self._write)
        finally:
            listening.cancel()

    async def _write(self, message: bytes) -> None:
        start, left = 0, len(message)
        while left >= PIECE_BYTES:
            size = min(left, await self._room_for(PIECE_BYTES)) // PIECE_BYTES * PIECE_BYTES
            await self._write_piece(message[start : start + size])
            start, left = start + size, left - size
        await self._room_for(left)
        await self._write_piece(message[start:] if start else message)

    async def _room_for(self, size: int) -> int:
        """Waits until so many bytes may be written; returns how many more may be."""
        while (room := self._window - (self._written - self._acknowledged)) < size:
            self._room = self._loop.create_future()
            await self._room
        return room

    async def _write_piece(self, piece: bytes) -> None:
        self._written += len(piece)
        self._pieces.append((self._written, time.monotonic()))
        await self._call.write(piece)

    async def _listen(self) -> None:
        with contextlib.suppress(grpc.RpcError):  # the writer's task hears of it, too
            while (data := await self._call.read()) is not grpc.aio.EOF:
                self._hear(int.from_bytes(data, "little"))

    def _hear(self, acknowledged: int) -> None:
        waited_s = 0.0
        while self._pieces and self._pieces[0][0] <= acknowledged:
            waited_s = time.monotonic() - self._pieces.popleft()[1]
        if waited_s > _LATE_S:
            self._window = max(2 * PIECE_BYTES, self._window // 2)
        elif waited_s < _QUICK_S and self._room:
            self._window += acknowledged - self._acknowledged
        self._acknowledged = acknowledged
        if self._room and not self._room.done():
            self._room.set_result(None)
        self._room = None


class Joiner:
    """The reader's end of the stream ``call``."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._read = self._acknowledged = 0

    async def read(self) -> Any:
        """The next message, or ``grpc.aio.EOF``. One that is longer than any frame ends where that is certain."""
        pieces = [await self._piece()]
        size = len(pieces[0])
        while pieces[-1] and len(pieces[-1]) % PIECE_BYTES == 0 and size <= MAX_FRAME_BYTES:
            pieces.append(await self._piece())
            size += len(pieces[-1])
        return pieces[-1] if len(pieces) == 1 or pieces[-1] is grpc.aio.EOF else b"".join(pieces)

    async def _piece(self) -> Any:
        if self._read - self._acknowledged >= PIECE_BYTES:
            self._acknowledged = self._read
            await self._call.write(self._read.to_bytes(8, "little"))
        piece = await self._call.read()
        self._read += len(piece)  # EOF has none
        return piece
