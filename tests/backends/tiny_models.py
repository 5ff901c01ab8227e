"""Random models as sources, and a pipeline of stages chained in this process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from backends.models.loading import ModelSource, open_model
from backends.models.random_models import FAMILY_CONFIGS, save_gguf, save_tiny, tiny_config
from backends.models.stage_model import StageModel
from backends.sampling import Sampling
from pipesim.scheduling.runs import Run, RunKind

__all__ = [
    "FAMILY_CONFIGS",
    "Chain",
    "prefill_runs",
    "save_gguf",
    "save_tiny",
    "tiny_config",
    "tiny_source",
]


def tiny_source(folder: Path, **changes: Any) -> ModelSource:
    return open_model(save_tiny(folder, **changes))


def prefill_runs(tokens: Sequence[int], everyone: int, first_output: int | None = None) -> list[Run]:
    """The prompt in chunks of 64 positions; by default only its last row is predicted."""
    runs = []
    for start in range(0, len(tokens), 64):
        chunk = tuple(tokens[start : start + 64])
        positions = tuple(range(start, start + len(chunk)))
        unread = len(chunk) - (positions[-1] == len(tokens) - 1) if first_output is None else first_output
        runs.append(Run(start, 0, RunKind.PREFILL, chunk, positions, (everyone,) * len(chunk), unread))
    return runs


class Chain:
    """Stages in a row, as a pipeline without wires; opens one session on all of them."""

    def __init__(self, stages: Sequence[StageModel], cells: int, sequences: int = 4, session: int = 0) -> None:
        self.stages, self.session = stages, session
        for stage in stages:
            stage.open_session(session, cells, sequences, Sampling())

    def close(self) -> None:
        for stage in self.stages:
            stage.close_session(self.session)

    def skip(self, run: Run) -> None:
        """A void frame: every stage keeps its table in step, none computes."""
        for stage in self.stages:
            stage.admit(self.session, run)

    def logits(self, run: Run) -> torch.Tensor:
        hidden: torch.Tensor | None = None
        for stage in self.stages[:-1]:
            result = stage.forward(self.session, run, hidden, stage.admit(self.session, run))
            assert isinstance(result, torch.Tensor)
            hidden = result
        last = self.stages[-1]
        logits = last.logits(self.session, run, hidden, last.admit(self.session, run))
        assert logits is not None
        return logits
