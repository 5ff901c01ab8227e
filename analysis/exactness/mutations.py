"""Defects on purpose: what a campaign is worth shows in what it finds.

``python -m analysis.exactness.mutations NAME`` is the nursery of a pipeline whose stages have the defect; the head, and
plain decoding in its process, are sound.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from pipesim.scheduling import generation
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.generation import Generation
from pipesim.scheduling.runs import Run, RunKind
from pipesim.scheduling.speculation import InFlightRun, Node

Make = Callable[[Any], Any]
"""Makes a defective function of a sound one."""


def _wrong_position() -> None:
    from backends.models.stage_model import StageModel

    def make(hidden_states: Any) -> Any:
        def mutated(self: StageModel, session: int, run: Run, *rest: Any) -> Any:
            if run.kind is RunKind.SPECULATIVE and run.rows > 1:
                *others, last = run.positions
                run = dataclasses.replace(run, positions=(*others, last - 1))
            return hidden_states(self, session, run, *rest)

        return mutated

    _replace(StageModel, "_hidden_states", make)


def _leaked_cell() -> None:
    def make(visible: Any) -> Any:
        def mutated(self: CellTable, position: int, sequences: int, start: int = 0) -> list[int]:
            seen: list[int] = visible(self, position, sequences, start)
            return [*(self._at[at][-1] for at in range(start, position)), *seen[-1:]]

        return mutated

    _replace(CellTable, "visible", make)


def _forgotten_operations() -> None:
    def make(admit: Any) -> Any:
        def mutated(self: CellTable, run: Run) -> Any:
            forgets = run.kind is RunKind.SPECULATIVE and run.rows > 4
            return admit(self, dataclasses.replace(run, kv_operations=()) if forgets else run)

        return mutated

    _replace(CellTable, "admit", make)


def _noise_by_run() -> None:
    from backends.models.stage_model import StageModel
    from backends.sampling import Sampling

    run_id = 0

    def make_forward(forward: Any) -> Any:
        def mutated(self: StageModel, session: int, run: Run, *rest: Any) -> Any:
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


def _history_of_others() -> None:
    from backends.models.stage_model import Session

    def make(histories: Any) -> Any:
        def mutated(self: Session, run: Run) -> Any:
            last = run.tokens
            return [(*history, *last)[len(last) :] for history in histories(self, run)]

        return mutated

    _replace(Session, "histories", make)


def _rows_in_disorder() -> None:
    from backends.models.stage_model import StageModel

    def make(forward: Any) -> Any:
        def mutated(self: StageModel, session: int, run: Run, *rest: Any) -> Any:
            result = forward(self, session, run, *rest)
            return sorted(result) if isinstance(result, list) else result

        return mutated

    _replace(StageModel, "forward", make)


def _unverified(advance: Any) -> Any:
    def mutated(root: Node, token: int) -> Node:
        return advance(root, root.first_child.token if root.first_child else token)  # type: ignore[no-any-return]

    return mutated


def _stale_cells(release: Any) -> Any:
    def mutated(self: Generation, run: InFlightRun) -> None:
        with mock.patch.object(self, "queue"):
            release(self, run)

    return mutated


STAGE_DEFECTS: dict[str, tuple[str, Callable[[], None]]] = {
    "wrong position": (
        "the last row of a drafted run is computed one position too early",
        _wrong_position,
    ),
    "leaked cell": ("a row sees the newest cell of each position before its own, on whatever branch", _leaked_cell),
    "forgotten operations": ("KV operations before drafted runs of over four rows are skipped", _forgotten_operations),
    "noise by run": ("the sampling noise is a function of the run, too, not of the position alone", _noise_by_run),
    "another's history": (
        "the repetition penalty takes all rows of a run for the last tokens before each",
        _history_of_others,
    ),
    "rows in disorder": ("a run's predictions come home sorted, not row by row", _rows_in_disorder),
}
"""Defects of stages by name: in words, and what brings them about in a stage's process."""

HEAD_DEFECTS: dict[str, tuple[str, Any, str, Make]] = {
    "no verification": ("a drafted token is text, whatever the target says", generation, "advance", _unverified),
    "stale cells": ("a run's cells outlive it in its sequences", Generation, "release_partition", _stale_cells),
}
"""Defects of the head by name: in words, and what is replaced by what."""

DEFECTS = {name: words for name, (words, *_) in (STAGE_DEFECTS | HEAD_DEFECTS).items()}
"""All defects, in words."""


@contextmanager
def defect(name: str | None) -> Iterator[None]:
    """Pipelines that start within have the defect ``name``, if any."""
    if name in STAGE_DEFECTS:
        quiet = mock.patch.dict(os.environ, PIPESIM_LOG="error")  # their complaints are expected
        with quiet, mock.patch("backends.processes.NURSERY", (__name__, name)):
            yield
    elif name in HEAD_DEFECTS:
        _, owner, attribute, make = HEAD_DEFECTS[name]
        with mock.patch.object(owner, attribute, make(getattr(owner, attribute))):
            yield
    else:
        yield


def _replace(owner: Any, name: str, make: Make) -> None:
    setattr(owner, name, make(getattr(owner, name)))


if __name__ == "__main__":
    STAGE_DEFECTS[sys.argv.pop(1)][1]()
    from backends.nursery import main

    main()
