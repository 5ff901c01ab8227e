"""What the scheduler answers: everything that a driver, simulated or real, has to carry out, in order."""

from dataclasses import dataclass
from enum import StrEnum

from pipesim.scheduling.runs import Run


class Outcome(StrEnum):
    """How a run ended (I1: every submitted run has exactly one)."""

    ACCEPTED = "accepted"
    """At least one of its rows is committed text."""
    REJECTED = "rejected"
    """It came home and none of its rows is text."""
    CANCELLED = "cancelled"
    """The head had called it off before it came home."""
    DRAINED = "drained"
    """It was in flight when the generation ended or the pipeline broke."""


class FinishReason(StrEnum):
    """Why a generation ended."""

    LENGTH = "length"
    STOP = "stop"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class SubmitRun:
    """Send ``run`` into the first stage, behind everything submitted before."""

    run: Run


@dataclass(frozen=True, slots=True)
class RequestDraft:
    """Ask the drafter to continue ``text[:frontier] + path``; an unanswered earlier request is thereby abandoned.

    The driver knows the committed text from the prompt and ``EmitTokens``; ``path`` are the in-flight tokens after it.
    ``max_nodes`` bounds the tree's tokens over all branches and its depth; ``branches`` bounds its leaves.
    ``cutoff`` and ``split`` are the confidence bars for continuing a branch and for forking one.
    """

    request_id: int
    frontier: int
    path: tuple[int, ...]
    max_nodes: int
    branches: int
    cutoff: float
    split: float


@dataclass(frozen=True, slots=True)
class CancelRuns:
    """Tell every stage, beside the ordered stream, that these runs are dead: they pass on as void frames."""

    run_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EmitTokens:
    """Show the user these committed tokens; the first one stands at position ``position``."""

    position: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EndRun:
    """A run is over. ``useful_rows`` of its rows are committed text that no other run had computed."""

    run_id: int
    outcome: Outcome
    useful_rows: int


@dataclass(frozen=True, slots=True)
class FinishGeneration:
    """The user has all tokens. Runs may still be in flight; they come home before ``ReleaseSession``."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class ReleaseSession:
    """Nothing is in flight any more: stages may forget the session's cells. The last command of a generation."""


Command = SubmitRun | RequestDraft | CancelRuns | EmitTokens | EndRun | FinishGeneration | ReleaseSession
