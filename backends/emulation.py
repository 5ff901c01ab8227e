"""Slower machines and networks than the real ones: when runs, drafts and messages of an emulated cluster are due.

One implementation of the model, two clocks: links, stage and draft times are the simulator's own objects. Nothing here
knows what time it is or waits; ``pacing.py`` and the head do. All times are whole nanoseconds since the prompt was
submitted. What is due follows from what was due before, never from when something really happened, so that the
lateness of real processes does not add up: it shows once, at the user's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import TypeAdapter

from backends.frames import Hop
from pipesim.errors import BadInputError
from pipesim.scenario import CrashFault, DraftPlan, LinkFault, LinkPlan, Scenario, SlowStageFault, StagePlan
from pipesim.scheduling.commands import RequestDraft
from pipesim.scheduling.runs import Run
from pipesim.simulation.courses import active_ns
from pipesim.simulation.faults import stage_pace
from pipesim.simulation.links import (
    LinkModel,
    cancellation_bytes,
    draft_bytes,
    metadata_bytes,
    request_bytes,
    result_bytes,
    tokens_bytes,
)
from pipesim.simulation.network import Entrance, Interface, Network, faults_of, make_link
from pipesim.simulation.stage import Frame
from pipesim.simulation.times import DraftTimes, StageTimes

T = TypeVar("T")


# -- what the nodes are told -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OutLink:
    """A link, as its sender must know it; ``egress_gbps`` is the interface that it leaves through, None: no limit."""

    plan: LinkPlan
    faults: tuple[LinkFault, ...]
    seed: int
    egress_gbps: float | None

    def model(self) -> LinkModel:
        """The link, before its first message."""
        return make_link(self.plan, self.faults, self.seed, Interface(self.egress_gbps) if self.egress_gbps else None)


@dataclass(frozen=True, slots=True)
class EmulatedStage:
    """A stage, the link behind it, and the interface through which its messages come in."""

    stage: int
    plan: StagePlan
    slow: tuple[SlowStageFault, ...]
    row_bytes: int
    out: OutLink
    ingress_gbps: float | None


@dataclass(frozen=True, slots=True)
class EmulatedDrafter:
    """The drafter, the link to the head, and the interface through which its requests come in."""

    plan: DraftPlan
    out: OutLink
    ingress_gbps: float | None


def to_bytes(part: EmulatedStage | EmulatedDrafter) -> bytes:
    """A part as JSON, for its node."""
    return TypeAdapter(type(part)).dump_json(part)


def from_bytes(kind: type[T], data: bytes) -> T:
    """The part that ``to_bytes`` wrote. Raises pydantic.ValidationError, a ValueError, for anything else."""
    return TypeAdapter(kind).validate_json(data)


def emulated_parts(scenario: Scenario) -> tuple[list[EmulatedStage], EmulatedDrafter]:
    """What stages and drafter must know of the scenario. Raises BadInputError for what cannot be emulated."""
    _check(scenario)
    nics = {device.name: device.nic_gbps for device in scenario.cluster.devices}
    plans, links = scenario.stages(), scenario.links()
    slow = tuple(fault for fault in scenario.faults if isinstance(fault, SlowStageFault))

    def out(index: int) -> OutLink:
        plan = links[index]
        leaves = plan.source != plan.target
        egress = nics.get(plan.source or "") if leaves else None
        return OutLink(plan, faults_of(scenario.faults, index, plan), scenario.seed, egress)

    row_bytes = scenario.row_bytes()
    stages = [
        EmulatedStage(index, plan, slow, row_bytes, out(index + 1), nics.get(plan.device or ""))
        for index, plan in enumerate(plans)
    ]
    drafter = scenario.cluster.drafter.device
    return stages, EmulatedDrafter(scenario.drafter(), out(len(links) - 1), nics.get(drafter or ""))


def _check(scenario: Scenario) -> None:
    cluster = scenario.cluster
    parts = [("the head", cluster.head.device), ("the drafter", cluster.drafter.device)]
    parts += [(plan.name, plan.device) for plan in scenario.stages()]
    for device in cluster.devices:
        users = [name for name, at in parts if at == device.name]
        enough = len(users) <= device.cores and device.sharing == "queue"
        shared = "cores" if not enough else "nic_gbps" if device.nic_gbps else ""
        if shared and len(users) > 1:
            raise BadInputError(
                f"execution.emulate: {', '.join(users)} share {shared} of the device {device.name!r}, which processes "
                "of their own cannot: give each a machine of its own, or leave nic_gbps out and as many cores as parts"
            )


# -- what is due when --------------------------------------------------------------------------------------------------


class _Gate:
    """Where messages of some links enter a device, through its interface if that has a limit.

    They queue there in the order in which they really come; the simulator's order is that of their modelled arrival.
    """

    def __init__(self, gbps: float | None) -> None:
        self._interface = Interface(gbps) if gbps else None
        self._entrances: dict[str, Entrance] = {}

    def arrival(self, link: str, hop: Hop) -> int:
        """When the message is there."""
        if self._interface is None:
            return hop.arrival
        entrance = self._entrances.setdefault(link, Entrance(self._interface))
        passage = (hop.start, hop.sent, hop.arrival)
        return entrance.entered(entrance.reached(passage, hop.size), passage, hop.size)[2]


def _sent(link: LinkModel, now: int, size: int) -> Hop:
    return Hop(*link.passage(now, size), size)


class PacedStage:
    """One stage in one session: a run at a time, as ``simulation.stage.StageServer`` on a machine of its own."""

    def __init__(self, part: EmulatedStage) -> None:
        self._times = StageTimes(part.plan, stage_pace(part.slow, part.stage))
        self._row_bytes = part.row_bytes
        self._is_last = part.plan.last
        self._out = part.out.model()
        self._gate = _Gate(part.ingress_gbps)
        self._dead: dict[int, int] = {}  # run -> when the stage hears that it is dead
        self._run: Frame | None = None
        self._arrival = 0
        self._begin = self._work = self._end = self._free_at = 0
        self._last_id = -1

    def cancel(self, run_ids: Sequence[int], hop: Hop) -> int:
        """The head calls off runs. Returns when the stage hears of it."""
        time = self._gate.arrival("control", hop)
        for run_id in run_ids:
            if run_id > self._last_id:
                self._dead[run_id] = time
        return time

    def begin(self, run: Run, hop: Hop, void: bool) -> None:
        """The next run, which comes by ``hop``; the one before has left."""
        self._run = frame = Frame(run, self._row_bytes)
        frame.void = void
        self._arrival = self._gate.arrival("data", hop)
        self._begin = max(self._arrival, self._free_at)
        self._work = self._times.work(run, frame.context)
        self._end = self._times.end(self._begin, self._work)

    def due(self) -> tuple[int, bool]:
        """When the run leaves, by what is known of it now, and whether it is dead then."""
        frame = self._run
        assert frame is not None
        died = self._dead.get(frame.run_id)
        if frame.void or (died is not None and died <= self._begin):
            return self._begin, True
        if died is None:
            return self._end, False
        end = self._times.cut(self._begin, self._work, self._end, died)
        return end, died <= end

    def leave(self, predictions: int) -> tuple[int, int, bool, Hop]:
        """The run goes on, on the last stage with so many tokens.

        Returns when it began and ended, whether it is dead, and how it crosses the next link.
        """
        frame = self._run
        assert frame is not None
        end, void = self.due()
        if self._is_last:
            size = result_bytes(0 if void else predictions)
        else:
            size = frame.void_bytes if void else frame.live_bytes
        self._last_id, self._free_at, self._run = frame.run_id, end, None
        self._dead.pop(frame.run_id, None)
        return self._begin, end, void, _sent(self._out, end, size)

    @property
    def arrival(self) -> int:
        """When the run at hand was there."""
        return self._arrival


class PacedDrafter:
    """The drafter in one session, as ``simulation.drafter.DrafterServer``: a newer request overtakes the older one."""

    def __init__(self, part: EmulatedDrafter, prompt_tokens: int) -> None:
        self._times = DraftTimes(part.plan, prompt_tokens)
        self._out = part.out.model()
        self._gate = _Gate(part.ingress_gbps)
        self._arrivals: list[int] = []
        self._begin = self._free_at = 0

    def order(self, hop: Hop) -> int:
        """A request comes by ``hop``; returns its number."""
        self._arrivals.append(self._gate.arrival("draft", hop))
        return len(self._arrivals) - 1

    def arrival(self, number: int) -> int:
        """When a request was there."""
        return self._arrivals[number]

    def begin(self, number: int, position: int) -> bool:
        """Takes a request up for tokens from ``position`` on, unless a newer one was there before its turn came."""
        start = max(self._arrivals[number], self._free_at)
        if self._overtaken_at(number, start) is not None:
            return False
        self._begin = start
        self._times.begin(start, position)
        return True

    def due(self, number: int, levels: int) -> tuple[int, bool]:
        """When a draft of so many levels is done, by what is known now, and whether it is abandoned then."""
        end = self._times.end(levels)
        overtaken = self._overtaken_at(number, end - 1)
        return (end, False) if overtaken is None else (min(end, self._times.cut(overtaken)), True)

    def leave(self, number: int, levels: int, nodes: int) -> tuple[int, int, Hop | None]:
        """The draft is done, with so many tokens. Returns when it began and ended, and how it goes home, if it does."""
        end, abandoned = self.due(number, levels)
        self._free_at = end
        return self._begin, end, None if abandoned else _sent(self._out, end, draft_bytes(nodes))

    def _overtaken_at(self, number: int, before: int) -> int | None:
        """When a newer request came, if that was until then."""
        later = self._arrivals[number + 1 :]
        return later[0] if later and later[0] <= before else None


class PacedHead:
    """The head in one session: how its messages cross their links, and when it has handled what it hears.

    Attributes:
        now: when it decided last; what it sends leaves then.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.now = 0
        self._network = Network(scenario)
        head = scenario.cluster.head
        self._overhead = round(head.overhead_ms * 1e6)
        own = head.draft_overhead_ms
        self._draft_overhead = self._overhead if own is None else round(own * 1e6)
        nics = {device.name: device.nic_gbps for device in scenario.cluster.devices}
        self._gate = _Gate(nics.get(scenario.cluster.head.device or ""))
        self._told_drafter = 0
        crashes = [fault for fault in scenario.faults if isinstance(fault, CrashFault)]
        self._unnoticed = [active_ns(crash.start_ms, crash.detect_ms) for crash in crashes]

    def submit(self, run: Run) -> Hop:
        """A run leaves for the first stage."""
        return _sent(self._network.data[0], self.now, metadata_bytes(run) + tokens_bytes(run.rows))

    def cancel(self, runs: int) -> list[Hop]:
        """A word to each stage that so many runs are dead."""
        return [_sent(link, self.now, cancellation_bytes(runs)) for link in self._network.control]

    def request(self, request: RequestDraft) -> Hop:
        """A request leaves for the drafter, with the text that is news there."""
        size = request_bytes(request.frontier - self._told_drafter, len(request.path))
        self._told_drafter = request.frontier
        return _sent(self._network.to_drafter, self.now, size)

    def arrival(self, link: str, hop: Hop) -> int:
        """When a result or a draft is there."""
        return self._gate.arrival(link, hop)

    def due(self, arrival: int, drafted: bool) -> int:
        """When the head, if it takes this result or draft up next, has handled it."""
        return max(arrival, self.now) + (self._draft_overhead if drafted else self._overhead)

    def noticed(self, now: int) -> int:
        """When the head hears of a loss that really shows at ``now``: for a while, nobody knows of a modelled crash."""
        return min((end for start, end in self._unnoticed if start <= now < end), default=now)

    def links(self) -> Iterator[LinkModel]:
        """All links, for their names: data, control, to and from the drafter."""
        return iter(self._network)
