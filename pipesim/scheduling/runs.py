"""What travels down the pipeline: runs, and the KV operations that precede them in the ordered stream.

A *sequence set* is an ``int`` used as a bit set: bit ``i`` says "belongs to sequence ``i``". Sequence 0 is the
canonical one; the others belong to sequence partitions (see ``partitions.py``).
"""

from dataclasses import dataclass
from enum import StrEnum

END = 2**31 - 1
"""``stop`` of a position range that has no end."""


class RunKind(StrEnum):
    """Why a run exists. Prefill rows and decode rows may use different kernels, so text never mixes the two."""

    PREFILL = "prefill"
    CANONICAL = "canonical"
    SPECULATIVE = "speculative"


@dataclass(frozen=True, slots=True)
class SequenceCopy:
    """Cells of ``source`` (a sequence id) at positions ``[start, stop)`` also join every sequence in ``targets``."""

    source: int
    targets: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SequenceRemove:
    """Cells at positions ``[start, stop)`` leave every sequence in ``sequences``; a cell in no sequence is free."""

    sequences: int
    start: int
    stop: int


KvOperation = SequenceCopy | SequenceRemove


@dataclass(frozen=True, slots=True)
class Run:
    """One batch of tokens on its way through all stages.

    Row ``i`` holds ``tokens[i]`` at ``positions[i]``, writes one KV cell that belongs to ``sequences[i]``, attends to
    the cells whose sets intersect ``sequences[i]`` at positions up to its own, and predicts position
    ``positions[i] + 1``. Rows before ``first_output_row`` are not predicted: nobody reads them.
    ``kv_operations`` are applied by every stage, in order, before the run's cells are allocated, even if the run
    is cancelled: all cell tables along the pipeline stay equal.
    """

    run_id: int
    epoch: int
    kind: RunKind
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    sequences: tuple[int, ...]
    first_output_row: int = 0
    kv_operations: tuple[KvOperation, ...] = ()

    def __post_init__(self) -> None:
        if not self.tokens or not len(self.tokens) == len(self.positions) == len(self.sequences):
            raise ValueError(
                f"run {self.run_id}: tokens, positions and sequences need one equal length of at least 1, "
                f"got {len(self.tokens)}, {len(self.positions)}, {len(self.sequences)}"
            )
        if not 0 <= self.first_output_row <= len(self.tokens):
            raise ValueError(f"run {self.run_id}: first_output_row {self.first_output_row} is outside the rows")

    @property
    def rows(self) -> int:
        """How many tokens the run carries."""
        return len(self.tokens)

    @property
    def outputs(self) -> int:
        """How many predictions the last stage sends home."""
        return len(self.tokens) - self.first_output_row
