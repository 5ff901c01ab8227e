"""A simulated stage server: computes runs in order of arrival, passes dead ones on as void frames.

What is known when it is sent needs no event of its own: a frame waits in the inbox with the time of its arrival, a
cancellation is looked up when its run's turn comes. On a machine of its own a live run costs one event: it is done.
"""

from collections import deque
from collections.abc import Callable, Sequence

from pipesim.recorder import Observer
from pipesim.scenario import StagePlan
from pipesim.scheduling.runs import Run
from pipesim.simulation.courses import Course
from pipesim.simulation.devices import Call, Clock, Device
from pipesim.simulation.links import Passage, metadata_bytes
from pipesim.simulation.sharing import FairDevice, Job
from pipesim.simulation.times import StageTimes


class Frame:
    """A run on its way. ``void``: it is dead, its activations stayed behind. ``arrival``: at the stage it is sent to.

    ``path`` holds the times at which it went on, ``drafted`` says whether a draft led to it: see ``latency.py``.
    """

    __slots__ = ("arrival", "context", "drafted", "live_bytes", "path", "run", "run_id", "void", "void_bytes")

    def __init__(self, run: Run, row_bytes: int, path: list[int] | None = None, drafted: bool = False) -> None:
        self.run = run
        self.run_id = run.run_id
        self.void = False
        self.arrival = 0
        self.path = [] if path is None else path
        self.drafted = drafted
        self.void_bytes = metadata_bytes(run)
        self.live_bytes = self.void_bytes + run.rows * row_bytes  # between stages: with activations
        self.context = sum(run.positions) / run.rows + 1  # a row at position p attends to p + 1 cells


