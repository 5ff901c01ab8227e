"""Links in simulated time, and the sizes of what travels on them. All times are whole nanoseconds.

Whole numbers keep the simulation exact: sums do not depend on their order, and two messages that should arrive at the
same time do, in the order in which they were sent.
"""

from collections.abc import Callable
from typing import TypeVar

from pipesim.scenario import Link
from pipesim.scheduling.runs import Run

T = TypeVar("T")
HEADER_BYTES = 64
"""Session, epoch, run id, shapes and timestamps of a frame, or the whole of a small message beside its tokens."""
TOKEN_BYTES = 4
ROW_BYTES = 12
"""Position and sequence set of one row."""
KV_OPERATION_BYTES = 24

Passage = tuple[int, int, int]
"""A message on a link: when its serialisation begins and ends, and when it arrives. Ascending, in nanoseconds."""


class LinkModel:
    """A FIFO serializer followed by a delay: bandwidth occupies the link, propagation does not."""

    def __init__(self, name: str, link: Link) -> None:
        self.name = name
        self.sent_bytes = 0
        self._latency = round(link.latency_ms * 1e6)
        self._ns_per_byte = 8.0 / link.bandwidth_gbps if link.bandwidth_gbps else 0.0
        self._free_at = 0

    def send(self, now: int, size_bytes: int, then: Callable[[Passage, T], None], value: T) -> None:
        """Puts a message on the link at ``now``; it arrives never before an earlier message.

        Calls ``then(passage, value)`` as soon as the passage is known, at once or later, but not after the arrival.
        """
        self.sent_bytes += size_bytes
        start = self._free_at if self._free_at > now else now
        self._free_at = sent = start + round(size_bytes * self._ns_per_byte)
        then((start, sent, sent + self._latency), value)


def metadata_bytes(run: Run) -> int:
    """What a run's frame holds even if the run is void: stages must still do its KV bookkeeping."""
    return HEADER_BYTES + run.rows * ROW_BYTES + len(run.kv_operations) * KV_OPERATION_BYTES


def tokens_bytes(tokens: int) -> int:
    """Token ids: what the head sends to the first stage beside the metadata, and what the last stage sends home."""
    return tokens * TOKEN_BYTES


def draft_bytes(nodes: int) -> int:
    """A drafter's answer: token, parent and confidence of each node."""
    return HEADER_BYTES + nodes * 3 * TOKEN_BYTES
