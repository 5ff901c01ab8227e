"""What happens to stages: they are slow for a while, or they die and come back empty.

A crash takes all that its stage holds. Nobody knows at first: the head goes on submitting, the other stages go on
computing, and what is behind the dead stage already still comes home. Then the head notices (``StageLost``): everything
in flight is given up, on all stages. Once no stage is down any more, it hears ``PipelineRestored``, and the scheduler
prefills the text in a new epoch. Frames of older epochs that turn up anywhere are ignored.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from pipesim.scenario import CrashFault, Fault, SlowStageFault
from pipesim.scheduling.events import Event, PipelineRestored, RunReturned, StageLost
from pipesim.scheduling.runs import Run
from pipesim.simulation.courses import NS_PER_MS, Course, active_ns, overlay
from pipesim.simulation.devices import Call, Clock
from pipesim.simulation.links import Passage
from pipesim.simulation.stage import Frame, StageServer


def stage_pace(faults: Iterable[Fault], stage: int) -> Course | None:
    """The factor by which everything takes longer at a stage; None: always 1."""
    slow = [fault for fault in faults if isinstance(fault, SlowStageFault) and fault.stage == stage]
    return overlay([(*active_ns(fault.start_ms, fault.duration_ms), fault.factor) for fault in slow], math.prod)


class MortalStageServer(StageServer):
    """A stage that can crash. It takes frames of its epoch and of later ones only."""

    _epoch: float = 0
    _died = -1

    def arrive(self, passage: Passage, frame: Frame) -> None:
        """As ``StageServer.arrive``; a dead stage, or one that has given the frame's epoch up, does not hear it."""
        if frame.run.epoch >= self._epoch:
            super().arrive(passage, frame)

    def crash(self) -> None:
        """Everything is lost, and nothing is heard until ``renew``."""
        self.drop_everything()
        self._epoch, self._died = math.inf, self._clock.now

    def give_up(self, epoch: int) -> None:
        """The head ends all epochs before ``epoch``."""
        self.drop_everything()
        self._epoch = max(self._epoch, epoch)

    def renew(self, epoch: int, connected_at: int) -> None:
        """The head begins ``epoch``, on connections made at ``connected_at``: a stage that died since stays dead."""
        if self._died <= connected_at:
            self.drop_everything()
            self._epoch = epoch


class Crashes:
    """All crashes of a scenario. ``hear(event)`` tells the head."""

    def __init__(
        self,
        clock: Clock,
        crashes: Iterable[CrashFault],
        stages: Sequence[MortalStageServer],
        hear: Callable[[Event], None],
    ) -> None:
        self._stages = stages
        self._hear = hear
        self._down = 0
        self._epoch = 0
        in_order = sorted(crashes, key=lambda crash: (crash.start_ms, crash.stage))
        times = [[crash.start_ms] for crash in in_order]
        for known, crash in zip(times, in_order, strict=True):
            known += [known[-1] + crash.detect_ms, known[-1] + crash.detect_ms + crash.restart_ms]
        for moment, what in enumerate((self._crash, self._notice, self._connect)):
            for known, crash in zip(times, in_order, strict=True):
                clock.at(round(known[moment] * NS_PER_MS), what, crash)

    def admits(self, event: Event, time: int, run: Run | None, epoch: int) -> bool:
        """Whether the head, in ``epoch``, shall handle ``event``, heard at ``time``; prepares the stages for it.

        ``run``: which one came home, if that is the event. One of an epoch that was given up is of no use any more.
        """
        match event:
            case RunReturned():
                return run is not None and run.epoch >= self._epoch
            case StageLost():
                self._epoch = epoch + 1
                for stage in self._stages:
                    stage.give_up(self._epoch)
            case PipelineRestored():
                for stage in self._stages:
                    stage.renew(self._epoch, time)
        return True

    def _crash(self, call: Call) -> None:
        self._down += 1
        self._stages[call.value.stage].crash()

    def _notice(self, call: Call) -> None:
        crash: CrashFault = call.value
        self._hear(StageLost(crash.stage, f"crashed at {crash.start_ms} ms"))

    def _connect(self, _: Call) -> None:
        self._down -= 1
        if not self._down:
            self._hear(PipelineRestored())
