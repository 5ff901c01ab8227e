"""One generation in figures: what is told of it, whether or not anybody keeps its trace."""

from dataclasses import dataclass

from pipesim.metrics import Metrics, compute_metrics
from pipesim.pace import Pace, judge
from pipesim.scheduling.commands import FinishReason
from pipesim.trace import COMPLETE, Trace


@dataclass(frozen=True, slots=True)
class Summary:
    """Its text and figures. ``pace`` is that of an emulated cluster, else ``None``."""

    policy: str
    seed: int
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    metrics: Metrics
    pace: Pace | None

    @property
    def complete(self) -> bool:
        """Whether all tokens were produced: the length asked for, or a natural end of text."""
        return self.finish_reason in COMPLETE


def summarise(trace: Trace) -> Summary:
    """What a trace says in figures; an unfinished one is taken up to its last emission."""
    metrics, pace = compute_metrics(trace), judge(trace.pace)
    return Summary(trace.policy, trace.seed, trace.tokens, trace.finish_reason, metrics, pace)
