"""What computes a stage's layers: the seam between a stage's book-keeping and the machine's arithmetic.

One engine serves one stage. Stages whose engines have the same ``arithmetic`` compute bit for bit alike; a row's result
depends on the row and on what it sees alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from backends.models.config import ModelConfig
from pipesim.errors import BadInputError
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import Run

Cache = TypeVar("Cache")
"""Keys and values of one session, as the engine wants them."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a model of ``config`` a stage has: layers ``kept``, on its ends the embedding and the LM head."""

    config: ModelConfig
    kept: tuple[int, ...]
    is_first: bool
    is_last: bool

    @staticmethod
    def of(config: ModelConfig, first: int, last: int, skipped: Sequence[int], path: object) -> "Part":
        """Layers ``[first, last)`` without ``skipped``.

        Raises:
            BadInputError: the model, at ``path``, has no such layers.
        """
        if not 0 <= first < last <= config.layers:
            raise BadInputError(f"stage layers [{first}, {last}) do not exist: {path} has layers [0, {config.layers})")
        kept = tuple(index for index in range(first, last) if index not in skipped)
        if len(kept) + len(set(skipped)) != last - first or not kept:
            raise BadInputError(
                f"skipped layers {sorted(skipped)} must lie within [{first}, {last}) and leave one layer"
            )
        return Part(config, kept, first == 0, last == config.layers)


class Engine(Protocol, Generic[Cache]):
    """Computes the layers of one stage. Tensors that it returns lie on the stage's device."""

    @property
    def arithmetic(self) -> str:
        """Which arithmetic this is, for people; equal texts mean equal bits."""

    @property
    def parameters(self) -> int:
        """Weights kept; a tied embedding counts once, though its LM head may be a copy."""

    @property
    def hidden_dtype(self) -> torch.dtype:
        """The type of hidden states between stages, in which they are exact."""

    def open_cache(self, cells: int) -> Cache:
        """Keys and values of ``cells`` cells, whose positions stay under ``cells``."""

    def close_cache(self, cache: Cache) -> None:
        """The session of ``cache`` is over: what it holds may serve another."""

    def hidden_states(
        self,
        run: Run,
        hidden: torch.Tensor | None,
        cells: Sequence[int],
        table: CellTable,
        cache: Cache,
        should_stop: Callable[[], bool],
    ) -> torch.Tensor | None:
        """Sends ``run`` through all layers: ``[rows, hidden]``; None as soon as ``should_stop()``, asked before each.

        ``table`` has admitted the run last and given it ``cells``. ``hidden``, ``[rows, hidden]``, is what the previous
        stage returned, None on the first stage: it looks the run's tokens up instead.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and LM head, last stage only: float32 ``[rows, vocabulary]`` of one row or more."""
