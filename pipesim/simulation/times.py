"""How long a run occupies a stage: asked by the simulated stage, and by real ones that emulate a slower machine.

All times are whole nanoseconds since the prompt; nothing here knows what time it is.
"""

import math

from pipesim.scenario import StagePlan
from pipesim.scheduling.runs import Run
from pipesim.simulation.courses import Course, work_end


class StageTimes:
    """The times of one stage. ``pace`` is the factor by which everything takes longer at a time, or None."""

    def __init__(self, plan: StagePlan, pace: Course | None = None) -> None:
        self._seconds = plan.cost_model().seconds
        self._layers = plan.layers
        self._pace = pace

    def work(self, run: Run, context: float) -> int:
        """How long a run takes where nothing slows it down; its rows attend to ``context`` cells on average."""
        return max(1, round(self._seconds(run.kind, run.rows, context) * 1e9))

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
