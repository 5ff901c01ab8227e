"""Links with all that can be said of them: jitter, loss, courses over time, faults, shared network interfaces.

A message passes the interface of the device that it leaves, the link, and the interface of the device that it enters.
Each of the three is a FIFO serializer at its own rate, and bits flow on as they come (cut-through): alone, a message
takes as long as the slowest of the three needs; where messages of several links meet at an interface, they queue.

Links deliver in order, as TCP does: a message that is late, by jitter or loss, holds up those behind it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from pipesim.scenario import Fault, LinkFault, LinkPlan, Scenario
from pipesim.scenario.faults import BandwidthFault, JitterFault, LatencyFault, LossFault, PartitionFault
from pipesim.simulation.courses import (
    NS_PER_MS,
    Course,
    Piece,
    active_ns,
    bandwidth_course,
    latency_course,
    overlay,
    transfer_end,
)
from pipesim.simulation.devices import Clock
from pipesim.simulation.links import LinkModel, Passage, T
from pipesim.simulation.randomness import mix, stream, unit
from pipesim.simulation.sharing import FairDevice, LocalLink

_JITTER_CUT = 10.0
"""The exponential distribution of jitter ends at this many means: 1 of 22,000 messages would exceed it."""
_NOTHING = Course(0.0)
_NO_CAP = Course(math.inf)


class Interface:
    """One direction of a device's network interface."""

    def __init__(self, gbps: float) -> None:
        self._ns_per_byte = 8.0 / gbps
        self._free_at = 0

    def needs(self, size_bytes: int) -> int:
        """Time that a message keeps it busy."""
        return round(size_bytes * self._ns_per_byte)

    def enter(self, now: int, size_bytes: int) -> tuple[int, int]:
        """A message's first bit comes at ``now``; returns when its first and its last bit can leave."""
        start = max(now, self._free_at)
        self._free_at = start + self.needs(size_bytes)
        return start, self._free_at


class Entrance:
    """Where a link enters a device through ``interface``, which other links may enter, too."""

    def __init__(self, interface: Interface) -> None:
        self._interface = interface
        self._first_arrival = 0  # of the message before

    def reached(self, passage: Passage, size_bytes: int) -> int:
        """When the first bit of a message is there that crossed the link."""
        start, end, arrival = passage
        # a slow or interrupted link fills the interface with gaps for others
        busy = min(end - start, self._interface.needs(size_bytes))
        self._first_arrival = max(self._first_arrival, arrival - busy)
        return self._first_arrival

    def entered(self, now: int, passage: Passage, size_bytes: int) -> Passage:
        """The whole way of the message whose first bit is there ``now``: asked in this order for all links."""
        start, end, arrival = passage
        return start, end, max(arrival, self._interface.enter(now, size_bytes)[1])


