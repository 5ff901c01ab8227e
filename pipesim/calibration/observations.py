"""What is measured on a running pipeline. ``round``: measurements are repeated in rounds that interleave all of them,
so that a slower minute of a machine hits all alike; rounds are what confidence intervals resample."""

from dataclasses import dataclass

from pipesim.scheduling.runs import RunKind


@dataclass(frozen=True, slots=True)
class RunSample:
    """A run that had the pipeline for itself.

    Attributes:
        context: cells to which its rows attend on average, their own included.
        void: it was dead from the beginning.
        stages_s: what it took at each stage.
        hops: for each data link, head to first stage first, the bytes that it took there and the seconds from the end
            of computation, or of submission, before it to the start of computation, or to the return, behind it.
    """

    round: int
    kind: RunKind
    rows: int
    context: float
    void: bool
    stages_s: tuple[float, ...]
    hops: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class FloodSample:
    """``runs`` equal runs of ``rows`` rows, submitted at once: seconds until the last of them was home."""

    round: int
    rows: int
    context: float
    runs: int
    seconds: float


@dataclass(frozen=True, slots=True)
class HeadSample:
    """The head's processor time for one event of a generation; ``drafted``: a draft came home.

    Time in which others had the processor does not count: where stages share it, simulations add that themselves.
    """

    drafted: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class DraftSample:
    """A draft of ``levels`` tokens in a chain after ``context`` tokens.

    ``prefilled``: tokens that the drafter had not seen before; ``way_s``: there and back, without the drafting.
    """

    round: int
    levels: int
    context: int
    prefilled: int
    seconds: float
    way_s: float


@dataclass(frozen=True, slots=True)
class Observations:
    """All that was measured. ``head`` and ``drafts`` are empty where there was no generation, no drafter."""

    runs: tuple[RunSample, ...]
    floods: tuple[FloodSample, ...] = ()
    head: tuple[HeadSample, ...] = ()
    drafts: tuple[DraftSample, ...] = ()
