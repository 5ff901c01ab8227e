"""Defects on purpose: what a campaign is worth shows in what it finds.

``python -m analysis.exactness.mutations NAME`` is the nursery of a pipeline whose stages have the defect; the head, and
plain decoding in its process, are sound.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.generation import Generation
from pipesim.scheduling.runs import RunKind
from pipesim.scheduling.speculation import Node

Patch = Callable[[], None]


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def _wrong_position() -> None:
    """The last row of a speculative run of several rows is rotated as if it stood one position earlier."""
    from backends.models import stage_model

    def make(plan_run: Any) -> Any:
        def mutated(run: Any, *rest: Any) -> Any:
            plan = plan_run(run, *rest)
            if run.kind is RunKind.SPECULATIVE and run.rows > 1:
                for look in plan.looks.values():
                    look.cos[run.rows - 1] = look.cos[run.rows - 2]
            return plan

        return mutated

    _replace(stage_model, "plan_run", make)


def _leaked_cell() -> None:
    """A row sees the oldest cell of the position before its own, whichever branch that belongs to."""

    def make(visible: Any) -> Any:
        def mutated(self: CellTable, position: int, sequences: int, start: int = 0) -> list[int]:
            seen: list[int] = visible(self, position, sequences, start)
            if len(seen) > 1:
                seen[-2] = self._at[position - 1][0]
            return seen

        return mutated

    _replace(CellTable, "visible", make)


def _forgotten_operations() -> None:
    """The KV operations in front of a run are forgotten if it carries more than four rows of a draft."""

    def make(admit: Any) -> Any:
        def mutated(self: CellTable, run: Any) -> Any:
            forgets = run.kind is RunKind.SPECULATIVE and run.rows > 4
            return admit(self, dataclasses.replace(run, kv_operations=()) if forgets else run)

        return mutated

    _replace(CellTable, "admit", make)


def _noise_by_run() -> None:
    """The noise is a function of the run that computes a token, not of its position."""
    from backends.models.stage_model import StageModel
    from backends.sampling import Sampling

    run_id = 0

    def make_forward(forward: Any) -> Any:
        def mutated(self: StageModel, session: int, run: Any, *rest: Any) -> Any:
            nonlocal run_id
            run_id = run.run_id
            return forward(self, session, run, *rest)

        return mutated

    def make_pick(pick: Any) -> Any:
        def mutated(self: Sampling, logits: Any, position: int, history: Sequence[int] = ()) -> Any:
            return pick(dataclasses.replace(self, seed=(self.seed + run_id) % 2**64), logits, position, history)

        return mutated

    _replace(StageModel, "forward", make_forward)
    _replace(Sampling, "pick", make_pick)


def _history_of_another_branch() -> None:
    """A repetition penalty looks at the run's first row's branch for all of its rows."""
    from backends.models.stage_model import Session

    def make(histories: Any) -> Any:
        def mutated(self: Session, run: Any) -> Any:
            found = histories(self, run)
            return [[*found[0], *found[-1]][: len(history)] for history in found]

        return mutated

    _replace(Session, "histories", make)


def _other_tiles() -> None:
    """Rows are multiplied as many together as come, as a plain product would."""
    from backends.models.exact import Tiling

    def make(split: Any) -> Any:
        def mutated(self: Tiling, rows: int) -> tuple[int, tuple[tuple[int, int], ...]]:
            return rows, ((0, rows),)

        return mutated

    _replace(Tiling, "split", make)


STAGE_DEFECTS: dict[str, Patch] = {
    "wrong position": _wrong_position,
    "leaked cell": _leaked_cell,
    "forgotten operations": _forgotten_operations,
    "noise by run": _noise_by_run,
    "history of another branch": _history_of_another_branch,
    "no row tiles": _other_tiles,
}
"""Defects of stages by name."""


def _unverified(walk: Any) -> Any:
    """The head takes a draft's first token for text, whatever the target model says."""

    def mutated(root: Node, token: int) -> Node:
        return walk(root, root.first_child.token if root.first_child else token)

    return mutated


def _wrong_winner(promote: Any) -> Any:
    """The head promotes the cells of the branch that was drafted last."""

    def mutated(self: Generation, last: Node) -> None:
        highest = 1 << last.sequences.bit_length() - 1
        last.sequences = highest if self.in_flight else last.sequences
        promote(self, last)

    return mutated
