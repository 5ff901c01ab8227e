"""A scenario checked against its model: all that a real run of it takes, and all that can be wrong without starting."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from backends.chaos import check_faults
from backends.cluster import DRAFTERS, ClusterPlan, DrafterPart, Recovery, stage_parts
from backends.control import Planted
from backends.emulation import PacedHead, emulated_parts, to_bytes
from backends.models.config import ModelConfig
from backends.models.finding import KNOWN_MODELS, is_hub_name
from backends.models.loading import open_model
from backends.placement import split_layers
from backends.sampling import Sampling
from backends.text_stream import TextStream
from backends.tokenizer import ModelTokenizer, open_tokenizer
from pipesim.errors import BadInputError
from pipesim.recorder import Recorder, TextMeter
from pipesim.scenario import ACTIVATION_BYTES, IidAcceptance, MarkovAcceptance, Scenario
from pipesim.scheduling.events import GenerationStarted
from pipesim.scheduling.policies.autoregressive import Autoregressive
from pipesim.scheduling.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Job:
    """A checked scenario. ``model`` is the name by which other processes find it; the head begins with ``started``."""

    scenario: Scenario
    model: str
    config: ModelConfig
    tokenizer: ModelTokenizer
    started: GenerationStarted
    sampling: Sampling
    records_acceptance: bool = False

    @property
    def needs_drafter(self) -> bool:
        """Whether anybody asks for drafts."""
        return self.records_acceptance or self.scenario.policy.build().limits.nodes > 0

    @property
    def is_planted(self) -> bool:
        """Whether the drafter must know the text beforehand."""
        return self.needs_drafter and self.scenario.execution.drafter == "planted"

    def cluster(self) -> ClusterPlan:
        """The pipeline that it runs on."""
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
            startup_timeout_s=execution.startup_limit_s,
            recovery=Recovery(execution.recovery.attempts, execution.recovery.timeout_s),
            spares=execution.spares,
        )

    def paced(self) -> PacedHead | None:
        """The head of the emulated cluster, if it is one."""
        return PacedHead(self.scenario) if self.scenario.execution.emulate else None

    def stream(self) -> TextStream:
        """Turns its tokens into text."""
        return self.tokenizer.stream(self.scenario.workload.stop)

    def plain(self) -> Scheduler:
        """A scheduler for plain decoding of the same text."""
        cluster = self.scenario.cluster
        return Scheduler(Autoregressive(), None, cluster.prefill_chunk, cluster.prefill_window)

    def recorder(self, scheduler: Scheduler, events: TextIO | None = None) -> Recorder:
        """Keeps what happens to each run."""
        return Recorder(scheduler, self.scenario.seed, [plan.name for plan in self.scenario.stages()], events)

    def meter(self, scheduler: Scheduler, events: TextIO | None = None) -> TextMeter:
        """Keeps the text and figures alone."""
        return TextMeter(scheduler, self.scenario.seed, len(self.scenario.stages()), events)

    def planted(self, continuation: tuple[int, ...]) -> Planted | None:
        """What a planted drafter must know, if the scenario asks for one."""
        acceptance = self.scenario.acceptance
        if not self.is_planted or not isinstance(acceptance, IidAcceptance | MarkovAcceptance):
            return None
        return Planted((*self.started.prompt, *continuation), acceptance.model_dump())


def prepare(scenario: Scenario) -> Job:
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
    return Job(scenario, model, config, tokenizer, started, sampling)


def _check_devices(scenario: Scenario) -> None:
    """Raises BadInputError for a device that this machine has not; other machines check theirs."""
    execution, stages = scenario.execution, len(scenario.stages())
    hosts = execution.hosts or (None,) * stages
    for host, device in zip(hosts, execution.devices(stages), strict=True):
        if host is None:
            check_device("execution.device", device or "cpu", execution.dtype)
    check_device("execution.drafter_device", execution.drafter_device, execution.dtype)


def check_device(field: str, device: str, dtype: str) -> None:
    """Raises BadInputError, naming ``field``, if this machine has no such device."""
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
