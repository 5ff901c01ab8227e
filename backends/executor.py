"""The gRPC executor: what the command line asks for, put together from the other modules."""

import asyncio
import contextlib
import dataclasses
import selectors
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

from backends.cluster import running_pipeline
from backends.job import Job, check_device, prepare
from backends.logs import configure_logging, name_node
from backends.measuring import acceptance_along, event_log, measure
from backends.models.loading import open_model
from backends.models.native import library
from backends.placement import split_layers
from backends.probing import Prober, Text
from backends.serve import serve
from backends.streaming import OnText, plain_tokens, stream
from pipesim.errors import BadInputError
from pipesim.executors import Measurement, RealResult
from pipesim.scenario import Model, Scenario
from pipesim.summary import summarise

T = TypeVar("T")


class GrpcExecutor:
    """Stages as processes over gRPC. Implements ``pipesim.executors.Executor``."""

    def __init__(self) -> None:
        configure_logging()

    def describe(self, model: str, stages: int) -> tuple[Model, tuple[int, ...]]:
        """The model's section of a scenario, and layers per stage, balanced by parameters.

        Raises:
            BadInputError: there is no such model, or it has fewer layers than stages.
        """
        config = open_model(model).config
        section = Model(name=model, layers=config.layers, hidden=config.hidden, vocabulary=config.vocabulary)
        return section, split_layers(config, stages)

    def execute(
        self,
        scenario: Scenario,
        events: TextIO | None = None,
        on_text: OnText | None = None,
        record_acceptance: bool = False,
        keep_trace: bool = False,
    ) -> RealResult:
        """Generates for real. A planted drafter costs a plain generation before, so that it knows the text.

        Only with ``keep_trace``, or on an emulated cluster, does memory grow with every run; else with the text alone,
        by some 150 bytes per token.

        Raises:
            BadInputError: the scenario does not fit the model, or a stage cannot be reached.
            StageFailedError: a stage failed on the way.
        """
        job = dataclasses.replace(prepare(scenario), records_acceptance=record_acceptance)
        return _run(job, _execute(job, events, on_text, keep_trace))

    def measure(
        self, scenario: Scenario, repeats: int, rounds: int, logs: Path, on_text: OnText | None = None
    ) -> Measurement:
        """One pipeline: a plain generation and one as the scenario has it, then rounds of probing and runs in turns.

        Raises:
            BadInputError, StageFailedError: as :meth:`execute`.
        """
        job = prepare(scenario)
        return _run(job, measure(job, repeats, rounds, logs, on_text))

    def execute_all(
        self, scenarios: Sequence[Scenario], logs: Path, on_result: Callable[[int, RealResult], None]
    ) -> None:
        """Generates for each scenario on one pipeline, one after the other, after a plain generation for warmth.

        They differ in policy, acceptance and seed alone, in the seed only where no emulated link draws with it.
        ``on_result`` hears of each by its index as soon as it is done, and its event log is ``logs``/run-INDEX.jsonl.

        Raises:
            BadInputError, StageFailedError: as :meth:`execute`, or the scenarios differ in more.
        """
        jobs = [prepare(scenario) for scenario in scenarios]
        _run(jobs[0], _execute_all(jobs, logs, on_result))

    def serve_stage(self, listen: str, device: str) -> None:
        """Serves heads at ``host:port``, one after another, until interrupted; on ``device``, if they name no other.

        Raises:
            BadInputError: the port is in use, or there is no such device.
        """
        check_device("--device", device, "float32")
        name_node("node")
        if device == "cpu":
            with contextlib.suppress(BadInputError):  # it may never be asked for kernels
                library.prepare()
        serve(listen, device)


def _run(job: Job, main: Coroutine[None, None, T]) -> T:
    """Runs the head. Timers of an event loop know milliseconds, which is too coarse for an emulated cluster's head."""
    with asyncio.Runner(loop_factory=_fine_loop if job.scenario.execution.emulate else None) as runner:
        return runner.run(main)


def _fine_loop() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


async def _execute(job: Job, events: TextIO | None, on_text: OnText | None, keep_trace: bool) -> RealResult:
    async with running_pipeline(job.cluster()) as pipeline:
        planted = job.planted(await plain_tokens(job, pipeline)) if job.is_planted else None
        scheduler = job.scenario.scheduler()
        if keep_trace:
            recorder = job.recorder(scheduler, events)
            text = await stream(job, pipeline, recorder, planted, on_text)
            trace = recorder.trace()
            result = RealResult(text, summarise(trace), trace)
        else:
            meter = job.meter(scheduler, events)
            text = await stream(job, pipeline, meter, planted, on_text)
            result = RealResult(text, meter.summary())
        if not job.records_acceptance:
            return result
        tokens = result.summary.tokens
        prober = Prober(
            pipeline, Text(job.started.prompt, tokens, job.sampling, planted), job.scenario.cluster.prefill_chunk
        )
        return dataclasses.replace(result, acceptance=await acceptance_along(job, prober, tokens))


async def _execute_all(jobs: Sequence[Job], logs: Path, on_result: Callable[[int, RealResult], None]) -> None:
    first = next((job for job in jobs if job.needs_drafter), jobs[0])
    for job in jobs:
        for section in ("model", "cluster", "workload", "execution", "faults"):
            if getattr(job.scenario, section) != getattr(first.scenario, section):
                raise BadInputError(f"{section}: scenarios for one pipeline must have the same")
        drawn = first.scenario.execution.emulate and first.scenario.links_draw()
        if drawn and job.scenario.seed != first.scenario.seed:
            raise BadInputError("seed: links with jitter or loss draw with it: scenarios must have the same")
    async with running_pipeline(first.cluster()) as pipeline:
        tokens = await plain_tokens(first, pipeline)
        for number, job in enumerate(jobs):
            with event_log(logs, number) as events:
                meter = job.meter(job.scenario.scheduler(), events)
                text = await stream(job, pipeline, meter, job.planted(tokens))
            on_result(number, RealResult(text, meter.summary()))
