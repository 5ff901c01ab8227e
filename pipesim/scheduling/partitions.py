"""Sequence partitions: private sequence ids for speculative runs (PipeInfer's KV cache multibuffering).

Sequence 0 is canonical. Partition ``p`` owns the ``branches`` ids ``1 + p * branches ...``: one for each branch of
a run's token tree. A partition serves one run at a time, from submission until the run came home.
"""

from collections import deque

from pipesim.errors import InvariantError

CANONICAL = 1
"""The sequence set that holds sequence 0 alone."""


class PartitionPool:
    """A FIFO of free partitions, so that a freed one rests as long as possible before it is used again."""

    def __init__(self, partitions: int, branches: int) -> None:
        self.total = partitions
        self.branches = branches
        self.sequences = 1 + partitions * branches
        self._free = deque(range(partitions))

    @property
    def free(self) -> int:
        """Partitions that no run in flight uses."""
        return len(self._free)

    def take(self) -> int:
        """The partition that has been free for longest. Raises IndexError when none is."""
        return self._free.popleft()

    def give_back(self, partition: int) -> None:
        """Returns ``partition`` to the end of the FIFO."""
        if partition in self._free:
            raise InvariantError(f"partition {partition} was given back twice")
        self._free.append(partition)

    def sequence(self, partition: int, branch: int) -> int:
        """The sequence id of one branch of a partition."""
        return 1 + partition * self.branches + branch

    def sequence_set(self, partition: int) -> int:
        """All ids of a partition as a sequence set."""
        return ((1 << self.branches) - 1) << self.sequence(partition, 0)


def lowest_sequence(sequences: int) -> int:
    """The smallest id in a non-empty sequence set."""
    return (sequences & -sequences).bit_length() - 1
