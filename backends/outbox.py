"""Messages that wait for somebody to read them, and how many may."""

import asyncio
from typing import TypeVar

from pipesim.errors import StageFailedError

MAX_WAITING = 4096
"""Messages that may wait for one reader. What a scheduler has in flight is far less: a queue so long has no reader."""

T = TypeVar("T")


class Outbox(asyncio.Queue[T]):
    """Messages on their way to ``reader``. One that never reads is an error, and no place where memory goes."""

    def __init__(self, reader: str) -> None:
        super().__init__(MAX_WAITING)
        self._reader = reader

    def put_nowait(self, item: T) -> None:
        """Adds a message. Raises StageFailedError if ``MAX_WAITING`` are there already."""
        try:
            super().put_nowait(item)
        except asyncio.QueueFull:
            raise StageFailedError(f"{self._reader} does not read: {MAX_WAITING} messages wait for it") from None
