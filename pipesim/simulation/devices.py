"""Simulated time and the machines in it. SimPy serves as an event list: timeouts with callbacks, no processes."""

from collections import deque
from collections.abc import Callable
from typing import Any

import simpy
from simpy.core import EmptySchedule
from simpy.events import Timeout


class Clock:
    """The event list. Time is whole nanoseconds; equal times keep the order in which they were asked for."""

    def __init__(self) -> None:
        self._environment = simpy.Environment(initial_time=0)

    @property
    def now(self) -> int:
        """The present in nanoseconds."""
        return self._environment._now  # type: ignore[return-value]  # the property costs a call per event

    def at(self, time: int, callback: Callable[[Timeout], None], value: Any = None) -> None:
        """Calls ``callback(timeout)`` at ``time``; the timeout carries ``value``."""
        environment = self._environment
        Timeout(environment, time - environment._now, value).callbacks.append(callback)

    def step(self) -> bool:
        """Goes on to the next event and carries it out; says whether there was one."""
        try:
            self._environment.step()
        except EmptySchedule:
            return False
        return True


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

    def release(self) -> None:
        """Gives the core to who waits longest."""
        if self._waiting:
            self._waiting.popleft()()
        else:
            self._free += 1

    def __str__(self) -> str:
        return f"{self.name} ({self._free} cores free, {len(self._waiting)} waiting)"
