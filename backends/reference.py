"""The oracle of losslessness: plain autoregressive generation by the whole model in this process."""

from collections.abc import Sequence

from backends.models.stage_model import StageModel
from backends.sampling import Sampling
from pipesim.errors import BadInputError
from pipesim.scheduling.runs import Run, RunKind

PREFILL_CHUNK = 64
"""Positions per prefill run; every prompt is cut at multiples of it, in every policy."""


def generate_in_one_process(
    model: StageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    sampling: Sampling | None = None,
) -> list[int]:
    """Up to ``max_new_tokens`` token ids after ``prompt``, the last one a stop token if one was met.

    ``model`` holds all layers. Prompt in chunks of 64 positions, then one canonical row at a time.
    """
    if not (model.is_first and model.is_last):
        raise BadInputError("generate_in_one_process needs a StageModel with all layers of the model")
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
