"""Which drafted tokens are right: the schema of acceptance models. Formulas and limits: docs/acceptance.md."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from pipesim.scenario.section import Section

if TYPE_CHECKING:
    from pipesim.acceptance_trace import AcceptanceTrace

Probability = Annotated[float, Field(ge=0, le=1)]


class DrawnAcceptance(Section):
    """What the models that draw from the seed share: a kind decides only how likely the first candidate is right.

    The drafter offers two candidates for each position. Its confidence in the first is uniform around a mean that
    is higher where the candidate is right: that is all a cutoff can go by.
    """

    runner_up: Probability = 0.5
    """Where the first candidate is wrong: probability that the second one is right."""
    confidence_right: Probability = 0.8
    """Mean confidence in a first candidate that is right."""
    confidence_wrong: Probability = 0.5
    """Mean confidence in a first candidate that is wrong."""
    confidence_spread: Probability = 0.2
    """Confidence lies at most this far from its mean, within 0 and 1."""


class IidAcceptance(DrawnAcceptance):
    """Every drafted token is right with the same probability, independently of all others."""

    kind: Literal["iid"]
    rate: Probability
    """Probability that the first candidate is what the target says."""


class PerDepthAcceptance(DrawnAcceptance):
    """The further a token is drafted ahead of the committed text, the less (or more) likely it is right.

    A position has one uniform number, whatever depth it is drafted at: a token that is right at one depth is right
    at every depth with a higher rate.
    """

    kind: Literal["per_depth"]
    rates: tuple[Probability, ...] = Field(strict=False, min_length=1)
    """Probability that the first candidate is right, given that all before it are: the first token after the last
    committed one, the second, and so on; the last rate repeats."""


class MarkovAcceptance(DrawnAcceptance):
    """Hits and misses come in bursts: a two-state Markov chain along the text, good and bad stretches in turns.

    A stretch's length is geometric. In the long run a position is good with probability
    good_tokens / (good_tokens + bad_tokens).
    """

    kind: Literal["markov"]
    good_rate: Probability
    """Probability that the first candidate is right in a good stretch."""
    bad_rate: Probability
    """Probability that the first candidate is right in a bad stretch."""
    good_tokens: float = Field(default=20.0, ge=1)
    """Mean length of a good stretch."""
    bad_tokens: float = Field(default=10.0, ge=1)
    """Mean length of a bad stretch."""

    @property
    def good_share(self) -> float:
        """Stationary probability that a position is good."""
        return self.good_tokens / (self.good_tokens + self.bad_tokens)

    @property
    def rate(self) -> float:
        """Stationary probability that a position's first candidate is right."""
        return self.good_share * self.good_rate + (1.0 - self.good_share) * self.bad_rate

    @model_validator(mode="after")
    def _bursts_not_shorter_than_by_chance(self) -> Self:
        if 1 / self.good_tokens + 1 / self.bad_tokens > 1:
            raise ValueError(
                f"stretches of good_tokens = {self.good_tokens} and bad_tokens = {self.bad_tokens} would be "
                "shorter than by chance: 1 / good_tokens + 1 / bad_tokens must not exceed 1, make them longer"
            )
        return self


PositionalAcceptance = Annotated[IidAcceptance | MarkovAcceptance, Field(discriminator="kind")]
"""Whether a token is right does not depend on how far ahead it is drafted: what a planted drafter can replay."""


class TraceAcceptance(Section):
    """Replays the text of a real model pair, with the drafter's candidates for every position."""

    kind: Literal["trace"]
    file: Path | None = Field(default=None, strict=False)
    """What execute --record-acceptance wrote (JSON, see docs/acceptance.md). Relative to the scenario file."""
    recording: str | None = None
    """What such a file holds, in its place: `pipesim calibrate` writes a single file."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.file is None) == (self.recording is None):
            raise ValueError("file: give either file or recording")
        return self

    @cached_property
    def recorded(self) -> "AcceptanceTrace":
        """What the file holds. Raises BadInputError."""
        from pipesim.acceptance_trace import parse_acceptance_trace, read_acceptance_trace  # they need sections

        if self.file is not None:
            return read_acceptance_trace(self.file)
        return parse_acceptance_trace(self.recording or "", "acceptance.recording")


Acceptance = Annotated[
    IidAcceptance | PerDepthAcceptance | MarkovAcceptance | TraceAcceptance, Field(discriminator="kind")
]
