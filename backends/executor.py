"""The gRPC executor: what the command line asks for, put together from the other modules."""

import asyncio
import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from backends.chaos import check_faults, faults_under_way
from backends.cluster import DRAFTERS, ClusterPlan, DrafterPart, Recovery, running_pipeline, stage_parts
from backends.control import Planted
from backends.emulation import PacedHead, emulated_parts, to_bytes
from backends.head import Head
from backends.logs import configure_logging, name_node
from backends.models.config import ModelConfig
from backends.models.finding import KNOWN_MODELS, is_hub_name
from backends.models.loading import open_model
from backends.pacing import LEAD_S
from backends.pipeline import Pipeline
from backends.placement import split_layers
from backends.probing import Drafts, Prober, Text
from backends.sampling import Sampling
from backends.serve import serve
from backends.text_stream import TextStream
from backends.tokenizer import ModelTokenizer, open_tokenizer
from backends.transport import split_address
from pipesim.acceptance_trace import FORMAT, AcceptanceTrace, RecordedSampling
from pipesim.calibration import HeadSample, Observations
from pipesim.errors import BadInputError
from pipesim.executors import Measurement, Observed, Progress, RealResult
from pipesim.recorder import Recorder
from pipesim.scenario import ACTIVATION_BYTES, IidAcceptance, MarkovAcceptance, Model, Scenario
from pipesim.scheduling.events import GenerationStarted
from pipesim.scheduling.policies.autoregressive import Autoregressive
from pipesim.scheduling.scheduler import Scheduler
from pipesim.trace import Trace

OnText = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class _Job:
    """A checked scenario: everything that can be wrong without starting a process is right."""

    scenario: Scenario
    model: str
    config: ModelConfig
    tokenizer: ModelTokenizer
    started: GenerationStarted
    sampling: Sampling
    records_acceptance: bool = False

    @property
    def needs_drafter(self) -> bool:
        return self.records_acceptance or self.scenario.policy.build().limits.nodes > 0

    @property
    def is_planted(self) -> bool:
        return self.needs_drafter and self.scenario.execution.drafter == "planted"

    def cluster(self) -> ClusterPlan:
        scenario, execution = self.scenario, self.scenario.execution
        layers: Sequence[int] = [plan.layers for plan in scenario.stages()]
        emulated: tuple[bytes, ...] = ()
        if execution.emulate:
            stages, drafting = emulated_parts(scenario)
            emulated = (*(to_bytes(stage) for stage in stages), to_bytes(drafting))
            layers = split_layers(self.config, len(layers)) if execution.stand_in else layers
        limit = len(self.started.prompt) + self.started.max_new_tokens
        drafter = DrafterPart(
            execution.drafter, self.config.vocabulary, limit, execution.skip_layers, execution.drafter_device
        )
        return ClusterPlan(
            model=self.model,
            stages=stage_parts(layers, execution.hosts, execution.devices(len(layers))),
            drafter=drafter if self.needs_drafter else None,
            dtype=execution.dtype,
            kernels=execution.kernels,
            compression=execution.activation_compression,
            threads=execution.threads_per_stage,
            emulated=emulated,
            startup_timeout_s=execution.startup_timeout_s,
            recovery=Recovery(execution.recovery.attempts, execution.recovery.timeout_s),
            spares=execution.spares,
        )

    def paced(self) -> PacedHead | None:
        """The head of the emulated cluster, if it is one."""
        return PacedHead(self.scenario) if self.scenario.execution.emulate else None

    def stream(self) -> TextStream:
        return self.tokenizer.stream(self.scenario.workload.stop)

    def plain(self) -> Scheduler:
        """A scheduler for plain decoding of the same text."""
        cluster = self.scenario.cluster
        return Scheduler(Autoregressive(), None, cluster.prefill_chunk, cluster.prefill_window)

    def recorder(self, scheduler: Scheduler, events: TextIO | None = None) -> Recorder:
        return Recorder(scheduler, self.scenario.seed, [plan.name for plan in self.scenario.stages()], events)

    def planted(self, continuation: tuple[int, ...]) -> Planted | None:
        """What a planted drafter must know, if the scenario asks for one."""
        acceptance = self.scenario.acceptance
        if not self.is_planted or not isinstance(acceptance, IidAcceptance | MarkovAcceptance):
            return None
        return Planted((*self.started.prompt, *continuation), acceptance.model_dump())


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
    ) -> RealResult:
        """Generates for real. A planted drafter costs a plain generation before, so that it knows the text.

        Raises:
            BadInputError: the scenario does not fit the model, or a stage cannot be reached.
            StageFailedError: a stage failed on the way.
        """
        job = dataclasses.replace(_prepare(scenario), records_acceptance=record_acceptance)
        return asyncio.run(_execute(job, events, on_text))

    def measure(
        self, scenario: Scenario, repeats: int, rounds: int, logs: Path, on_text: OnText | None = None
    ) -> Measurement:
        """One pipeline: a plain generation and one as the scenario has it, then rounds of probing and runs in turns.

        Raises:
            BadInputError, StageFailedError: as :meth:`execute`.
        """
        return asyncio.run(_measure(_prepare(scenario), repeats, rounds, logs, on_text))

    def execute_all(
        self, scenarios: Sequence[Scenario], logs: Path, on_result: Callable[[int, RealResult], None]
    ) -> None:
        """Generates for each scenario on one pipeline, one after the other, after a plain generation for warmth.

        They have the model, cluster and workload in common. ``on_result`` hears of each by its index as soon as it is
        done, and its event log is ``logs``/run-INDEX.jsonl.

        Raises:
            BadInputError, StageFailedError: as :meth:`execute`, or the scenarios have not so much in common.
        """
        asyncio.run(_execute_all([_prepare(scenario) for scenario in scenarios], logs, on_result))

    def serve_stage(self, listen: str, device: str) -> None:
        """Serves heads at ``host:port``, one after another, until interrupted; on ``device``, if they name no other.

        Raises:
            BadInputError: the port is in use, or there is no such device.
        """
        _check_device("--device", device, "float32")
        name_node("node")
        try:
            serve(listen, device)
        except KeyboardInterrupt:
            # PyTorch's threads may abort a process whose interpreter is taken down beneath them: leave without that
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(130)


