"""Links of a scenario: an ordered channel each. Bandwidth occupies it, latency does not.

A setting is looked up from the particular to the general: a link's own value, its own preset, what holds for all data
links, their preset, the default.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipesim.scenario.section import Section


class ProfilePoint(Section):
    """What holds from one moment on; what is null is left as it is."""

    at_ms: float = Field(ge=0)
    """Time since the prompt was submitted, or since the period began."""
    latency_ms: float | None = Field(default=None, ge=0)
    """Propagation time from then on."""
    bandwidth_gbps: float | None = Field(default=None, gt=0)
    """10^9 bits per second from then on."""


class Profile(Section):
    """Latency and bandwidth that change over time. Before the first point of each, the link's own value holds."""

    points: tuple[ProfilePoint, ...] | None = Field(default=None, strict=False)
    """The course, in order of time; or give ``file``."""
    file: Path | None = Field(default=None, strict=False)
    """CSV with a header row and the columns at_ms, latency_ms, bandwidth_gbps: as ``points``, an empty cell is null,
    one of the last two columns may be left out. Relative to the scenario file."""
    shape: Literal["steps", "ramps"] = "steps"
    """Values hold until the next point (steps), or go there in a straight line (ramps)."""
    period_ms: float | None = Field(default=None, ge=1)
    """Repeat the points with this period; ramps then lead back to the first point. Null: the last value holds on."""

    def problems(self, field: str) -> Iterator[str]:
        """What is wrong with it, except what a file holds."""
        if (self.points is None) == (self.file is None):
            yield f"{field}: give either points or file"
        if self.points is not None:
            yield from course_problems(f"{field}.points", self.points, self.period_ms)


def course_problems(field: str, points: Sequence[ProfilePoint], period_ms: float | None) -> Iterator[str]:
    """What is wrong with a profile's points, wherever they come from."""
    if not points:
        yield f"{field}: there is no point in it, give at least one"
        return
    for before, after in pairwise(points):
        if round(after.at_ms * 1e6) <= round(before.at_ms * 1e6):  # simulated time is whole nanoseconds
            yield f"{field}: at_ms = {after.at_ms} stands behind {before.at_ms}: put the points in order of time"
    if period_ms is not None:
        if round(points[-1].at_ms * 1e6) >= round(period_ms * 1e6):
            yield f"{field}: at_ms = {points[-1].at_ms} is not within period_ms = {period_ms}"
        for name in ("latency_ms", "bandwidth_gbps"):
            given = [point.at_ms for point in points if getattr(point, name) is not None]
            if given and given[0]:
                yield f"{field}: {name} begins at {given[0]} ms: a course that repeats needs its value at 0 ms"


@dataclass(frozen=True, slots=True)
class Link:
    """One link, all settings resolved; ``OwnLink`` says what they mean. ``bandwidth_gbps`` None: without limit."""

    latency_ms: float = 0.0
    bandwidth_gbps: float | None = None
    jitter_ms: float = 0.0
    loss: float = 0.0
    retransmit_ms: float = 200.0
    mtu_bytes: int = 1500
    profile: Profile | None = None


_TCP_SHARE = 1448 / 1538
"""Payload of a full Ethernet frame: 1500 bytes less 52 of IP and TCP headers, of 1538 on the wire (IEEE 802.3)."""

PRESETS: Mapping[str, Link] = {
    "loopback": Link(latency_ms=0.02, bandwidth_gbps=30.0),
    "10gbe": Link(latency_ms=0.025, bandwidth_gbps=10 * _TCP_SHARE),
    "1gbe": Link(latency_ms=0.05, bandwidth_gbps=_TCP_SHARE),
    "100mbe": Link(latency_ms=0.1, bandwidth_gbps=0.1 * _TCP_SHARE),
    # 4 lanes of 25.78125 Gbaud, 64b/66b coded: 100 Gbit/s. Latency as of RDMA verbs; TCP over it takes about ten times.
    "infiniband-edr": Link(latency_ms=0.001, bandwidth_gbps=100.0),
    "wifi": Link(latency_ms=1.5, bandwidth_gbps=0.4, jitter_ms=1.5, loss=0.001),
    "wan": Link(latency_ms=25.0, bandwidth_gbps=0.5, jitter_ms=1.0, loss=0.0001),
}
"""Typical links. Bandwidths of Ethernet and InfiniBand follow from their standards; what is left is typical of Linux
hosts behind one switch, of 802.11ac in one room, and of two sites on one continent."""


