"""How well a real run kept to the times of the cluster that it emulated: whether its figures mean anything.

Times that are due follow from the model, so lateness does not add up; but where the real machine cannot follow, what
was measured is that machine, and not the one that was emulated.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from pipesim.metrics import percentile
from pipesim.trace import PaceSample

MOST_OVERRUNS = 0.01
"""Share of a stage's or the drafter's work that may really take longer than it should."""
MOST_LATE_S = 0.002
"""95 % of what stages, drafter and head do must be done no later than that after it was due."""
CALLED_OFF = ", called off"
"""After a part's name: what it did with runs and drafts that nobody waited for any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class PartPace:
    """How well one stage, link, drafter or head kept its times.

    Attributes:
        events: runs, messages, drafts or news.
        requested_ms: median of what the model asked for; None where it is not known (control links).
        achieved_ms: median of what really passed: never less, as what is early waits.
        late_ms: median, 95th percentile and maximum of how much later than due things happened.
        overruns: share whose real computation alone took longer than the modelled one.
    """

    part: str
    events: int
    requested_ms: float | None
    achieved_ms: float | None
    late_ms: tuple[float, float, float]
    overruns: float

    @property
    def counts(self) -> bool:
        """Whether its pace is that of the emulation: not that of a link, nor of what was called off."""
        return " to " not in self.part and not self.part.endswith(CALLED_OFF)


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """All parts of an emulated cluster, and what is wrong with its pace, if anything is."""

    parts: tuple[PartPace, ...]
    problems: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Whether the figures are those of the emulated cluster."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = [dataclasses.asdict(part) for part in self.parts]
        return {"kept": self.kept, "problems": list(self.problems), "parts": parts}


def judge(samples: Sequence[PaceSample]) -> Pace | None:
    """The pace of one or several runs; None where nothing was emulated.

    Links may be late within reason: what they bring late is computed in time or not, and that is what counts. The same
    goes for what was called off: in the model it takes no time, and real processes pass it on in a millisecond each; it
    matters by what it makes late.
    """
    if not samples:
        return None
    names = dict.fromkeys(sample.part for sample in samples)
    parts = tuple(_part(name, [sample for sample in samples if sample.part == name]) for name in names)
    return Pace(parts, tuple(problem for part in parts for problem in _problems(part)))


def _part(name: str, samples: Sequence[PaceSample]) -> PartPace:
    late = sorted(1e3 * max(0.0, sample.done_s - sample.due_s) for sample in samples)
    asked = [sample for sample in samples if sample.due_s or sample.since_s]
    achieved = [1e3 * (max(sample.done_s, sample.due_s) - sample.since_s) for sample in asked]
    return PartPace(
        part=name,
        events=len(samples),
        requested_ms=1e3 * statistics.median(s.due_s - s.since_s for s in asked) if asked else None,
        achieved_ms=statistics.median(achieved) if asked else None,
        late_ms=(percentile(late, 50), percentile(late, 95), late[-1]),
        overruns=sum(sample.overrun for sample in samples) / len(samples),
    )


def _problems(part: PartPace) -> list[str]:
    if not part.counts:
        return []
    problems = []
    if part.overruns > MOST_OVERRUNS:
        problems.append(
            f"{part.part}: {part.overruns:.0%} of {part.events} really took longer than the emulated machine would, at "
            f"most {MOST_OVERRUNS:.0%} may"
        )
    limit_ms = 1e3 * MOST_LATE_S
    if part.late_ms[1] > limit_ms:
        problems.append(f"{part.part}: one in twenty was {part.late_ms[1]:.1f} ms late or more, {limit_ms:g} ms may be")
    return problems
