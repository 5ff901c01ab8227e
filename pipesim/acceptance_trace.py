"""The file that carries a real model pair's acceptance into simulations; docs/acceptance.md describes it."""

import json
from pathlib import Path
from typing import Annotated, Final, Literal, Self, TextIO

from pydantic import Field, ValidationError, model_validator

from pipesim.errors import BadInputError
from pipesim.scenario import Section

FORMAT: Final = "pipesim-acceptance-1"
"""Names this file format and its version."""

_Token = Annotated[int, Field(ge=0)]
_Ranked = tuple[tuple[_Token, Annotated[float, Field(ge=0, le=1)]], ...]


class RecordedSampling(Section):
    """How the recorded target picked its tokens."""

    temperature: float
    """0: the most probable token."""
    top_k: int
    """0: all tokens."""
    top_p: float
    """1: all tokens."""
    seed: int
    """Of the sampling noise, and of what a planted drafter gets wrong."""
    min_p: float = 0.0
    """0: all tokens."""
    repetition_penalty: float = 1.0
    """1: none."""


class AcceptanceTrace(Section):
    """A text of the target model, and what its drafter proposed all along it.

    ``model``, ``drafter`` and ``sampling`` tell where it comes from; simulations do not read them.
    """

    format: Literal["pipesim-acceptance-1"]
    model: str | None = None
    """The target model."""
    drafter: str | None = None
    """ngram, layer-skip, planted, or the draft model."""
    sampling: RecordedSampling | None = None
    prompt_tokens: tuple[_Token, ...] = Field(min_length=1)
    """The prompt's token ids."""
    tokens: tuple[_Token, ...]
    """The target's token ids after the prompt."""
    stop_tokens: tuple[_Token, ...] = ()
    """Token ids that end a text; none where it ran to a given length."""
    stop_string: bool = False
    """Whether a string ended this text, with its last token."""
    candidates: tuple[_Ranked, ...]
    """Per entry of ``tokens`` the drafter's ``[token, confidence]``, best first, given all recorded tokens before."""
    detours: tuple[tuple[Annotated[int, Field(ge=1)], _Token, _Ranked], ...] | None = None
    """How the drafter goes on after a wrong proposal of its own: ``[position, token before it, candidates]``, positions
    counted from the prompt's first token; after anything else it proposes nothing. Left out: it goes on as it did at
    that position of the text."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.candidates) != len(self.tokens):
            raise ValueError(
                f"{len(self.candidates)} lists of candidates for {len(self.tokens)} tokens: each needs one"
            )
        for ranked in (*self.candidates, *(ranked for _, _, ranked in self.detours or ())):
            if len({token for token, _ in ranked}) < len(ranked):
                raise ValueError(f"candidates {[list(one) for one in ranked]} name a token twice")
        return self


def read_acceptance_trace(path: Path) -> AcceptanceTrace:
    """Reads a file that :func:`write_acceptance_trace` wrote, or another of the same format.

    Raises:
        BadInputError: it cannot be read or is malformed; names the file, the field and the value.
    """
    try:
        return parse_acceptance_trace(path.read_bytes(), f"acceptance.file: {path}")
    except OSError as problem:
        raise BadInputError(f"acceptance.file: {path} cannot be read ({problem})") from None


def parse_acceptance_trace(text: bytes | str, source: str) -> AcceptanceTrace:
    """What such a file holds; ``source`` names it in messages. Raises BadInputError."""
    try:
        return AcceptanceTrace.model_validate_json(text)
    except ValidationError as invalid:
        error = invalid.errors()[0]
        where = [source, *([".".join(map(str, error["loc"]))] if error["loc"] else [])]
        told = f" = {error['input']!r}" if isinstance(error["input"], str | int | float) else ""
        raise BadInputError(f"{': '.join(where)}{told}: {error['msg']}") from None


def write_acceptance_trace(trace: AcceptanceTrace, stream: TextIO) -> None:
    """Writes JSON, each key on a line of its own. Raises OSError."""
    stream.write(format_acceptance_trace(trace))


def format_acceptance_trace(trace: AcceptanceTrace) -> str:
    """The file's content."""
    fields = trace.model_dump(mode="json", exclude_none=True)
    lines = (f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in fields.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"
