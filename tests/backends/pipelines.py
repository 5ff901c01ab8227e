"""Real pipelines for tests: processes over loopback, driven from an event loop in a thread of its own."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from backends.cluster import ClusterPlan, DrafterPart, running_pipeline, stage_parts
from backends.control import Planted
from backends.head import Head
from backends.pipeline import Pipeline
from backends.sampling import Sampling
from pipesim.recorder import Recorder
from pipesim.scenario import IidAcceptance
from pipesim.scheduling.commands import Command
from pipesim.scheduling.events import Event, GenerationStarted
from pipesim.scheduling.policy import make_policy
from pipesim.scheduling.scheduler import Scheduler
from pipesim.trace import Trace

T = TypeVar("T")
LAYERS, VOCABULARY, CONTEXT = 8, 160, 800


class StruckRecorder(Recorder):
    """Does harm at chosen moments: ``strikes`` by the number of events heard."""

    strikes: dict[int, Callable[[], None]]
    heard = 0

    def handle(self, event: Event, now: float) -> list[Command]:
        commands = super().handle(event, now)
        self.heard += 1
        if strike := self.strikes.pop(self.heard, None):
            strike()
        return commands


@dataclass
class RunningPipeline:
    """A pipeline that many generations share."""

    pipeline: Pipeline
    loop: asyncio.AbstractEventLoop
    traces: list[Trace] = field(default_factory=list)

    def generate(
        self,
        policy: str,
        prompt: Sequence[int],
        new_tokens: int,
        settings: dict[str, Any] | None = None,
        sampling: Sampling | None = None,
        known: Sequence[int] | None = None,
        events: Any = None,
        strikes: Mapping[int, Callable[[], None]] | None = None,
    ) -> list[int]:
        """The tokens that the head emits; ``known`` is the continuation for a planted drafter.

        ``strikes``: what befalls the pipeline once the head has heard so many events.
        """
        scheduler = Scheduler(make_policy(policy, settings or {}))
        recorder = StruckRecorder(scheduler, 0, [str(i) for i in range(len(self.pipeline.stages))], events)
        recorder.strikes = dict(strikes or {})
        emitted: list[int] = []
        planted = None
        if known is not None:
            planted = Planted((*prompt, *known), IidAcceptance(kind="iid", rate=0.7).model_dump())
        head = Head(self.pipeline, recorder, emitted.extend)
        started = GenerationStarted(tuple(prompt), new_tokens)
        self.wait(head.generate(started, sampling or Sampling(), planted))
        self.traces.append(recorder.trace())
        return emitted

    def wait(self, work: Coroutine[Any, Any, T], within_s: float = 120.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(within_s)


@contextlib.contextmanager
def running(plan: ClusterPlan) -> Iterator[RunningPipeline]:
    """Brings a pipeline up, and takes it down."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        context = running_pipeline(plan)
        pipeline = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(120)
        try:
            yield RunningPipeline(pipeline, loop)
        finally:
            asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def tiny_plan(model: Path, stages: int, drafter: str | None = "ngram", **changes: Any) -> ClusterPlan:
    """The tiny model over so many stages of about equal size, the last one smallest."""
    each, more = divmod(LAYERS, stages)
    layers = [each + (stage < more) for stage in range(stages)]
    part = DrafterPart(drafter, VOCABULARY, CONTEXT) if drafter else None
    return ClusterPlan(str(model), stage_parts(layers), part, **changes)
