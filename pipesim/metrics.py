"""Figures derived from a trace, defined alike for simulated and real generations.

Let a generation emit ``n`` tokens; ``first`` and ``last`` are the times at which the user got the first and the last
one. A figure that does not exist (the speed of a single token, the acceptance rate without drafts) is ``None``.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pipesim.scheduling.commands import Outcome
from pipesim.scheduling.runs import RunKind
from pipesim.trace import RunRecord, Trace


@dataclasses.dataclass(frozen=True, slots=True)
class Distribution:
    """Mean and percentiles (linear interpolation between the closest ranks) in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclasses.dataclass(frozen=True, slots=True)
class RunCounts:
    """How many runs were submitted, and how they ended.

    The four sum up to ``submitted`` (I1) once all runs are home; an unfinished trace has runs without an end.
    """

    submitted: int
    accepted: int
    rejected: int
    cancelled: int
    drained: int


@dataclasses.dataclass(frozen=True, slots=True)
class WastedCompute:
    """Shares of all stage time, prefill and draining included, that brought no text, by cause. Prefill is no waste.

    ``rejected_runs``: runs that came home without a row of text. ``rejected_rows``: of accepted runs, the rows that
    are not text, each charged an equal part of its run's time. ``redundant_runs``: runs whose tokens a faster run had
    already brought. ``cancelled``: what was computed of runs that were called off. ``drained``: of runs in flight
    at the end of the generation.
    """

    rejected_runs: float
    rejected_rows: float
    redundant_runs: float
    cancelled: float
    drained: float

    @property
    def total(self) -> float:
        """All causes together."""
        return self.rejected_runs + self.rejected_rows + self.redundant_runs + self.cancelled + self.drained


@dataclasses.dataclass(frozen=True, slots=True)
class Metrics:
    """The figures of one generation.

    Attributes:
        tokens_per_second: speed of decoding, ``(n - 1) / (last - first)``.
        ttft_s: prompt submitted to first token at the user, prefill included.
        itl_s: gaps between consecutive tokens at the user; tokens that are emitted together have a gap of 0.
        e2e_s: prompt submitted to last token at the user.
        acceptance_rate: drafted tokens that became text / drafted tokens verified.
        stage_utilization: per stage, its busy share of the time until the user has all tokens.
        bubble_fraction: share of all stages' time until then in which a stage stood idle.
        runs: how the runs ended.
        wasted_compute_fraction: share of all stage time that brought no text, by cause.
        link_bytes: bytes sent over all links, control and draft links included.
        draft_tokens: tokens in the drafter's answers, used or not.
    """

    tokens_per_second: float | None
    ttft_s: float | None
    itl_s: Distribution | None
    e2e_s: float | None
    acceptance_rate: float | None
    stage_utilization: tuple[float, ...]
    bubble_fraction: float | None
    runs: RunCounts
    wasted_compute_fraction: WastedCompute | None
    link_bytes: int
    draft_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, under the names above."""
        return dataclasses.asdict(self)


def compute_metrics(trace: Trace) -> Metrics:
    """Derives all figures from a trace; an unfinished one is taken up to its last emission."""
    times = [emission.time_s for emission in trace.emissions for _ in emission.tokens]
    end = trace.finished_s if trace.finished_s is not None else (times[-1] if times else None)
    utilization = _utilization(trace, end) if end else ()
    elapsed = times[-1] - times[0] if times else 0.0
    return Metrics(
        tokens_per_second=(len(times) - 1) / elapsed if elapsed > 0 else None,
        ttft_s=times[0] if times else None,
        itl_s=_distribution([after - before for before, after in pairwise(times)]),
        e2e_s=times[-1] if times else None,
        acceptance_rate=trace.drafted_accepted / trace.drafted_verified if trace.drafted_verified else None,
        stage_utilization=utilization,
        bubble_fraction=1.0 - sum(utilization) / len(utilization) if utilization else None,
        runs=_run_counts(trace),
        wasted_compute_fraction=_wasted_compute(trace),
        link_bytes=sum(trace.link_bytes.values()),
        draft_tokens=sum(draft.tokens for draft in trace.drafts),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """A percentile of a non-empty ascending sequence, by linear interpolation between the closest ranks."""
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def _distribution(values: list[float]) -> Distribution | None:
    if not values:
        return None
    ordered = sorted(values)
    p50, p95, p99 = (percentile(ordered, percent) for percent in (50, 95, 99))
    return Distribution(math.fsum(ordered) / len(ordered), p50, p95, p99)


def _utilization(trace: Trace, end: float) -> tuple[float, ...]:
    busy = [0.0] * len(trace.stages)
    for span in trace.spans:
        busy[span.stage] += max(0.0, min(span.end_s, end) - span.start_s)
    return tuple(seconds / end for seconds in busy)


def _run_counts(trace: Trace) -> RunCounts:
    outcomes = Counter(run.outcome for run in trace.runs)
    return RunCounts(len(trace.runs), *(outcomes[outcome] for outcome in Outcome))


def _wasted_compute(trace: Trace) -> WastedCompute | None:
    seconds: defaultdict[int, float] = defaultdict(float)
    for span in trace.spans:
        seconds[span.run_id] += span.end_s - span.start_s
    total = math.fsum(seconds.values())
    if not total:
        return None
    wasted: dict[str, float] = dict.fromkeys((field.name for field in dataclasses.fields(WastedCompute)), 0.0)
    for run in trace.runs:
        cause, share = _waste(run)
        wasted[cause] += share * seconds[run.run_id] / total
    return WastedCompute(**wasted)


def _waste(run: RunRecord) -> tuple[str, float]:
    """Under which cause a run's time is booked as wasted, and which share of it."""
    match run.outcome:
        case Outcome.REJECTED:
            return "rejected_runs", 1.0
        case Outcome.CANCELLED | Outcome.DRAINED:
            return run.outcome.value, 1.0
    if run.redundant:
        return "redundant_runs", 1.0
    no_waste = run.outcome is None or run.kind is RunKind.PREFILL  # not known yet, or all rows are text
    return "rejected_rows", 0.0 if no_waste else 1.0 - run.useful_rows / run.rows
