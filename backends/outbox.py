"""Messages that wait to be written into a stream, and how many may."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from pipesim.errors import StageFailedError

MAX_WAITING = 4096
"""Messages that may wait for one reader. What a scheduler has in flight is far less: a queue so long has no reader."""

Write = Callable[[bytes], Coroutine[Any, Any, None]]


class Outbox:
    """Messages on their way to ``reader``. One that never reads is an error, and no place where memory goes."""

    def __init__(self, reader: str) -> None:
        self._reader = reader
        self._waiting: asyncio.Queue[bytes | _Begun | None] = asyncio.Queue(MAX_WAITING)
        self._idle: Write | None = None  # how to write, while :meth:`carry` has nothing to do

    def send(self, message: bytes) -> None:
        """Writes ``message`` after those before it; if there are none, it is on its way when this returns.

        A turn of the event loop would come before it otherwise: code that has to come from memory first, after a pass
        over the weights.

        Raises:
            StageFailedError: ``MAX_WAITING`` messages are waiting.
        """
        write, self._idle = self._idle, None
        try:
            self._waiting.put_nowait(_Begun(write(message)) if write else message)
        except asyncio.QueueFull:
            raise StageFailedError(f"{self._reader} does not read: {MAX_WAITING} messages wait for it") from None

    def close(self) -> None:
        """Ends :meth:`carry` behind what was sent before."""
        self._idle = None
        with contextlib.suppress(asyncio.QueueFull):  # nobody reads what we say
            self._waiting.put_nowait(None)

    async def carry(self, write: Write) -> None:
        """Writes the messages, one after another. Raises what ``write`` raises."""
        try:
            while True:
                self._idle = write if self._waiting.empty() else None
                message = await self._waiting.get()
                self._idle = None
                if message is None:
                    return
                await (write(message) if isinstance(message, bytes) else message)
        finally:
            self._idle = None


class _Begun(Generator[Any, Any, None]):
    """A coroutine that has run up to where it has to wait. Whoever awaits this carries on with it."""

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine
        self._awaited = False
        self._error: Exception | None = None
        try:
            self._waits_for = coroutine.send(None)
        except Exception as error:  # StopIteration, if it was over at once
            self._error = error

    def __await__(self) -> Generator[Any, Any, None]:
        return self

    def send(self, value: Any) -> Any:
        if self._awaited:
            return self._coroutine.send(value)
        self._awaited = True
        if self._error:
            raise self._error
        return self._waits_for

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)
