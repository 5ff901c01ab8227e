"""What may happen: everything that the scheduler hears about the world."""

from dataclasses import dataclass

from pipesim.scheduling.tree import DraftTree


@dataclass(frozen=True, slots=True)
class GenerationStarted:
    """A user asks for up to ``max_new_tokens`` tokens after ``prompt``; a token in ``stop_tokens`` ends the text."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RunReturned:
    """The oldest run in flight came home: one predicted token per output row, or ``None`` for a void frame."""

    run_id: int
    predictions: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class DraftReturned:
    """The drafter answered request ``request_id``."""

    request_id: int
    tree: DraftTree


@dataclass(frozen=True, slots=True)
class StageLost:
    """The pipeline broke: whatever is in flight will never return, and nothing can be submitted for now."""

    stage: int
    reason: str


@dataclass(frozen=True, slots=True)
class PipelineRestored:
    """All stages are connected again, with empty KV cells."""


@dataclass(frozen=True, slots=True)
class GenerationAborted:
    """Somebody outside ends the generation before its natural end (Ctrl-C)."""

    reason: str


@dataclass(frozen=True, slots=True)
class StopStringMet:
    """The text has come to a stop string: it ends after its first ``tokens`` generated tokens, whatever followed."""

    tokens: int


Event = (
    GenerationStarted | RunReturned | DraftReturned | StageLost | PipelineRestored | GenerationAborted | StopStringMet
)
