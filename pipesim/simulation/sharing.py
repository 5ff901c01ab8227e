"""A machine whose cores are shared by all that compute on it, as an operating system does it with processes."""

from collections import deque
from collections.abc import Callable
from typing import Any

from pipesim.scenario import Link
from pipesim.simulation.devices import Call, Clock, Device
from pipesim.simulation.links import LinkModel, Passage, T


class Job:
    """Work on a fair device: nanoseconds that it takes alone, how many of them are done, and who hears of the end.

    ``demand``: memory bandwidth that it asks for, as a share of what a run of one row does: see ``times.demand``.
    """

    __slots__ = ("demand", "done", "finished", "value", "work")

    def __init__(self, work: float, demand: float, finished: Callable[[Call], None], value: Any) -> None:
        self.work = work
        self.demand = demand
        self.done = 0.0
        self.finished = finished
        self.value = value


class FairDevice(Device):
    """Nobody waits for a core: ``k`` jobs on ``c`` cores all go on, each for ``min(1, c / k)`` of the time.

    Cores at work share memory bandwidth. A job is slowed down to ``1 / (1 + contention * demand * others)`` of its
    pace, where ``others`` sums the other jobs' demands, each for the share of its time that it meets another one at
    work: ``(min(k, c) - 1) / (k - 1)``. The faster a job reads, the more it disturbs, and is disturbed.
    """

    def __init__(self, clock: Clock, name: str, cores: int, contention: float) -> None:
        super().__init__(name, cores)
        self._clock = clock
        self._cores = cores
        self._contention = contention
        self._jobs: list[Job] = []
        self._settled = 0
        self._plan = 0  # counts what was planned; an event of an older plan means nothing

    def acquire(self, begin: Callable[[], None]) -> None:
        """Calls ``begin`` at once."""
        begin()

    def withdraw(self, begin: Callable[[], None]) -> None:
        """Nobody waits here."""
        raise AssertionError(f"{begin} waits for a core of {self}, where nobody does")

    def release(self) -> None:
        """A job gives its share back as it ends."""

    def start(self, work: float, finished: Callable[[Call], None], value: Any = None, demand: float = 0.0) -> Job:
        """Begins ``work`` nanoseconds of work; ``finished(call)`` hears of the end, the call carries ``value``.

        ``demand``: see ``Job``; 0 for what reads next to nothing, as messages do.
        """
        self._settle()
        job = Job(work, demand, finished, value)
        self._jobs.append(job)
        self._replan()
        return job

    def shorten(self, job: Job, parts: int, origin: float = 0.0) -> None:
        """Ends a job at the next boundary of ``parts`` equal parts of its work from ``origin`` on, before that at once.

        A job that has ended is left alone.
        """
        if job not in self._jobs:
            return
        self._settle()
        each = (job.work - origin) / parts
        begun = -(-max(0.0, job.done - origin) // each) if each > 0 else 0.0
        job.work = min(job.work, max(job.done, origin * (job.done > 0) + begun * each))
        self._replan()

    def drop(self, job: Job) -> None:
        """Ends a job at once; nobody hears of it."""
        if job in self._jobs:
            self._settle()
            self._jobs.remove(job)
            self._replan()

    @property
    def now(self) -> int:
        """The time."""
        return self._clock.now

    def _paces(self) -> list[float]:
        """Of each job, what it gets done in a nanosecond."""
        jobs = self._jobs
        if len(jobs) == 1:
            return [1.0]
        busy = min(len(jobs), self._cores)
        share = busy / len(jobs)
        beside = self._contention * (busy - 1) / (len(jobs) - 1)  # how much of another job one meets at work
        total = sum(job.demand for job in jobs)
        return [share / (1.0 + beside * job.demand * (total - job.demand)) for job in jobs]

    def _settle(self) -> None:
        """Credits all jobs with what they have done so far."""
        now = self._clock.now
        if self._jobs and now > self._settled:
            for job, pace in zip(self._jobs, self._paces(), strict=True):
                job.done += (now - self._settled) * pace
        self._settled = now

    def _replan(self) -> None:
        self._plan += 1
        if self._jobs:
            left = min((job.work - job.done) / pace for job, pace in zip(self._jobs, self._paces(), strict=True))
            self._clock.at(self._clock.now + max(0, round(left)), self._end, self._plan)

    def _end(self, call: Call) -> None:
        if call.value != self._plan:
            return  # somebody came, left or was cut short since
        self._settle()
        ended = [job for job in self._jobs if job.work - job.done < 1.0]  # times are whole nanoseconds
        self._jobs = [job for job in self._jobs if job not in ended]
        self._replan()
        for job in ended:
            job.finished(Call(job.finished, job.value))

    def __str__(self) -> str:
        return f"{self.name} ({self._cores} cores, {len(self._jobs)} at work)"


class LocalLink(LinkModel):
    """A link within a fair device: what a message takes is work of its cores, so that it slows down with all others."""

    def __init__(self, name: str, link: Link, device: FairDevice) -> None:
        super().__init__(name, link)
        self._device = device
        self._under_way: deque[_Message] = deque()

    def send(self, now: int, size_bytes: int, then: Callable[[Passage, T], None], value: T) -> None:
        """As ``LinkModel.send``; the passage is known when the message has arrived."""
        self.sent_bytes += size_bytes
        message = _Message(now, then, value)
        self._under_way.append(message)
        self._device.start(self._latency + size_bytes * self._ns_per_byte, self._arrived, message)

    def _arrived(self, call: Call) -> None:
        call.value.done = True
        while self._under_way and self._under_way[0].done:  # in order
            message = self._under_way.popleft()
            message.then((message.sent, message.sent, self._device.now), message.value)


class _Message:
    __slots__ = ("done", "sent", "then", "value")

    def __init__(self, sent: int, then: Callable[[Passage, Any], None], value: Any) -> None:
        self.sent, self.then, self.value = sent, then, value
        self.done = False
