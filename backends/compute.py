"""The one thread of a node: an event loop while there is nothing to compute, and computation that lets it run a little.

A frame that arrives is computed by the thread that read it, and what comes of it is sent by the same thread. A change
of thread on the way out was measured by hand to cost a run about 0.1 ms; on the way in it was not measured alone.
"""

import asyncio
import select
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from typing import Any, TypeVarTuple, Unpack

_Ts = TypeVarTuple("_Ts")


class _RestlessLoop(asyncio.SelectorEventLoop):
    """Knows whether anything waits for its next turn that no news from the network would announce: ``scheduled``."""

    scheduled = False

    def call_soon(
        self, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self.scheduled = True
        return super().call_soon(callback, *args, context=context)


class ComputeLoop:
    """An event loop that stands still while a job computes.

    A job calls :meth:`checkpoint` wherever it can be bothered: between layers, between drafted levels. All methods
    belong to the thread that calls :meth:`run`.
    """

    def __init__(self) -> None:
        selector = selectors.DefaultSelector()
        self._loop = _RestlessLoop(selector)
        self._selector = selector.fileno()
        self._news = select.poll()
        self._news.register(self._selector, select.POLLIN)
        self._jobs: deque[Callable[[], None]] = deque()
        self._idle = False

    def submit(self, job: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        """Runs ``job`` after all jobs before it; ``failed`` hears what it raised."""

        def guarded() -> None:
            try:
                job()
            except Exception as error:
                failed(error)

        self._jobs.append(guarded)
        if self._idle:
            self._loop.stop()

    @property
    def waiting(self) -> int:
        """How many jobs have not begun."""
        return len(self._jobs)

    def checkpoint(self) -> None:
        """Called by a job: what has arrived meanwhile is handled, and answered, before the job goes on.

        Timers of the loop that are due wait for the next arrival: a heartbeat, twice a second.
        """
        if self._loop.scheduled or self._news.poll(0):
            self._settle()

    def pause(self, seconds: float) -> None:
        """Called by a job: waits so long, or until something has arrived, which is handled.

        The loop's own timers would come up to a millisecond late.
        """
        self._settle()
        if select.select((self._selector,), (), (), seconds)[0]:
            self._settle()

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        """Runs ``main`` to its end, and the jobs that are submitted meanwhile."""
        task = self._loop.create_task(main)
        task.add_done_callback(self._stop)
        try:
            while not task.done():
                if self._jobs:
                    self._jobs.popleft()()
                    if self._jobs:
                        self._turn()  # what the job has left to send goes out before the next one computes
                else:
                    self._idle = True
                    self._loop.run_forever()
                    self._idle = False
            task.result()
        finally:
            task.remove_done_callback(self._stop)
            self._idle = False
            self._end(task)
            self._end(*asyncio.all_tasks(self._loop))
            self._loop.close()

    def _stop(self, _: object) -> None:
        self._loop.stop()

    def _end(self, *tasks: asyncio.Task[Any]) -> None:
        for task in tasks:
            task.cancel()
        outcomes = self._loop.create_task(_outcomes(tasks))
        outcomes.add_done_callback(self._stop)
        while not outcomes.done():  # a job that was broken off may have left a stop behind
            self._loop.run_forever()

    def _settle(self) -> None:
        """From the socket to the answer a message takes three turns of the loop, and a new stream more."""
        self._turn()
        while self._loop.scheduled:
            self._turn()

    def _turn(self) -> None:
        self._loop.call_soon(self._loop.stop)
        self._loop.scheduled = False
        self._loop.run_forever()


async def _outcomes(tasks: Sequence[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
