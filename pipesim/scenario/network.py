"""Links of a scenario. Bandwidth occupies a link, latency does not."""

from pydantic import Field

from pipesim.scenario.section import Section


class Link(Section):
    """An ordered channel. Bandwidth occupies it, latency does not."""

    latency_ms: float = Field(default=0.0, ge=0)
    """Propagation time of every message."""
    bandwidth_gbps: float | None = Field(default=None, gt=0)
    """10^9 bits per second; null: without limit."""


class OwnLink(Section):
    """What differs from the data links in general; what is null is as there."""

    latency_ms: float | None = Field(default=None, ge=0)
    """Propagation time of every message."""
    bandwidth_gbps: float | None = Field(default=None, gt=0)
    """10^9 bits per second."""

    def over(self, links: Link) -> Link:
        """The whole link."""
        return Link(
            latency_ms=links.latency_ms if self.latency_ms is None else self.latency_ms,
            bandwidth_gbps=links.bandwidth_gbps if self.bandwidth_gbps is None else self.bandwidth_gbps,
        )


class Hop(OwnLink):
    """A data link that differs from the others; what is null is as everywhere."""

    hop: int = Field(ge=0)
    """Which one: 0 is head to first stage, 1 first to second stage, ..., the last one leads home to the head."""


class Links(Link):
    """All links: latency and bandwidth of the data links, and what differs."""

    hops: tuple[Hop, ...] = Field(default=(), strict=False)
    """Data links that differ."""
    control: OwnLink = OwnLink()
    """Each link from the head directly to a stage, for cancellations; what is null is as the data links."""
    draft: OwnLink = OwnLink()
    """The links from the head to the drafter and back; what is null is as the data links."""
