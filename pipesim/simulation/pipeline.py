"""The simulated world around a scheduler: head, links, stages and drafter in virtual time.

The head hears one event at a time. Handling one takes ``overhead_ms``; at the end of it the scheduler decides, commands
leave and tokens reach the user. Time is whole nanoseconds, nothing is random: the same scenario gives the same bytes.
"""

from collections import deque
from collections.abc import Callable
from typing import TextIO

from simpy.events import Timeout

from pipesim.errors import InvariantError
from pipesim.recorder import Recorder
from pipesim.scenario import Scenario
from pipesim.scheduling.commands import CancelRuns, Command, EmitTokens, RequestDraft, SubmitRun
from pipesim.scheduling.events import DraftReturned, Event, GenerationStarted, RunReturned
from pipesim.simulation.acceptance import Truth, make_truth
from pipesim.simulation.devices import Clock, Device
from pipesim.simulation.drafter import DrafterServer, DraftJob
from pipesim.simulation.links import HEADER_BYTES, LinkModel, draft_bytes, tokens_bytes
from pipesim.simulation.stage import Frame, StageServer
from pipesim.trace import Trace

_EVENTS_AT_ONCE = 100_000
"""More events in a row that take no time are a standstill: void frames pass through whole pipelines with far fewer."""


def simulate(scenario: Scenario, events: TextIO | None = None) -> Trace:
    """Simulates one generation from prompt to the return of the last run.

    Args:
        scenario: what to simulate; needs its ``acceptance`` section.
        events: where to write the event log, if anywhere.

    Raises:
        BadInputError: the scenario cannot be simulated.
        InvariantError: the simulation broke one of its own rules, e.g. came to a standstill.
    """
    return Simulation(scenario, events).run()