class StageServer:
    """One stage. ``leave(frame)`` is called when a frame goes on to the next link.

    ``device`` is None for a machine of its own. ``pace`` is the factor by which everything takes longer at a time, or
    None.
    """

    def __init__(
        self,
        clock: Clock,
        index: int,
        plan: StagePlan,
        device: Device | None,
        observer: Observer,
        leave: Callable[[Frame], None],
        pace: Course | None = None,
    ) -> None:
        self.name = plan.name
        self._clock = clock
        self._index = index
        self._times = StageTimes(plan, pace)
        self._layers = plan.layers
        self._void_work = round(plan.void_ms * 1e6)
        self._device = device
        self._record = observer.stage_span
        self._leave = leave
        self._inbox: deque[Frame] = deque()  # here or on the wire, in order of arrival
        self._current: Frame | None = None
        self._resting = True  # no frame here or on the wire
        self._start = -1  # of the run being computed, or on the wire and next; -1 while it waits for a core
        self._end = -1
        self._work = 0  # of the run being computed: how long it takes where nothing slows it down
        self._job: Job | None = None  # what is computed on a fair device
        self._plan = 0  # counts what was planned; an event of an older plan means nothing
        self._dead: dict[int, int] = {}  # run -> when the stage hears that it is dead
        self._last_id = -1  # the newest run that has left

    def arrive(self, passage: Passage, frame: Frame) -> None:
        """A frame is on the wire, and will be here not before an earlier one."""
        frame.path += passage
        frame.arrival = passage[2]
        self._inbox.append(frame)
        if self._resting:
            self._resting = False
            self._next()

    def cancel(self, passage: Passage, run_ids: Sequence[int]) -> None:
        """The head calls off runs; the message is on the wire.

        When it is here, a run that is being computed stops, between two layers at the latest.
        """
        time = passage[2]
        for run_id in run_ids:
            if run_id > self._last_id:
                self._dead[run_id] = min(time, self._dead.get(run_id, time))
        current = self._current
        if current is None or current.void or current.run_id not in run_ids:
            return
        if self._job is not None:
            self._clock.at(time, self._stop, self._job)
        elif self._start >= 0:
            end = self._times.cut(self._start, self._work, self._end, time)
            if end < self._end:
                self._finish_at(end)

    def drop_everything(self) -> None:
        """Forgets all frames and cancellations; a run that is being computed costs what was spent on it so far."""
        frame, now = self._current, self._clock.now
        if frame is not None and 0 <= self._start < now:
            self._record(self._index, frame.run_id, self._start, now, True)
        if frame is not None and self._device is not None:
            if self._start < 0:
                self._device.withdraw(self._begin)
            elif isinstance(self._device, FairDevice) and self._job is not None:
                self._device.drop(self._job)
            else:
                self._device.release()
        self._job = None
        self._inbox.clear()
        self._dead.clear()
        self._current, self._start, self._resting = None, -1, True
        self._plan += 1

    def _take_up(self, call: Call) -> None:
        if call.value == self._plan:
            self._next()

    def _next(self) -> None:
        """Takes up the next run as soon as it is here, after the void frames in front of it.

        On a machine of its own the beginning and the end of a live run are known while it is on the wire.
        """
        inbox, now = self._inbox, self._clock.now
        while inbox:
            frame = inbox[0]
            start = frame.arrival if frame.arrival > now else now
            void = frame.void or self._dead.get(frame.run_id, start + 1) <= start
            if start > now and (void or self._device is not None):
                self._plan += 1
                self._clock.at(start, self._take_up, self._plan)
                return
            inbox.popleft()
            if not void or self._void_work:
                frame.void = void
                self._current = frame
                if self._device is None:
                    self._begin_at(start)
                else:
                    self._device.acquire(self._begin)
                return
            self._pass_on(frame, True)
        self._resting = True

    def _begin(self) -> None:
        self._begin_at(self._clock.now)

    def _begin_at(self, start: int) -> None:
        frame = self._current
        assert frame is not None
        self._start = start
        self._work = work = self._void_work if frame.void else self._times.work(frame.run, frame.context)
        if isinstance(self._device, FairDevice):
            self._plan += 1
            # a fault that slows the stage down meets runs as they begin
            takes = self._times.end(start, work) - start
            demand = 0.0 if frame.void else self._times.demand(takes, frame.context)
            self._job = self._device.start(takes, self._finish, self._plan, demand)
            if frame.run_id in self._dead and not frame.void:
                self._clock.at(max(start, self._dead[frame.run_id]), self._stop, self._job)
            return
        end = self._times.end(start, work)
        if frame.run_id in self._dead and not frame.void:  # it may have died while it waited, or is going to
            end = self._times.cut(start, work, end, self._dead[frame.run_id])
        self._finish_at(end)

    def _stop(self, call: Call) -> None:
        """A run that is computed on a fair device died: it ends at the next layer boundary."""
        if isinstance(self._device, FairDevice):
            self._device.shorten(call.value, self._layers)

    def _finish_at(self, end: int) -> None:
        self._end = end
        self._plan += 1
        self._clock.at(end, self._finish, self._plan)

    def _finish(self, call: Call) -> None:
        if self._job is not None:
            self._job, self._end = None, self._clock.now
        frame, start, end = self._current, self._start, self._end
        if frame is None or call.value != self._plan:
            return  # the planned end of a run that was cut short
        void = frame.void or self._dead.get(frame.run_id, end + 1) <= end
        if end > start:
            self._record(self._index, frame.run_id, start, end, void)
        frame.path += (start, end)
        self._current = None
        self._start = -1
        if self._device is not None:
            self._device.release()
        self._pass_on(frame, void)
        self._next()

    def _pass_on(self, frame: Frame, void: bool) -> None:
        self._dead.pop(frame.run_id, None)
        self._last_id = frame.run_id
        frame.void = void
        self._leave(frame)

    def __str__(self) -> str:
        waiting = [frame.run_id for frame in self._inbox if frame.arrival <= self._clock.now]
        if self._current is None or self._start > self._clock.now:
            return f"{self.name}: idle, runs {waiting} wait"
        doing = f"computes until {self._end / 1e9} s" if self._start >= 0 else f"waits for a core of {self._device}"
        return f"{self.name}: run {self._current.run_id} {doing}, runs {waiting} wait behind it"