def _prepare(scenario: Scenario) -> _Job:
    """Checks the scenario against the model. Raises BadInputError naming the field."""
    name = scenario.execution.stand_in or scenario.model.name
    source = open_model(name)
    config, workload = source.config, scenario.workload
    if scenario.execution.emulate:
        emulated_parts(scenario)
    if scenario.execution.stand_in is None:
        _check_model(scenario, config)
    check_faults(scenario.faults, scenario.execution.hosts or [None] * len(scenario.stages()))
    if workload.prompt is None:
        raise BadInputError("workload.prompt: a real run needs the prompt's text")
    if scenario.execution.drafter == "planted" and not isinstance(
        scenario.acceptance, IidAcceptance | MarkovAcceptance
    ):
        raise BadInputError("acceptance: the planted drafter needs this section with kind: iid or markov")
    _check_devices(scenario)
    tokenizer = open_tokenizer(source)
    prompt = _encode(tokenizer, workload.prompt, workload.chat)
    if scenario.policy.build().limits.nodes and scenario.execution.drafter not in DRAFTERS:
        _check_draft_model(scenario, tokenizer)
    if len(prompt) + workload.max_new_tokens > config.max_context:
        raise BadInputError(
            f"workload: {len(prompt)} prompt tokens and max_new_tokens = {workload.max_new_tokens} exceed the context "
            f"of {config.max_context} tokens that {name} has: shorten the prompt or generate fewer"
        )
    stop = () if workload.ignore_eos else tokenizer.eos_ids
    sampling = Sampling(
        temperature=workload.temperature,
        top_k=workload.top_k or 0,
        top_p=workload.top_p or 1.0,
        min_p=workload.min_p or 0.0,
        repetition_penalty=workload.repetition_penalty or 1.0,
        seed=scenario.seed,
    )
    started = GenerationStarted(prompt, workload.max_new_tokens, stop)
    # a known name each machine finds for itself; a path must lead to the same files everywhere
    model = name if name in KNOWN_MODELS or is_hub_name(name) else str(source.path.resolve())
    return _Job(scenario, model, config, tokenizer, started, sampling)


