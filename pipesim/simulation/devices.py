"""Simulated time and the machines in it. SimPy serves as an event list: calls at times, no processes."""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import simpy
from simpy.events import NORMAL

EVENTS_AT_ONCE = 100_000
"""More events in a row that take no time are a standstill: void frames pass through whole pipelines with far fewer."""


class Call:
    """A SimPy event that calls ``callback(call)``, at a fraction of a ``Timeout``'s price.

    Of an event in its list SimPy uses no more than ``callbacks`` and ``_ok``, so ``Environment.step`` carries it out.
    """

    __slots__ = ("callbacks", "value")
    _ok = True

    def __init__(self, callback: Callable[["Call"], None], value: Any) -> None:
        self.callbacks = (callback,)
        self.value = value


class Clock(simpy.Environment):
    """The event list. Time is whole nanoseconds; equal times keep the order in which they were asked for."""

    now: int = 0
    """The present in nanoseconds; a plain attribute, because it is read several times per event."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = False

    @property
    def _now(self) -> int:  # where SimPy keeps its time
        return self.now

    @_now.setter
    def _now(self, time: int) -> None:
        self.now = time

    def at(self, time: int, callback: Callable[[Call], None], value: Any = None) -> None:
        """Calls ``callback(call)`` at ``time``; the call carries ``value``. Raises ValueError for the past."""
        if time < self.now:
            raise ValueError(f"Negative delay: it is {self.now} ns, {time} ns is over")
        heappush(self._queue, (time, NORMAL, next(self._eid), Call(callback, value)))  # type: ignore[misc]

    def run_calls(self) -> int:
        """Carries out one call after the other until ``stopped``: ``Environment.step`` in a loop, without its detours.

        Returns how many calls in a row took no time when it ended: 0 where the list was empty or it was stopped,
        ``EVENTS_AT_ONCE`` at a standstill.
        """
        queue = self._queue
        at_once = 0
        while queue and not self.stopped:
            time, _, _, call = heappop(queue)
            if time != self.now:
                self.now = time  # type: ignore[assignment]  # SimPy allows for fractions
                at_once = 0
            elif (at_once := at_once + 1) == EVENTS_AT_ONCE:
                return at_once
            call.callbacks[0](call)
        return 0


class Device:
    """A machine whose cores serve in FIFO order what runs on it, each for as long as it likes."""

    def __init__(self, name: str, cores: int) -> None:
        self.name = name
        self._free = cores
        self._waiting: deque[Callable[[], None]] = deque()

    def acquire(self, begin: Callable[[], None]) -> None:
        """Calls ``begin`` as soon as a core is free, maybe at once; the caller then owns it until ``release``."""
        if self._free:
            self._free -= 1
            begin()
        else:
            self._waiting.append(begin)

    def withdraw(self, begin: Callable[[], None]) -> None:
        """``begin``, which waits for a core, does not want it any more."""
        self._waiting.remove(begin)

    def release(self) -> None:
        """Gives the core to who waits longest."""
        if self._waiting:
            self._waiting.popleft()()
        else:
            self._free += 1

    def __str__(self) -> str:
        return f"{self.name} ({self._free} cores free, {len(self._waiting)} waiting)"
