"""The simulated world around a scheduler: head, links, stages and drafter in virtual time.

The head hears one event at a time. Handling one takes ``overhead_ms``; at the end of it the scheduler decides, commands
leave and tokens reach the user. Time is whole nanoseconds, chance follows from the seed: same scenario, same bytes.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TextIO

from pipesim.errors import InvariantError
from pipesim.metrics import Metrics
from pipesim.recorder import Meter, Observer, Recorder
from pipesim.scenario import CrashFault, Scenario
from pipesim.scenario import Device as DevicePlan
from pipesim.scheduling.commands import CancelRuns, EmitTokens, RequestDraft, SubmitRun
from pipesim.scheduling.events import DraftReturned, Event, GenerationStarted, RunReturned
from pipesim.scheduling.runs import Run
from pipesim.simulation.acceptance import Truth, make_truth
from pipesim.simulation.devices import Call, Clock, Device
from pipesim.simulation.drafter import DrafterServer, DraftJob
from pipesim.simulation.faults import Crashes, MortalStageServer, stage_pace
from pipesim.simulation.latency import decompose, path_parts
from pipesim.simulation.links import Passage, cancellation_bytes, draft_bytes, request_bytes, result_bytes, tokens_bytes
from pipesim.simulation.network import Network
from pipesim.simulation.sharing import FairDevice
from pipesim.simulation.stage import Frame, StageServer
from pipesim.trace import Trace


def simulate(scenario: Scenario, events: TextIO | None = None, truth: Truth | None = None) -> Trace:
    """Simulates one generation from prompt to the return of the last run.

    Args:
        scenario: what to simulate; needs its ``acceptance`` section.
        events: where to write the event log, if anywhere.
        truth: replaces the scenario's acceptance.

    Raises:
        BadInputError: the scenario cannot be simulated.
        InvariantError: the simulation broke one of its own rules, e.g. came to a standstill.
    """
    names = [plan.name for plan in scenario.stages()]
    recorder = Recorder(scenario.scheduler(), scenario.seed, names, events, ticks_per_s=1e9)
    Simulation(scenario, recorder, truth).run()
    return recorder.trace()


def evaluate(scenario: Scenario) -> Metrics:
    """What ``compute_metrics(simulate(scenario))`` gives, without a trace in between.

    Memory grows by some 200 bytes per token: the text itself, the KV cells, one number for exact percentiles.

    Raises: as ``simulate``.
    """
    meter = Meter(scenario.scheduler(), scenario.seed, len(scenario.stages()))
    Simulation(scenario, meter).run()
    return meter.metrics()


class _Heard(NamedTuple):
    """What the head heard, when, and the frame that brought it."""

    event: Event
    time: int
    frame: Frame | None


class Simulation:
    """One generation, driven by ``observer.scheduler``. ``truth`` may replace the scenario's acceptance."""

    def __init__(self, scenario: Scenario, observer: Observer, truth: Truth | None = None) -> None:
        self.clock = Clock()
        self.truth = truth or make_truth(scenario)
        self.observer = observer
        plans = scenario.stages()
        devices = {device.name: self._make_device(device) for device in scenario.cluster.devices}

        def device_of(name: str | None, user: str) -> Device:
            return Device(f"{user}'s own device", 1) if name is None else devices[name]

        cluster = scenario.cluster
        self._start = GenerationStarted(self.truth.prompt, scenario.workload.max_new_tokens, self.truth.stop_tokens)
        self._overhead = round(cluster.head.overhead_ms * 1e6)
        own = cluster.head.draft_overhead_ms
        self._draft_overhead = self._overhead if own is None else round(own * 1e6)
        self._device = device_of(cluster.head.device, "head")
        self._heard: deque[_Heard] = deque()
        self._busy = False
        self._row_bytes = scenario.row_bytes()
        self._told_drafter = 0
        self._path_parts = path_parts(len(plans))
        self._emitted_at = 0

        shared = {name: device for name, device in devices.items() if isinstance(device, FairDevice)}
        self._network = Network(scenario, self.clock, shared)
        crashes = [fault for fault in scenario.faults if isinstance(fault, CrashFault)]
        server = MortalStageServer if crashes else StageServer
        self.stages: list[StageServer] = []
        for index, plan in reversed(list(enumerate(plans))):
            leave = self._leave_to(index + 1, self.stages[0]) if self.stages else self._leave_last
            device = None if plan.device is None else devices[plan.device]
            pace = stage_pace(scenario.faults, index)
            self.stages.insert(0, server(self.clock, index, plan, device, observer, leave, pace))
        mortal = [stage for stage in self.stages if isinstance(stage, MortalStageServer)]
        self._crashes = Crashes(self.clock, crashes, mortal, self._hear_of) if crashes else None
        drafter_device = device_of(cluster.drafter.device, "drafter")
        self.drafter = DrafterServer(
            self.clock, scenario.drafter(), drafter_device, self.truth, observer, self._leave_drafter
        )

    def _make_device(self, plan: DevicePlan) -> Device:
        if plan.sharing == "fair":
            return FairDevice(self.clock, plan.name, plan.cores, plan.contention)
        return Device(plan.name, plan.cores)

    def run(self) -> None:
        """Carries the generation out to its end."""
        self._handle(_Heard(self._start, 0, None), 0)
        at_once = self.clock.run_calls()
        if not self.observer.scheduler.released:
            where = f" at {self.clock.now / 1e9} s, where {at_once} events took no time" if at_once else ""
            raise InvariantError(f"the simulation came to a standstill{where} (I7)\n{self}")
        for link in self._network:
            self.observer.link_sent(link.name, link.sent_bytes)

    # -- the head --------------------------------------------------------------------------------------------------

    def _hear(self, call: Call) -> None:
        self._heard.append(call.value)
        if not self._busy:
            self._busy = True
            self._device.acquire(self._take_up)

    def _take_up(self) -> None:
        drafted = type(self._heard[0].event) is DraftReturned
        now, overhead = self.clock.now, self._draft_overhead if drafted else self._overhead
        if isinstance(self._device, FairDevice):
            self._device.start(overhead, self._decide, now)
        else:
            self.clock.at(now + overhead, self._decide, now)

    def _decide(self, call: Call) -> None:
        heard = self._heard.popleft()
        if self._crashes is None or self._admits(self._crashes, heard):
            self._handle(heard, call.value)
        self._device.release()
        if self._heard:
            self._device.acquire(self._take_up)
        else:
            self._busy = False

    def _admits(self, crashes: Crashes, heard: _Heard) -> bool:
        epoch = self.observer.scheduler.generation.epoch
        return crashes.admits(heard.event, heard.time, heard.frame.run if heard.frame else None, epoch)

    def _handle(self, heard: _Heard, taken_up: int) -> None:
        """Carries out what the scheduler answers to what the head heard and took up at that time."""
        for command in self.observer.handle(heard.event, self.clock.now):
            kind = type(command)  # a match statement would cost more than all the rest
            if kind is SubmitRun:
                self._submit(command.run, heard, taken_up)  # type: ignore[union-attr]
            elif kind is RequestDraft:
                self._request_draft(command)  # type: ignore[arg-type]
            elif kind is CancelRuns:
                self._cancel(command.run_ids)  # type: ignore[union-attr]
            elif kind is EmitTokens:
                self._explain(heard, taken_up)
        if self.observer.scheduler.released:
            self.clock.stopped = True

    def _submit(self, run: Run, heard: _Heard, taken_up: int) -> None:
        now = self.clock.now
        frame = Frame(run, self._row_bytes, [heard.time, taken_up, now], type(heard.event) is DraftReturned)
        size = frame.void_bytes + tokens_bytes(run.rows)
        self._network.data[0].send(now, size, self.stages[0].arrive, frame)

    def _cancel(self, run_ids: tuple[int, ...]) -> None:
        size = cancellation_bytes(len(run_ids))
        for link, stage in zip(self._network.control, self.stages, strict=True):
            link.send(self.clock.now, size, stage.cancel, run_ids)

    def _request_draft(self, request: RequestDraft) -> None:
        """Sends the request with the text that the drafter has not seen yet."""
        size = request_bytes(request.frontier - self._told_drafter, len(request.path))
        self._told_drafter = request.frontier
        text = self.observer.scheduler.generation.text
        previous = request.path[-1] if request.path else text[request.frontier - 1]
        self._network.to_drafter.send(self.clock.now, size, self._ask_drafter, DraftJob(request, previous))

    def _ask_drafter(self, passage: Passage, job: DraftJob) -> None:
        self.clock.at(passage[2], self.drafter.arrive, job)

    def _explain(self, heard: _Heard, taken_up: int) -> None:
        """Says how the time until the tokens was spent that the user gets now."""
        frame, now = heard.frame, self.clock.now
        assert frame is not None, "only a run that came home brings tokens"
        path = [*frame.path, taken_up, now]
        self.observer.latency(decompose(path, self._path_parts, frame.drafted, self._emitted_at))
        self._emitted_at = now

    # -- what leaves stages and drafter ----------------------------------------------------------------------------

    def _leave_to(self, index: int, stage: StageServer) -> Callable[[Frame], None]:
        send, clock, arrive = self._network.data[index].send, self.clock, stage.arrive

        def leave(frame: Frame) -> None:
            send(clock.now, frame.void_bytes if frame.void else frame.live_bytes, arrive, frame)

        return leave

    def _leave_last(self, frame: Frame) -> None:
        run = frame.run
        predictions: tuple[int, ...] | None = None
        if not frame.void:
            rows = range(run.first_output_row, run.rows)
            predictions = tuple(self.truth.next(run.positions[row] + 1, run.tokens[row]) for row in rows)
        size = result_bytes(len(predictions or ()))
        self._network.data[-1].send(
            self.clock.now, size, self._come_home, (RunReturned(run.run_id, predictions), frame)
        )

    def _leave_drafter(self, draft: DraftReturned) -> None:
        size = draft_bytes(len(draft.tree.tokens))
        self._network.from_drafter.send(self.clock.now, size, self._come_home, (draft, None))

    def _come_home(self, passage: Passage, news: tuple[Event, Frame | None]) -> None:
        event, frame = news
        if frame is not None:
            frame.path += passage
        self.clock.at(passage[2], self._hear, _Heard(event, passage[2], frame))

    def _hear_of(self, event: Event) -> None:
        self.clock.at(self.clock.now, self._hear, _Heard(event, self.clock.now, None))

    def __str__(self) -> str:
        """Who waits for whom."""
        runs = [run.run_id for run in self.observer.scheduler.generation.in_flight]
        head = f"head: waits for runs {runs}, {len(self._heard)} events unheard, on {self._device}"
        return "\n".join([head, *map(str, self.stages), str(self.drafter)])