def _check_devices(scenario: Scenario) -> None:
    """Raises BadInputError for a device that this machine has not; other machines check theirs."""
    execution, stages = scenario.execution, len(scenario.stages())
    hosts = execution.hosts or (None,) * stages
    for host, device in zip(hosts, execution.devices(stages), strict=True):
        if host is None:
            _check_device("execution.device", device or "cpu", execution.dtype)
    _check_device("execution.drafter_device", execution.drafter_device, execution.dtype)


def _check_device(field: str, device: str, dtype: str) -> None:
    if device != "cpu":
        from backends.models.devices import open_device  # PyTorch takes seconds to import: only to ask it for devices

        try:
            open_device(device, dtype)
        except BadInputError as error:
            raise BadInputError(f"{field}: {error}") from None


def _check_model(scenario: Scenario, config: ModelConfig) -> None:
    """Raises BadInputError if the model section does not describe the model that is loaded."""
    for field, real in (("layers", config.layers), ("hidden", config.hidden), ("vocabulary", config.vocabulary)):
        if getattr(scenario.model, field) != real:
            raise BadInputError(
                f"model.{field} = {getattr(scenario.model, field)}, but {scenario.model.name} has {real}: correct it, "
                "or let it stand in for another model in an emulated cluster (execution.stand_in)"
            )
    dtype, size = scenario.execution.dtype, scenario.model.activation_bytes
    if size != ACTIVATION_BYTES[dtype] and not scenario.execution.emulate:
        raise BadInputError(
            f"model.activation_bytes = {size}: with execution.dtype {dtype}, real stages exchange "
            f"{ACTIVATION_BYTES[dtype]} bytes: correct it, or leave it out"
        )


def _check_draft_model(scenario: Scenario, tokenizer: ModelTokenizer) -> None:
    """Raises BadInputError if the draft model's tokens are not the target's."""
    drafter = scenario.execution.drafter
    conflict = tokenizer.conflict(open_tokenizer(open_model(drafter)))
    if conflict:
        raise BadInputError(
            f"execution.drafter = {drafter}: its vocabulary is not that of {scenario.model.name}: {conflict}; "
            "use a smaller model of the same family"
        )


def _encode(tokenizer: ModelTokenizer, prompt: str, chat: bool) -> tuple[int, ...]:
    if not chat:
        return tuple(tokenizer.encode(prompt))
    try:
        return tuple(tokenizer.encode_chat([{"role": "user", "content": prompt}]))
    except BadInputError as error:
        raise BadInputError(f"{error} (workload.chat: false, or generate --raw)") from error


async def _execute(job: _Job, events: TextIO | None, on_text: OnText | None) -> RealResult:
    async with running_pipeline(job.cluster()) as pipeline:
        planted = None
        if job.is_planted:
            planted = job.planted((await _generate(job, pipeline, job.plain())).tokens)
        result = await _stream(job, pipeline, job.scenario.scheduler(), planted, events, on_text)
        if not job.records_acceptance:
            return result
        text = Text(job.started.prompt, result.trace.tokens, job.sampling, planted)
        prober = Prober(pipeline, text, job.scenario.cluster.prefill_chunk)
        return dataclasses.replace(result, acceptance=await _record(job, prober, result.trace.tokens))


async def _execute_all(jobs: Sequence[_Job], logs: Path, on_result: Callable[[int, RealResult], None]) -> None:
    first = next((job for job in jobs if job.needs_drafter), jobs[0])
    for job in jobs:
        one, other = job.scenario, first.scenario
        if (one.model, one.cluster, one.workload) != (other.model, other.cluster, other.workload):
            raise BadInputError("model, cluster, workload: scenarios for one pipeline must have the same")
    async with running_pipeline(first.cluster()) as pipeline:
        tokens = (await _generate(first, pipeline, first.plain())).tokens
        for number, job in enumerate(jobs):
            with _log(logs, number) as events:
                result = await _stream(job, pipeline, job.scenario.scheduler(), job.planted(tokens), events, None)
            on_result(number, result)


