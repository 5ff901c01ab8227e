"""Which drafted tokens are right: the schema of acceptance models."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipesim.scenario.section import Section


class IidAcceptance(Section):
    """Every drafted token is right with the same probability, independently of all others.

    The drafter offers two candidates for each position. Its confidence in the first is uniform around a mean that
    is higher where the candidate is right: that is all a cutoff can go by.
    """

    kind: Literal["iid"]
    rate: float = Field(ge=0, le=1)
    """Probability that the first candidate is what the target says."""
    runner_up: float = Field(default=0.5, ge=0, le=1)
    """Where the first candidate is wrong: probability that the second one is right."""
    confidence_right: float = Field(default=0.8, ge=0, le=1)
    """Mean confidence in a first candidate that is right."""
    confidence_wrong: float = Field(default=0.5, ge=0, le=1)
    """Mean confidence in a first candidate that is wrong."""
    confidence_spread: float = Field(default=0.2, ge=0, le=1)
    """Confidence lies at most this far from its mean, within 0 and 1."""


class TraceAcceptance(Section):
    """Replays the text of a real model pair, with the drafter's candidates for every position."""

    kind: Literal["trace"]
    file: Path = Field(strict=False)
    """JSON: {"prompt_tokens": [..], "tokens": [..], "candidates": [[[token, confidence], ..], ..]}; candidates[i] are
    the drafter's for tokens[i], best first. Relative to the scenario file."""


Acceptance = Annotated[IidAcceptance | TraceAcceptance, Field(discriminator="kind")]
