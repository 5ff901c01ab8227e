"""Figures derived from a trace, defined alike for simulated and real generations.

Let a generation emit ``n`` tokens; ``first`` and ``last`` are the times at which the user got the first and the last
one. A figure that does not exist (the speed of a single token, the acceptance rate without drafts) is ``None``.
"""

import dataclasses
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipesim.scheduling.commands import Outcome
from pipesim.scheduling.runs import RunKind
from pipesim.trace import Latency, Trace


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
class LatencyShares:
    """A time in seconds by component, see ``trace.Latency``; the sum of all is the time."""

    queueing: float
    compute: float
    serialisation: float
    propagation: float
    head: float
    drafter: float


@dataclasses.dataclass(frozen=True, slots=True)
class LatencyBreakdown:
    """What users waited for: until the first token, and on the mean of all later ones until the next.

    The sums are ``ttft_s`` and ``itl_s.mean``.
    """

    ttft: LatencyShares
    itl: LatencyShares | None


@dataclasses.dataclass(frozen=True, slots=True)
class Metrics:
    """The figures of one generation.

    Attributes:
        tokens_per_second: speed of decoding, ``(n - 1) / (last - first)``.
        ttft_s: prompt submitted to first token at the user, prefill included.
        itl_s: gaps between consecutive tokens at the user; tokens that are emitted together have a gap of 0.
        e2e_s: prompt submitted to last token at the user.
        latency_breakdown_s: what the times until tokens were spent on; ``None`` for real runs.
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
    latency_breakdown_s: LatencyBreakdown | None
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
    tally = Tally(len(trace.stages))
    for emission in trace.emissions:
        tally.emitted(_ns(emission.time_s), len(emission.tokens))
        if emission.latency is not None:
            tally.latency(emission.latency)
    tally.end = tally.last if trace.finished_s is None else _ns(trace.finished_s)
    for run in trace.runs:
        tally.submitted(run.run_id, run.kind, run.rows)
    for span in trace.spans:
        tally.span(span.stage, span.run_id, _ns(span.start_s), _ns(span.end_s))
    for run in trace.runs:
        if run.outcome is not None:
            tally.ended(run.run_id, run.outcome, run.useful_rows)
    tally.draft_tokens = sum(draft.tokens for draft in trace.drafts)
    return tally.metrics(trace.drafted_verified, trace.drafted_accepted, sum(trace.link_bytes.values()))


class Tally:
    """Sums up one generation, as it happens or from its trace. All times are whole nanoseconds since the prompt.

    Whole numbers make the sums independent of their order. What grows with the text is one number per token, for exact
    percentiles of the gaps; what grows with a run is forgotten when it ends.

    Attributes:
        end: when the user had all tokens, ``None`` until then: work beyond it counts as no utilization.
        last: when the user got the newest token.
        draft_tokens: tokens in the drafter's answers.
    """

    def __init__(self, stages: int) -> None:
        self.end: float | None = None
        self.last: float | None = None
        self.draft_tokens = 0
        self._first: float | None = None
        self._gaps = array("d")
        self._busy: list[float] = [0] * stages
        self._compute: float = 0
        self._open: dict[int, _OpenRun] = {}
        self._submitted = 0
        self._outcomes: Counter[Outcome] = Counter()
        self._wasted = dict.fromkeys((field.name for field in dataclasses.fields(WastedCompute)), 0.0)
        self._latency: list[list[int]] = []  # of the first token, and the sum over all others

    def submitted(self, run_id: int, kind: RunKind, rows: int) -> None:
        """A run left the head."""
        self._submitted += 1
        self._open[run_id] = _OpenRun(kind, rows)

    def span(self, stage: int, run_id: int, start: float, end: float) -> None:
        """A run cost a stage time."""
        self._compute += end - start
        if (run := self._open.get(run_id)) is not None:
            run.compute += end - start
        else:  # it was drained before: all others end when they are home
            self._wasted["drained"] += end - start
        self._busy[stage] += end - start if self.end is None else max(0, min(end, self.end) - start)

    def ended(self, run_id: int, outcome: Outcome, useful_rows: int) -> None:
        """A run's outcome is known."""
        run = self._open.pop(run_id)
        self._outcomes[outcome] += 1
        if outcome is not Outcome.ACCEPTED:
            self._wasted[_CAUSES[outcome]] += run.compute
        elif run.kind is not RunKind.PREFILL:
            cause = "rejected_rows" if useful_rows else "redundant_runs"
            self._wasted[cause] += run.compute * (run.rows - useful_rows) / run.rows

    def emitted(self, now: float, tokens: int) -> None:
        """The user got tokens, all at once."""
        if self.last is None:
            self._first = now
        else:
            self._gaps.append(now - self.last)
        self._gaps.extend([0.0] * (tokens - 1))
        self.last = now

    def cut(self, tokens: int) -> None:
        """The text ends after so many tokens, 1 or more: what the user got beyond is none of it."""
        assert self._first is not None
        del self._gaps[tokens - 1 :]
        self.last = self._first + sum(self._gaps)

    def latency(self, latency: Latency) -> None:
        """How the time until the newest emission was spent: for each of them or none."""
        parts = [getattr(latency, name) for name in _PARTS]
        if not self._latency:
            self._latency = [parts, [0] * len(parts)]
        else:
            self._latency[1] = [total + part for total, part in zip(self._latency[1], parts, strict=True)]

    def metrics(self, drafted_verified: int, drafted_accepted: int, link_bytes: int) -> Metrics:
        """The figures so far."""
        first, last, gaps = self._first, self.last, self._gaps
        elapsed = 0 if first is None or last is None else last - first
        utilization = tuple(busy / self.end for busy in self._busy) if self.end else ()
        return Metrics(
            tokens_per_second=len(gaps) / (elapsed / 1e9) if elapsed > 0 else None,
            ttft_s=None if first is None else first / 1e9,
            itl_s=_distribution(gaps),
            e2e_s=None if last is None else last / 1e9,
            latency_breakdown_s=self._latency_breakdown(),
            acceptance_rate=drafted_accepted / drafted_verified if drafted_verified else None,
            stage_utilization=utilization,
            bubble_fraction=1.0 - sum(utilization) / len(utilization) if utilization else None,
            runs=RunCounts(self._submitted, *(self._outcomes[outcome] for outcome in Outcome)),
            wasted_compute_fraction=self._wasted_compute(),
            link_bytes=link_bytes,
            draft_tokens=self.draft_tokens,
        )

    def _wasted_compute(self) -> WastedCompute | None:
        if not self._compute:
            return None
        return WastedCompute(**{cause: wasted / self._compute for cause, wasted in self._wasted.items()})

    def _latency_breakdown(self) -> LatencyBreakdown | None:
        if not self._latency:
            return None
        ttft, later = self._latency
        tokens = len(self._gaps)
        return LatencyBreakdown(
            LatencyShares(*(part / 1e9 for part in ttft)),
            LatencyShares(*(part / tokens / 1e9 for part in later)) if tokens else None,
        )


@dataclasses.dataclass(slots=True)
class _OpenRun:
    kind: RunKind
    rows: int
    compute: float = 0


_PARTS = tuple(field.name for field in dataclasses.fields(Latency))
_CAUSES = {Outcome.REJECTED: "rejected_runs", Outcome.CANCELLED: "cancelled", Outcome.DRAINED: "drained"}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """A percentile of a non-empty ascending sequence, by linear interpolation between the closest ranks."""
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def _distribution(gaps: Sequence[float]) -> Distribution | None:
    """Of gaps in nanoseconds."""
    if not gaps:
        return None
    ordered = sorted(gaps)
    p50, p95, p99 = (percentile(ordered, percent) / 1e9 for percent in (50, 95, 99))
    return Distribution(sum(ordered) / len(ordered) / 1e9, p50, p95, p99)