class OwnLink(Section):
    """What differs from the data links in general; what is null is as there."""

    preset: Literal["loopback", "10gbe", "1gbe", "100mbe", "infiniband-edr", "wifi", "wan"] | None = None
    """Typical values for all that is null here."""
    latency_ms: float | None = Field(default=None, ge=0)
    """Propagation time of every message (0)."""
    bandwidth_gbps: float | None = Field(default=None, gt=0)
    """10^9 bits per second (without limit)."""
    jitter_ms: float | None = Field(default=None, ge=0)
    """Mean of a random extra delay of every message: exponential, cut off at ten means (0). Messages stay in order."""
    loss: float | None = Field(default=None, ge=0, lt=1)
    """Probability that a packet is lost, each transmission for itself (0). Nothing is lost for good: see
    ``retransmit_ms``. Later messages wait."""
    retransmit_ms: float | None = Field(default=None, ge=0)
    """Delay of a message for each time that the unluckiest of its packets is lost (200: the least timeout of Linux's
    TCP; a fast retransmission takes about a round trip)."""
    mtu_bytes: int | None = Field(default=None, ge=64)
    """Bytes of a message that travel in one packet (1500)."""
    profile: Profile | None = None
    """How latency and bandwidth change over time."""

    def over(self, general: Link) -> Link:
        """The whole link: own values, else those of the own preset, else ``general``."""
        own = {name: getattr(self, name) for name in Link.__slots__ if getattr(self, name) is not None}
        return dataclasses.replace(PRESETS[self.preset] if self.preset else general, **own)


class Hop(OwnLink):
    """A data link that differs from the others; what is null is as everywhere."""

    hop: int = Field(ge=0)
    """Which one: 0 is head to first stage, 1 first to second stage, ..., the last one leads home to the head."""


class Links(OwnLink):
    """All links: the data links in general, and what differs. Null stands for the value in parentheses."""

    hops: tuple[Hop, ...] = Field(default=(), strict=False)
    """Data links that differ."""
    control: OwnLink = OwnLink()
    """Each link from the head directly to a stage, for cancellations; what is null is as the data links."""
    draft: OwnLink = OwnLink()
    """The links from the head to the drafter and back; what is null is as the data links."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the profiles."""
        places: list[tuple[str, OwnLink]] = [("", self), (".control", self.control), (".draft", self.draft)]
        places += [(f".hops.{i}", hop) for i, hop in enumerate(self.hops)]
        for place, link in places:
            if link.profile is not None:
                yield from link.profile.problems(f"cluster.links{place}.profile")

    def shadowed(self) -> Iterator[str]:
        """What is said of links in general in vain, since in a profile each has its own, measured."""
        for name in ("latency_ms", "bandwidth_gbps"):
            measured = [i for i, hop in enumerate(self.hops) if getattr(hop, name) is not None]
            if getattr(self, name) is not None and measured:
                hops = ", ".join(f"cluster.links.hops.{i}.{name}" for i in measured)
                yield f"cluster.links.{name}: measured links have their own: set {hops}, or cluster.links as a whole"


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """One link of a scenario. ``source`` and ``target`` are the devices at its ends, None for a machine of its own."""

    name: str
    group: Literal["data", "control", "draft"]
    link: Link
    source: str | None
    target: str | None


def link_plans(
    links: Links, head: str | None, stages: Sequence[str | None], drafter: str | None
) -> tuple[LinkPlan, ...]:
    """All links between head, stages and drafter, each given by its device.

    The data links in order (head to first stage, between stages, last stage to head), a control link to each stage, to
    the drafter and back.
    """
    named = [(f"stage {index}", device) for index, device in enumerate(stages)]
    ring = [("head", head), *named, ("head", head)]
    special, general = {hop.hop: hop for hop in links.hops}, links.over(Link())
    plans = [
        LinkPlan(f"{source} to {target}", "data", special.get(index, OwnLink()).over(general), at, to)
        for index, ((source, at), (target, to)) in enumerate(pairwise(ring))
    ]
    control, draft = links.control.over(general), links.draft.over(general)
    plans += [LinkPlan(f"head to {name} (control)", "control", control, head, device) for name, device in named]
    plans += [LinkPlan("head to drafter", "draft", draft, head, drafter)]
    plans += [LinkPlan("drafter to head", "draft", draft, drafter, head)]
    return tuple(plans)
