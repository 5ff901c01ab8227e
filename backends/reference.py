"""The oracle of losslessness: plain autoregressive generation by the whole model in this process."""

from collections.abc import Sequence

import torch

from backends.compression import to_activation, to_hidden
from backends.frames import Compression
from backends.models.stage_model import StageModel
from backends.sampling import Sampling
from pipesim.errors import BadInputError
from pipesim.scheduling.runs import Run, RunKind

PREFILL_CHUNK = 64
"""Positions per prefill run; every prompt is cut at multiples of it, in every policy."""


class SplitModel:
    """The ``stages`` of a model in a row in this process, to be used as one; activations travel compressed.

    Only lossy ``compression`` makes that another model than the whole one.
    """

    def __init__(self, stages: Sequence[StageModel], compression: Compression = "none") -> None:
        self.stages, self._compression = stages, compression
        self.is_first, self.is_last = stages[0].is_first, stages[-1].is_last

    def open_session(self, session: int, kv_cells: int, sequences: int, sampling: Sampling) -> None:
        """As ``StageModel``."""
        for stage in self.stages:
            stage.open_session(session, kv_cells, sequences, sampling)

    def close_session(self, session: int) -> None:
        """As ``StageModel``."""
        for stage in self.stages:
            stage.close_session(session)

    def admit(self, session: int, run: Run) -> list[int]:
        """As ``StageModel``: all tables give the same cells."""
        *_, cells = (stage.admit(session, run) for stage in self.stages)
        return cells

    def forward(
        self, session: int, run: Run, hidden: torch.Tensor | None, cells: Sequence[int]
    ) -> torch.Tensor | list[int] | None:
        """As ``StageModel``."""
        for stage in self.stages[:-1]:
            states = stage.forward(session, run, hidden, cells)
            assert isinstance(states, torch.Tensor)
            hidden = to_hidden(to_activation(states, self._compression))
        return self.stages[-1].forward(session, run, hidden, cells)


def generate_in_one_process(
    model: StageModel | SplitModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    sampling: Sampling | None = None,
) -> list[int]:
    """Up to ``max_new_tokens`` token ids after ``prompt``, the last one a stop token if one was met.

    ``model`` holds all layers. Prompt in chunks of 64 positions, then one canonical row at a time.
    """
    if not (model.is_first and model.is_last):
        raise BadInputError("generate_in_one_process needs all layers of the model")
    if not prompt:
        raise BadInputError("prompt: at least one token is needed")
    session, sequences = -1, 1
    model.open_session(session, len(prompt) + max_new_tokens, sequences, sampling or Sampling())
    try:
        text = list(prompt)
        while len(text) < len(prompt) + max_new_tokens and not (len(text) > len(prompt) and text[-1] in stop_tokens):
            for run in _prefill(prompt) if len(text) == len(prompt) else [_canonical(text)]:
                predicted = model.forward(session, run, None, model.admit(session, run))
                assert isinstance(predicted, list)
                text += predicted
        return text[len(prompt) :]
    finally:
        model.close_session(session)


def _prefill(prompt: Sequence[int]) -> list[Run]:
    """The prompt's chunks; only the prompt's last row is predicted."""
    runs = []
    for start in range(0, len(prompt), PREFILL_CHUNK):
        tokens = tuple(prompt[start : start + PREFILL_CHUNK])
        positions = tuple(range(start, start + len(tokens)))
        unread = len(tokens) - (start + len(tokens) == len(prompt))
        runs.append(Run(start, 0, RunKind.PREFILL, tokens, positions, (1,) * len(tokens), unread))
    return runs


def _canonical(text: Sequence[int]) -> Run:
    return Run(len(text), 0, RunKind.CANONICAL, (text[-1],), (len(text) - 1,), (1,))
