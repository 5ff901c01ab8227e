"""A simulated stage server: computes runs in order of arrival, passes dead ones on as void frames."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from simpy.events import Timeout

from pipesim.recorder import Recorder
from pipesim.scenario import StagePlan
from pipesim.scheduling.runs import Run
from pipesim.simulation.devices import Clock, Device
from pipesim.simulation.links import metadata_bytes


class Frame:
    """A run on its way. ``void``: it is dead, its activations stayed behind."""

    __slots__ = ("context", "live_bytes", "run", "run_id", "void", "void_bytes")

    def __init__(self, run: Run, row_bytes: int) -> None:
        self.run = run
        self.run_id = run.run_id
        self.void = False
        self.void_bytes = metadata_bytes(run)
        self.live_bytes = self.void_bytes + run.rows * row_bytes  # between stages: with activations
        self.context = sum(run.positions) / run.rows + 1  # a row at position p attends to p + 1 cells


class StageServer:
    """One stage. ``leave(frame)`` is called when a frame goes on to the next link."""

    def __init__(
        self,
        clock: Clock,
        index: int,
        plan: StagePlan,
        device: Device,
        recorder: Recorder,
        leave: Callable[[Frame], None],
    ) -> None:
        self.name = plan.name
        self._clock = clock
        self._index = index
        self._layers = plan.layers
        self._seconds = plan.cost_model().seconds
        self._device = device
        self._record = recorder.stage_span
        self._leave = leave
        self._queue: deque[Frame] = deque()
        self._current: Frame | None = None
        self._start = self._end = -1  # of the run being computed; -1 while it waits for a core
        self._last_id = -1  # the newest run that has left
        self._dead: set[int] = set()

    def arrive(self, timeout: Timeout) -> None:
        """A frame comes in from the link."""
        self._queue.append(timeout._value)
        if self._current is None:
            self._next()

    def cancel(self, timeout: Timeout) -> None:
        """The head calls off runs: between two layers at the latest, a run that is being computed stops."""
        run_ids: Sequence[int] = timeout._value
        self._dead.update(run_id for run_id in run_ids if run_id > self._last_id)
        current = self._current
        if current is not None and self._end > self._start >= 0 and current.run_id in run_ids:
            duration = self._end - self._start
            done = -(-(self._clock.now - self._start) * self._layers // duration)
            boundary = self._start - (-done * duration // self._layers)
            if boundary < self._end:
                self._end = boundary
                self._clock.at(boundary, self._finish)

    def _next(self) -> None:
        """Takes up the next run, after the void frames in front of it."""
        while self._queue:
            frame = self._queue.popleft()
            if not (frame.void or frame.run_id in self._dead):
                self._current = frame
                self._device.acquire(partial(self._begin, frame))
                return
            self._pass_on(frame, True)
        self._current = None

    def _begin(self, frame: Frame) -> None:
        run, now = frame.run, self._clock.now
        self._start = now
        dead = run.run_id in self._dead  # it may have died while it waited for the core
        self._end = now if dead else now + max(1, round(self._seconds(run.kind, run.rows, frame.context) * 1e9))
        self._clock.at(self._end, self._finish)

    def _finish(self, _: Timeout) -> None:
        frame, start = self._current, self._start
        if frame is None or start < 0 or self._clock.now != self._end:
            return  # the planned end of a run that was cut short
        void = frame.run_id in self._dead
        if self._end > start:
            self._record(self._index, frame.run_id, start / 1e9, self._end / 1e9, void)
        self._start = self._end = -1
        self._device.release()
        self._pass_on(frame, void)
        self._next()

    def _pass_on(self, frame: Frame, void: bool) -> None:
        self._dead.discard(frame.run_id)
        self._last_id = frame.run_id
        frame.void = void
        self._leave(frame)

    def __str__(self) -> str:
        waiting = [frame.run_id for frame in self._queue]
        if self._current is None:
            return f"{self.name}: idle, runs {waiting} wait"
        doing = f"computes until {self._end / 1e9} s" if self._start >= 0 else f"waits for a core of {self._device}"
        return f"{self.name}: run {self._current.run_id} {doing}, runs {waiting} wait behind it"
