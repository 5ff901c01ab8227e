"""What a pipeline costs, measured between its own runs, and what its drafter proposes all along the text."""

import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from backends.cluster import running_pipeline
from backends.job import Job
from backends.probing import Drafts, Prober, Text
from backends.streaming import OnText, stream
from backends.transport import split_address
from pipesim.acceptance_trace import FORMAT, AcceptanceTrace, RecordedSampling
from pipesim.calibration import HeadSample, Observations
from pipesim.executors import Measurement, Observed
from pipesim.trace import Trace


async def measure(job: Job, repeats: int, rounds: int, logs: Path, on_text: OnText | None) -> Measurement:
    """Probing and runs in turns, so that a slower minute of the machine hits both; the first generations warm up.

    Raises:
        StageFailedError: a stage or the drafter failed.
    """
    runs: list[Trace] = []
    handling: list[HeadSample] = []
    async with running_pipeline(job.cluster()) as pipeline:
        plain = job.meter(job.plain())
        await stream(job, pipeline, plain, None, on_text, handling)
        tokens = plain.tokens
        planted, chunk = job.planted(tokens), job.scenario.cluster.prefill_chunk
        if job.needs_drafter:
            await stream(job, pipeline, job.meter(job.scenario.scheduler()), planted, None, handling)
        prober = Prober(pipeline, Text(job.started.prompt, tokens, job.sampling, planted), chunk)
        acceptance = await acceptance_along(job, prober, tokens)
        if rounds:
            await prober.open()
            await prober.measure_round()
        for number in range(max(1, repeats)):
            for _ in range(number * rounds // max(1, repeats), (number + 1) * rounds // max(1, repeats)):
                await prober.measure_round()
            if number < repeats:
                with event_log(logs, number) as events:
                    recorder = job.recorder(job.scenario.scheduler(), events)
                    await stream(job, pipeline, recorder, planted)
                runs.append(recorder.trace())
        if rounds:
            await prober.close()
    costs = Observations(tuple(prober.runs), tuple(prober.floods), tuple(handling), tuple(prober.drafts))
    here = [_is_here(host) for host in job.scenario.execution.hosts or [None] * len(pipeline.stages)]
    cores = max(1, _cores() // job.scenario.execution.threads_per_stage) if any(here) else None
    return Measurement(Observed(costs, rounds, tuple(here), cores, acceptance), tuple(runs))


async def acceptance_along(job: Job, prober: Prober, tokens: tuple[int, ...]) -> AcceptanceTrace:
    """What the drafter, if there is one, makes of the text; every policy gives the same text (I3)."""
    started, sampling = job.started, job.sampling
    drafts: Drafts = ((),) * len(tokens), None
    if job.needs_drafter:
        drafts = await prober.trace(tokens)
    return AcceptanceTrace(
        format=FORMAT,
        model=job.scenario.model.name,
        drafter=job.scenario.execution.drafter,
        sampling=RecordedSampling(**dataclasses.asdict(sampling)),
        prompt_tokens=started.prompt,
        tokens=tokens,
        stop_tokens=started.stop_tokens,
        stop_string=0 < len(tokens) < started.max_new_tokens and tokens[-1] not in started.stop_tokens,
        candidates=drafts[0],
        detours=drafts[1],
    )


@contextlib.contextmanager
def event_log(logs: Path, number: int) -> Iterator[TextIO]:
    """The open event log of run ``number`` in the folder ``logs``."""
    with (logs / f"run-{number}.jsonl").open("w", encoding="utf-8") as stream:
        yield stream


def _is_here(host: str | None) -> bool:
    """Whether a stage shares this machine."""
    if host is None:
        return True
    name, _ = split_address(host, "host")
    return name in ("localhost", "::1", socket.gethostname()) or name.startswith("127.")


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