class VaryingLink(LinkModel):
    """A link whose speed changes, by its profile, by chance and by faults, or that leaves through a shared interface.

    Every effective value is computed at the moment of use, from the link's own and the faults active then; nothing is
    saved and put back. Chance is drawn by (seed, link name, message number).
    """

    def __init__(self, plan: LinkPlan, faults: Sequence[LinkFault], seed: int, egress: Interface | None = None) -> None:
        super().__init__(plan.name, plan.link)
        link = plan.link
        self._link = link
        self._base_latency = latency_course(plan)
        self._bandwidth = bandwidth_course(plan)
        self._extra_latency = overlay(_effects(faults, LatencyFault, "extra_ms"), sum) or _NOTHING
        self._extra_jitter = overlay(_effects(faults, JitterFault, "extra_ms"), sum) or _NOTHING
        own_loss = partial(_any_of, link.loss)
        self._loss = overlay(_effects(faults, LossFault, "probability"), own_loss) or Course(link.loss)
        caps = [*_effects(faults, BandwidthFault, "cap_gbps"), *_effects(faults, PartitionFault)]
        self._cap = overlay(caps, partial(min, default=math.inf)) or _NO_CAP
        self._chance = stream(seed, f"link {plan.name}")
        self._messages = 0
        self._egress = egress
        self._last_arrival = 0  # of the message before

    def passage(self, now: int, size_bytes: int) -> Passage:
        """As ``LinkModel.passage``."""
        self.sent_bytes += size_bytes
        start, leaves = self._egress.enter(now, size_bytes) if self._egress else (now, now)
        start = self._restored(max(start, self._free_at))
        end = max(leaves, transfer_end(start, size_bytes, self._rate))
        arrival = max(self._last_arrival, end + self._latency_at(end) + self._delay(end, size_bytes))
        while (restored := self._restored(arrival)) > arrival:  # lost in a partition: sent again at its end
            arrival = restored + self._latency_at(restored)
        self._free_at, self._last_arrival = end, arrival
        return start, end, arrival

    def _restored(self, time: int) -> int:
        """``time``, or the end of the partition that it falls into."""
        while not self._cap.at(time):
            time = int(self._cap.piece(time).end)
        return time

    def _rate(self, time: int) -> Piece:
        """The effective bandwidth: the lower one of the link's own and the cap."""
        gbps, slope, end = self._bandwidth.piece(time)
        cap, _, until = self._cap.piece(time)
        end = min(end, until)
        meet = (cap - gbps) / slope if slope else 0.0  # nanoseconds from now
        if 0 < meet < end - time:
            end = time + math.ceil(meet)
        return Piece(gbps, slope, end) if gbps < cap or (gbps == cap and slope < 0) else Piece(cap, 0.0, end)

    def _latency_at(self, time: int) -> int:
        return round(self._base_latency.at(time)) + round(self._extra_latency.at(time) * NS_PER_MS)

    def _delay(self, time: int, size_bytes: int) -> int:
        """Jitter and retransmissions of the next message, whose last bit leaves at ``time``."""
        chance = self._chance + 2 * self._messages
        self._messages += 1
        link = self._link
        delay = 0
        if mean := link.jitter_ms + self._extra_jitter.at(time):
            delay += round(mean * min(_JITTER_CUT, -math.log(1.0 - unit(mix(chance)))) * NS_PER_MS)
        if (pause := round(link.retransmit_ms * NS_PER_MS)) and self._loss.at(time):
            packets = max(1, -(-size_bytes // link.mtu_bytes))
            delay += pause * losses(1.0 - unit(mix(chance + 1)), packets, self._loss, time, pause)
        return delay


class EnteringLink(VaryingLink):
    """A link into a shared interface, which messages of all its links pass in order of arrival."""

    def __init__(
        self,
        clock: Clock,
        ingress: Interface,
        plan: LinkPlan,
        faults: Sequence[LinkFault],
        seed: int,
        egress: Interface | None,
    ) -> None:
        super().__init__(plan, faults, seed, egress)
        self._clock = clock
        self._entrance = Entrance(ingress)

    def send(self, now: int, size_bytes: int, then: Callable[[Passage, T], None], value: T) -> None:
        """As ``LinkModel.send``."""
        passage = self.passage(now, size_bytes)

        def enter(_: object) -> None:
            then(self._entrance.entered(self._clock.now, passage, size_bytes), value)

        self._clock.at(self._entrance.reached(passage, size_bytes), enter)


def losses(chance: float, packets: int, loss: Course, time: int, pause: int) -> int:
    """How often the unluckiest of a message's packets is lost, all others being sent again meanwhile.

    Each of ``packets`` is sent at ``time``, and ``pause`` later again where it was lost. It is lost k times or fewer
    with probability 1 - product of ``loss`` at the first k + 1 of these moments; all of them with that to the power
    of ``packets``. ``chance``, uniform in (0, 1], is taken for that probability, and k solved for.
    """
    exceeded = -math.expm1(math.log(chance) / packets)  # of a single packet, to be lost more than k times
    left, sent = math.log(exceeded) if exceeded else 0.0, 0
    while True:
        now = time + sent * pause
        probability, _, end = loss.piece(now)
        each = math.log(probability) if probability else -math.inf
        needed = max(1, math.ceil(left / each)) if each else math.inf  # faults together may round to certain loss
        before_end = math.inf if end == math.inf else -(-(int(end) - now) // pause)
        if needed <= before_end:
            return sent + int(needed) - 1
        left -= before_end * each
        sent += int(before_end)


class Network:
    """All links of a scenario. ``shared``: its fair devices, by name.

    Without a ``clock`` they tell passages up to the device that they lead to; an interface there is not taken into
    account, because only who receives the messages of all links knows their order.
    """

    def __init__(
        self,
        scenario: Scenario,
        clock: Clock | None = None,
        shared: Mapping[str, FairDevice] = MappingProxyType({}),
    ) -> None:
        self._clock = clock
        self._scenario = scenario
        self._shared = shared
        nics = {device.name: device.nic_gbps for device in scenario.cluster.devices if device.nic_gbps}
        self._egress = {name: Interface(gbps) for name, gbps in nics.items()}
        self._ingress = {name: Interface(gbps) for name, gbps in nics.items()}
        plans = scenario.links()
        links = [self._make(index, plan) for index, plan in enumerate(plans)]
        self.data = [link for link, plan in zip(links, plans, strict=True) if plan.group == "data"]
        """Head to first stage, between stages, last stage to head."""
        self.control = [link for link, plan in zip(links, plans, strict=True) if plan.group == "control"]
        """From the head to each stage."""
        self.to_drafter, self.from_drafter = links[-2:]

    def __iter__(self) -> Iterator[LinkModel]:
        return iter((*self.data, *self.control, self.to_drafter, self.from_drafter))

    def _make(self, index: int, plan: LinkPlan) -> LinkModel:
        seed, faults = self._scenario.seed, faults_of(self._scenario.faults, index, plan)
        leaves_device = plan.source != plan.target
        egress = self._egress.get(plan.source or "") if leaves_device else None
        ingress = self._ingress.get(plan.target or "") if leaves_device else None
        if ingress and self._clock is not None:
            return EnteringLink(self._clock, ingress, plan, faults, seed, egress)
        link = make_link(plan, faults, seed, egress)
        shared = None if leaves_device else self._shared.get(plan.source or "")
        return LocalLink(plan.name, plan.link, shared) if shared and type(link) is LinkModel else link


def make_link(plan: LinkPlan, faults: Sequence[LinkFault], seed: int, egress: Interface | None = None) -> LinkModel:
    """A plain link, unless more is asked of it."""
    link = plan.link
    if faults or link.jitter_ms or link.loss or link.profile or egress:
        return VaryingLink(plan, faults, seed, egress)
    return LinkModel(plan.name, link)


def faults_of(faults: Iterable[Fault], index: int, plan: LinkPlan) -> tuple[LinkFault, ...]:
    """Those that hit the link which is number ``index`` of the scenario's."""
    targets = (plan.name, plan.group, "all", index if plan.group == "data" else plan.name)
    return tuple(fault for fault in faults if isinstance(fault, LinkFault) and fault.link in targets)


def _effects(faults: Sequence[LinkFault], kind: type, strength: str | None = None) -> list[tuple[int, int, float]]:
    """Start, end and strength of the faults of one kind; strength 0 where a kind has none."""
    return [
        (*active_ns(fault.start_ms, fault.duration_ms), getattr(fault, strength) if strength else 0.0)
        for fault in faults
        if isinstance(fault, kind)
    ]


def _any_of(own: float, others: list[float]) -> float:
    """Probability that at least one of several independent things happens."""
    return 1.0 - math.prod(1.0 - one for one in (*others, own)) if others else own
