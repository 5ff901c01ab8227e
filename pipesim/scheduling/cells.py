"""The KV cell table: which cell holds which position for which sequences. Metadata only, no tensors.

The scheduler keeps one at the point of submission; every stage keeps one at the point of execution. Both apply the
same operations in the same order, so they always hand out the same cells (invariants I5, I6).
"""

import heapq
from array import array
from collections.abc import Sequence

from pipesim.errors import InvariantError, KvCapacityError
from pipesim.scheduling.runs import KvOperation, Run, SequenceCopy


class CellTable:
    """``cells`` KV cells shared by ``sequences`` sequences (ids ``0 .. sequences-1``)."""

    def __init__(self, cells: int, sequences: int) -> None:
        if cells < 1 or sequences < 1:
            raise ValueError(f"cells and sequences must be at least 1, got {cells} and {sequences}")
        self.total = cells
        self.everyone = (1 << sequences) - 1
        self.clear()

    def clear(self) -> None:
        """Frees every cell."""
        self._sets: list[int] = [0] * self.total
        self._free: list[int] = list(range(self.total))  # sorted, hence a heap: lowest cell first
        self._at: list[list[int]] = []  # position -> its cells, oldest first
        self._shared = array("i")  # position -> its only cell, for the prefix that belongs to everyone

    @property
    def free(self) -> int:
        """Cells that nobody holds."""
        return len(self._free)

    @property
    def allocated(self) -> int:
        """Cells that some sequence holds."""
        return self.total - len(self._free)

    def admit(self, run: Run) -> list[int]:
        """Applies the run's KV operations, then allocates its cells; returns one cell index per row."""
        for operation in run.kv_operations:
            self.apply(operation)
        return self.allocate(run.positions, run.sequences)

    def apply(self, operation: KvOperation) -> None:
        """Carries out one KV operation on the metadata."""
        if isinstance(operation, SequenceCopy):
            self._copy(1 << operation.source, operation.targets, operation.start, operation.stop)
        else:
            self._remove(operation.sequences, operation.start, operation.stop)
        del self._shared[operation.start :]

    def _copy(self, source: int, targets: int, start: int, stop: int) -> None:
        sets = self._sets
        for cells in self._at[start:stop]:
            for cell in cells:
                if sets[cell] & source:  # all of the text's cells share one number
                    sets[cell] = targets if targets == self.everyone else sets[cell] | targets

    def _remove(self, sequences: int, start: int, stop: int) -> None:
        sets, at = self._sets, self._at
        for cells in at[start:stop]:
            freed = []
            for cell in cells:
                held_by = sets[cell]
                if held_by & sequences:
                    sets[cell] = held_by = held_by & ~sequences
                    if not held_by:
                        freed.append(cell)
            for cell in freed:
                cells.remove(cell)
                heapq.heappush(self._free, cell)
        while at and not at[-1]:
            at.pop()

    def allocate(self, positions: Sequence[int], sequences: Sequence[int]) -> list[int]:
        """Takes the lowest free cell for each row.

        Raises:
            KvCapacityError: fewer cells are free than rows asked for; nothing is allocated then.
        """
        if len(positions) > self.free:
            raise KvCapacityError(f"{len(positions)} KV cells needed, {self.free} of {self.total} free: raise kv_cells")
        sets, at, free, everyone = self._sets, self._at, self._free, self.everyone
        taken = []
        for position, held_by in zip(positions, sequences, strict=True):
            if not 0 < held_by <= everyone:
                raise InvariantError(f"sequence set {held_by:#x} at position {position} is empty or has unknown ids")
            cell = heapq.heappop(free)
            sets[cell] = held_by
            while len(at) < position:
                at.append([])
            if len(at) == position:
                at.append([cell])  # takes half the memory of an empty list that grows
            else:
                at[position].append(cell)
            taken.append(cell)
        return taken

    def shared_prefix(self) -> "array[int]":
        """The cell of each position of the longest prefix whose cells belong to every sequence, in position order.

        The array is the table's own: copy what you keep, do not change it, and ask again after the next operation.
        """
        position = len(self._shared)
        while position < len(self._at):
            here = self._at[position]
            if len(here) != 1 or self._sets[here[0]] != self.everyone:
                break
            self._shared.append(here[0])
            position += 1
        return self._shared

    def visible(self, position: int, sequences: int, start: int = 0) -> list[int]:
        """The cells a row sees at positions ``[start, position]``: exactly one for each, in order (I6).

        Raises:
            InvariantError: a position has no visible cell, or more than one.
        """
        seen = []
        for at in range(start, position + 1):
            cells = [cell for cell in self._at[at] if self._sets[cell] & sequences] if at < len(self._at) else []
            if len(cells) != 1:
                raise InvariantError(
                    f"a row at position {position} with sequences {sequences:#x} sees {len(cells)} cells "
                    f"at position {at}, exactly one expected"
                )
            seen.append(cells[0])
        return seen

    def release_all(self) -> None:
        """Ends the session: every cell leaves every sequence."""
        self._remove(self.everyone, 0, len(self._at))
        del self._shared[:]

    def check(self) -> None:
        """Verifies I5: every cell is either free or held by someone at exactly one position."""
        held = [cell for cells in self._at for cell in cells]
        if sorted(held + self._free) != list(range(self.total)) or not all(self._sets[cell] for cell in held):
            raise InvariantError(f"cell accounting broke: {len(held)} held + {self.free} free of {self.total}")