class Simulation:
    """One generation. ``truth`` may replace the scenario's acceptance."""

    def __init__(self, scenario: Scenario, events: TextIO | None = None, truth: Truth | None = None) -> None:
        self.clock = Clock()
        self.truth = truth or make_truth(scenario)
        plans = scenario.stages()
        self.recorder = Recorder(scenario.scheduler(), scenario.seed, [plan.name for plan in plans], events)
        devices = {device.name: Device(device.name, device.cores) for device in scenario.cluster.devices}

        def device_of(name: str | None, user: str) -> Device:
            return Device(f"{user}'s own device", 1) if name is None else devices[name]

        cluster = scenario.cluster
        self._event = GenerationStarted(self.truth.prompt, scenario.workload.max_new_tokens, self.truth.stop_tokens)
        self._text = list(self.truth.prompt)
        self._overhead = round(cluster.head.overhead_ms * 1e6)
        self._device = device_of(cluster.head.device, "head")
        self._heard: deque[Event] = deque()
        self._busy = False
        self._row_bytes = scenario.model.hidden * scenario.model.activation_bytes
        self._told_drafter = 0

        names = ["head", *(plan.name for plan in plans), "head"]
        self._hops = [LinkModel(f"{names[i]} to {names[i + 1]}", link) for i, link in enumerate(scenario.hops())]
        control = cluster.links.control.over(cluster.links)
        self._controls = [LinkModel(f"head to {plan.name} (control)", control) for plan in plans]
        draft = cluster.links.draft.over(cluster.links)
        self._to_drafter, self._from_drafter = LinkModel("head to drafter", draft), LinkModel("drafter to head", draft)

        self.stages: list[StageServer] = []
        self.stages += [
            StageServer(
                self.clock,
                index,
                plan,
                device_of(plan.device, plan.name),
                self.recorder,
                self._leave_last if index == len(plans) - 1 else self._leave_to(index + 1),
            )
            for index, plan in enumerate(plans)
        ]
        drafter_device = device_of(cluster.drafter.device, "drafter")
        self.drafter = DrafterServer(
            self.clock, scenario.drafter(), drafter_device, self.truth, self.recorder, self._leave_drafter
        )

    def run(self) -> Trace:
        """Carries the generation out to its end."""
        self._carry_out(self.recorder.handle(self._event, 0.0))
        scheduler, clock = self.recorder.scheduler, self.clock
        instant = events = 0
        while not scheduler.released:
            if not clock.step():
                raise InvariantError(f"the simulation came to a standstill (I7)\n{self}")
            events = events + 1 if clock.now == instant else 0
            instant = clock.now
            if events > _EVENTS_AT_ONCE:
                where = f"at {instant / 1e9} s, where {events} events took no time"
                raise InvariantError(f"the simulation came to a standstill {where} (I7)\n{self}")
        for link in (*self._hops, *self._controls, self._to_drafter, self._from_drafter):
            self.recorder.link_sent(link.name, link.sent_bytes)
        return self.recorder.trace()

    # -- the head --------------------------------------------------------------------------------------------------

    def _hear(self, event: Event) -> None:
        self._heard.append(event)
        if not self._busy:
            self._busy = True
            self._device.acquire(self._take_up)

    def _take_up(self) -> None:
        self.clock.at(self.clock.now + self._overhead, self._decide)

    def _decide(self, _: Timeout) -> None:
        self._carry_out(self.recorder.handle(self._heard.popleft(), self.clock.now / 1e9))
        self._device.release()
        if self._heard:
            self._device.acquire(self._take_up)
        else:
            self._busy = False

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case SubmitRun(run):
                    frame = Frame(run, self._row_bytes)
                    size = frame.void_bytes + tokens_bytes(run.rows)
                    self.clock.at(self._hops[0].send(self.clock.now, size), self.stages[0].arrive, frame)
                case RequestDraft():
                    self._request_draft(command)
                case CancelRuns(run_ids):
                    size = HEADER_BYTES + tokens_bytes(len(run_ids))
                    for link, stage in zip(self._controls, self.stages, strict=True):
                        self.clock.at(link.send(self.clock.now, size), stage.cancel, run_ids)
                case EmitTokens(_, tokens):
                    self._text.extend(tokens)

    def _request_draft(self, request: RequestDraft) -> None:
        """Sends the request with the text that the drafter has not seen yet."""
        size = HEADER_BYTES + tokens_bytes(request.frontier - self._told_drafter + len(request.path))
        self._told_drafter = request.frontier
        previous = request.path[-1] if request.path else self._text[request.frontier - 1]
        arrival = self._to_drafter.send(self.clock.now, size)
        self.clock.at(arrival, self.drafter.arrive, DraftJob(request, previous))

    def _hear_message(self, timeout: Timeout) -> None:
        self._hear(timeout._value)

    # -- what leaves stages and drafter ----------------------------------------------------------------------------

    def _leave_to(self, index: int) -> Callable[[Frame], None]:
        send, clock, stages = self._hops[index].send, self.clock, self.stages

        def leave(frame: Frame) -> None:
            arrival = send(clock.now, frame.void_bytes if frame.void else frame.live_bytes)
            clock.at(arrival, stages[index].arrive, frame)

        return leave

    def _leave_last(self, frame: Frame) -> None:
        run = frame.run
        predictions: tuple[int, ...] | None = None
        if not frame.void:
            rows = range(run.first_output_row, run.rows)
            predictions = tuple(self.truth.next(run.positions[row] + 1, run.tokens[row]) for row in rows)
        size = HEADER_BYTES + tokens_bytes(len(predictions or ()))
        arrival = self._hops[-1].send(self.clock.now, size)
        self.clock.at(arrival, self._hear_message, RunReturned(run.run_id, predictions))

    def _leave_drafter(self, draft: DraftReturned) -> None:
        arrival = self._from_drafter.send(self.clock.now, draft_bytes(len(draft.tree.tokens)))
        self.clock.at(arrival, self._hear_message, draft)

    def __str__(self) -> str:
        """Who waits for whom."""
        runs = [run.run_id for run in self.recorder.scheduler.generation.in_flight]
        head = f"head: waits for runs {runs}, {len(self._heard)} events unheard, on {self._device}"
        return "\n".join([head, *map(str, self.stages), str(self.drafter)])
