"""How long runs and drafts take: asked by simulated stages and drafters, and by real ones that emulate slower machines.

All times are whole nanoseconds since the prompt; nothing here knows what time it is.
"""

import math

from pipesim.scenario import DraftPlan, StagePlan
from pipesim.scheduling.runs import Run, RunKind
from pipesim.simulation.courses import Course, work_end


def demand(takes: float, one_row: float) -> float:
    """Memory bandwidth that a run asks for, as a share of what a run of one row does there: see ``FairDevice``.

    Both read the same weights once: who takes twice as long reads half as fast. Both times are of runs alone.
    """
    return min(1.0, one_row / takes)


class StageTimes:
    """The times of one stage. ``pace`` is the factor by which everything takes longer at a time, or None."""

    def __init__(self, plan: StagePlan, pace: Course | None = None) -> None:
        self._seconds = plan.cost_model().seconds
        self._layers = plan.layers
        self._pace = pace

    def work(self, run: Run, context: float) -> int:
        """How long a run takes where nothing slows it down; its rows attend to ``context`` cells on average."""
        return max(1, round(self._seconds(run.kind, run.rows, context) * 1e9))

    def demand(self, takes: float, context: float) -> float:
        """See the function; of a run that takes so long alone, faults included."""
        return demand(takes, 1e9 * self._seconds(RunKind.CANONICAL, 1, context))

    def end(self, start: int, work: int) -> int:
        """When so much work is done that begins at ``start``."""
        return start + work if self._pace is None else round(work_end(start, work, self._pace))

    def cut(self, start: int, work: int, end: int, died: int) -> int:
        """When a run that is to be computed until ``end`` stops: at the first layer boundary after its death."""
        if died >= end:
            return end
        layers, pace = self._layers, self._pace
        if pace is not None:
            boundaries = (work_end(start, work * layer / layers, pace) for layer in range(layers))
            return min(end, next((math.ceil(boundary) for boundary in boundaries if boundary >= died), end))
        done = -(-max(0, died - start) * layers // work)
        return start - (-done * work // layers)


class DraftTimes:
    """The times of one drafter, a draft at a time; it reads a prompt of so many tokens before the first.

    ``level``: what a level of the draft at hand takes.
    """

    def __init__(self, plan: DraftPlan, prompt_tokens: int) -> None:
        self.level = 0
        self._level_ns = plan.level_ms * 1e6
        self._cell_ns = plan.cell_ms * 1e6
        self._request = round(plan.request_ms * 1e6)
        self._setup = round(plan.prefill_per_token_ms * 1e6 * prompt_tokens)
        self._levels_start = 0

    def begin(self, start: int, position: int) -> None:
        """A draft is taken up whose first token stands at ``position``."""
        self.level = round(self._level_ns + self._cell_ns * position)
        self._levels_start = start + self._setup + self._request
        self._setup = 0

    def end(self, levels: int) -> int:
        """When so many levels are drafted."""
        return self._levels_start + levels * self.level

    def cut(self, overtaken: int) -> int:
        """When a draft stops that a newer request overtakes: at the next boundary between levels."""
        worked = max(0, overtaken - self._levels_start)
        return self.end(-(-worked // self.level) if self.level else 0)