async def _stream(
    job: _Job,
    pipeline: Pipeline,
    scheduler: Scheduler,
    planted: Planted | None,
    events: TextIO | None,
    on_text: OnText | None,
    handling: list[HeadSample] | None = None,
) -> RealResult:
    """One generation, its text shown as it comes; ``handling`` gathers what its events took the head."""
    recorder = job.recorder(scheduler, events)
    stream, pieces, count = job.stream(), list[str](), 0

    def show(piece: str) -> None:
        pieces.append(piece)
        if on_text:
            seen = scheduler.statistics
            rate = seen.drafted_accepted / seen.drafted_verified if seen.drafted_verified else None
            on_text(Progress(piece, count, rate))

    def on_tokens(tokens: tuple[int, ...]) -> int | None:
        nonlocal count
        piece = stream.feed(tokens)
        count = count + len(tokens) if stream.ended is None else stream.ended
        show(piece)
        return stream.ended

    paced = job.paced() if handling is None else None  # the first generations, which warm up, need no pace
    head = Head(pipeline, recorder, on_tokens, paced)
    async with faults_under_way(job.scenario.faults, pipeline, LEAD_S if paced else 0.0):
        await head.generate(job.started, job.sampling, planted)
    if handling is not None:
        handling += head.handling
    if rest := stream.finish():
        show(rest)
    return RealResult("".join(pieces), recorder.trace())


async def _generate(job: _Job, pipeline: Pipeline, scheduler: Scheduler) -> Trace:
    """A generation nobody watches, without drafts."""
    recorder, stream = job.recorder(scheduler), job.stream()

    def on_tokens(tokens: tuple[int, ...]) -> int | None:
        stream.feed(tokens)
        return stream.ended

    await Head(pipeline, recorder, on_tokens).generate(job.started, job.sampling)
    return recorder.trace()


async def _measure(job: _Job, repeats: int, rounds: int, logs: Path, on_text: OnText | None) -> Measurement:
    """Probing and runs in turns, so that a slower minute of the machine hits both; the first generations warm up."""
    runs: list[RealResult] = []
    handling: list[HeadSample] = []
    async with running_pipeline(job.cluster()) as pipeline:
        plain = await _stream(job, pipeline, job.plain(), None, None, on_text, handling)
        tokens = plain.trace.tokens
        planted, chunk = job.planted(tokens), job.scenario.cluster.prefill_chunk
        if job.needs_drafter:
            await _stream(job, pipeline, job.scenario.scheduler(), planted, None, None, handling)
        prober = Prober(pipeline, Text(job.started.prompt, tokens, job.sampling, planted), chunk)
        acceptance = await _record(job, prober, tokens)
        if rounds:
            await prober.open()
            await prober.measure_round()
        for number in range(max(1, repeats)):
            for _ in range(number * rounds // max(1, repeats), (number + 1) * rounds // max(1, repeats)):
                await prober.measure_round()
            if number < repeats:
                with _log(logs, number) as events:
                    runs.append(await _stream(job, pipeline, job.scenario.scheduler(), planted, events, None))
        if rounds:
            await prober.close()
    costs = Observations(tuple(prober.runs), tuple(prober.floods), tuple(handling), tuple(prober.drafts))
    here = [_is_here(host) for host in job.scenario.execution.hosts or [None] * len(pipeline.stages)]
    cores = max(1, _cores() // job.scenario.execution.threads_per_stage) if any(here) else None
    return Measurement(Observed(costs, rounds, tuple(here), cores, acceptance), tuple(runs))


@contextlib.contextmanager
def _log(logs: Path, number: int) -> Iterator[TextIO]:
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


async def _record(job: _Job, prober: Prober, tokens: tuple[int, ...]) -> AcceptanceTrace:
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
