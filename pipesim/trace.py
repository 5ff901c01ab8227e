"""What both worlds record of one generation. All times are seconds since the prompt was submitted."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pipesim.scheduling.commands import FinishReason, Outcome
from pipesim.scheduling.runs import RunKind

COMPLETE = (FinishReason.LENGTH, FinishReason.STOP)
"""How a generation ends whose tokens were all produced."""


@dataclass(frozen=True, slots=True)
class StageSpan:
    """The time that one run cost one stage. ``void``: the run was dead when it left, its output worthless.

    A run that died before its turn came leaves no span.
    """

    stage: int
    run_id: int
    start_s: float
    end_s: float
    void: bool


@dataclass(frozen=True, slots=True)
class DraftSpan:
    """The drafter at work on one request. An abandoned request leaves a span with no tokens."""

    request_id: int
    start_s: float
    end_s: float
    tokens: int


class Fate(StrEnum):
    """What became of a run, as pictures tell it."""

    PREFILL = "prefill"
    CANONICAL = "canonical"
    ACCEPTED = "accepted"
    """Speculative, and part of it is text."""
    REDUNDANT = "redundant"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    DRAINED = "drained"
    """In flight when the generation ended or broke, or never seen again."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The life of one run as the head saw it.

    ``returned_s`` is ``None`` if it never came home; ``lost_s`` is then when the head gave it up, because a stage was
    lost, and ``outcome`` is ``None`` if it did not even come to that. ``useful_rows`` of its rows are committed text
    that no other run had computed.
    """

    run_id: int
    kind: RunKind
    rows: int
    submitted_s: float
    returned_s: float | None
    outcome: Outcome | None
    useful_rows: int
    lost_s: float | None = None

    @property
    def redundant(self) -> bool:
        """Its rows agree with the text, but faster runs had already delivered all of them.

        Never a prefill run: one that repeats known text, because a stage was lost, fills empty cells.
        """
        return self.outcome is Outcome.ACCEPTED and not self.useful_rows and self.kind is not RunKind.PREFILL

    @property
    def fate(self) -> Fate:
        """What became of it."""
        if self.outcome is not Outcome.ACCEPTED:
            return Fate.DRAINED if self.outcome is None else Fate(self.outcome)
        if self.redundant:
            return Fate.REDUNDANT
        return Fate.ACCEPTED if self.kind is RunKind.SPECULATIVE else Fate(self.kind)


@dataclass(frozen=True, slots=True)
class Latency:
    """How the time until a token was there was spent, in whole nanoseconds: since the token before, or the prompt.

    ``queueing``: waiting for a link, a stage, a core, the head, or the end of a partition or of a crash, the work that
    this destroyed included. ``compute``: in stages. ``serialisation``: a link was busy with the message itself.
    ``propagation``: the message was on its way, jitter, repetitions after losses, waiting for late messages before it
    and for the interface at the other end included. ``head``: the head handled events. ``drafter``: the head had
    nothing to submit before a draft came, its way there and back included.
    """

    queueing: int
    compute: int
    serialisation: int
    propagation: int
    head: int
    drafter: int


@dataclass(frozen=True, slots=True)
class Emission:
    """Tokens shown to the user at once; the first stands at position ``position``.

    ``latency`` sums up to the time since the emission before, or since the prompt; ``None`` in real runs, whose frames
    do not tell. Only the first of several tokens had to be waited for.
    """

    time_s: float
    position: int
    tokens: tuple[int, ...]
    latency: Latency | None = None


@dataclass(frozen=True, slots=True)
class PaceSample:
    """How well an emulated cluster kept one of its times.

    ``part``: stage, link, drafter or head. Asked for at ``since_s``, it was due at ``due_s``, and really happened at
    ``done_s``; a link's message that really came earlier was held until then. ``overrun``: the real computation took
    longer than the modelled one. Of a control link only ``done_s - due_s`` is known, or 0.
    """

    part: str
    since_s: float
    due_s: float
    done_s: float
    overrun: bool


@dataclass(frozen=True, slots=True)
class Trace:
    """Everything that metrics, plots and exports are derived from.

    ``finished_s``: the user has all tokens; ``drained_s``: nothing is in flight any more; ``None`` if it never
    came to that. ``link_bytes`` is keyed by link name. ``finish_reason`` is ``None`` for an unfinished generation.
    ``pace`` says of a real run on an emulated cluster how well that was emulated: see ``pipesim.pace``.
    """

    policy: str
    seed: int
    stages: tuple[str, ...]
    prompt_tokens: int
    finish_reason: FinishReason | None
    finished_s: float | None
    drained_s: float | None
    link_bytes: Mapping[str, int]
    drafted_verified: int
    drafted_accepted: int
    spans: tuple[StageSpan, ...]
    drafts: tuple[DraftSpan, ...]
    runs: tuple[RunRecord, ...]
    emissions: tuple[Emission, ...]
    pace: tuple[PaceSample, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """The generated text, prompt excluded."""
        return tuple(token for emission in self.emissions for token in emission.tokens)

    @property
    def complete(self) -> bool:
        """Whether all tokens were produced: the length asked for, or a natural end of text."""
        return self.finish_reason in COMPLETE
