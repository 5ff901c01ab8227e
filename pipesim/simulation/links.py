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

    def passage(self, now: int, size_bytes: int) -> Passage:
        """How a message crosses that is put on the link at ``now``; it arrives never before an earlier message.

        Real senders of an emulated link ask for this by the clock on the wall.
        """
        self.sent_bytes += size_bytes
        start = self._free_at if self._free_at > now else now
        self._free_at = sent = start + round(size_bytes * self._ns_per_byte)
        return start, sent, sent + self._latency

    def send(self, now: int, size_bytes: int, then: Callable[[Passage, T], None], value: T) -> None:
        """Puts a message on the link at ``now``, as ``passage``.

        Calls ``then(passage, value)`` as soon as the passage is known, at once or later, but not after the arrival.
        """
        then(self.passage(now, size_bytes), value)


def metadata_bytes(run: Run) -> int:
    """What a run's frame holds even if the run is void: stages must still do its KV bookkeeping."""
    return HEADER_BYTES + run.rows * ROW_BYTES + len(run.kv_operations) * KV_OPERATION_BYTES


def tokens_bytes(tokens: int) -> int:
    """Token ids: what the head sends to the first stage beside the metadata, and what the last stage sends home."""
    return tokens * TOKEN_BYTES


def result_bytes(predictions: int) -> int:
    """What comes home of a run: a token for each row that was asked for, none of a void run."""
    return HEADER_BYTES + tokens_bytes(predictions)


def cancellation_bytes(runs: int) -> int:
    """The head's word to a stage that so many runs are dead."""
    return HEADER_BYTES + tokens_bytes(runs)


def request_bytes(news: int, path: int) -> int:
    """A draft request: the committed tokens that are news to the drafter, and those that it shall draft after."""
    return HEADER_BYTES + tokens_bytes(news + path)


def draft_bytes(nodes: int) -> int:
    """A drafter's answer: token, parent and confidence of each node."""
    return HEADER_BYTES + nodes * 3 * TOKEN_BYTES
