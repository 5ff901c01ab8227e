"""The scenario schema: one description of model, cluster, workload and policy for simulation and real execution.

Units stand in the names: ``_ms`` milliseconds, ``_us`` microseconds, ``_bytes``, ``_gbps`` 10^9 bits per second.
Unknown keys are errors. ``scenario_file.py`` reads scenarios from YAML.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from pipesim.errors import BadInputError
from pipesim.scheduling.policy import Policy, make_policy, policy_class, policy_names
from pipesim.scheduling.scheduler import Scheduler

_LOWEST_TEMPERATURE = 1e-3  # sampling divides by it


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no infinities, no quoted numbers.

    Lists in YAML become tuples here: such fields, and paths, are the only ones that are not strict.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    """The target model."""

    name: str
    """What to load for real: a known name such as smollm2-135m, or a path. A label in simulation."""
    layers: int = Field(ge=1)
    """Transformer layers, spread over the stages."""
    hidden: int = Field(ge=1)
    """Width of the activations that travel between stages, in elements per row."""
    activation_bytes: int = Field(default=4, ge=1)
    """Bytes of one activation element on a link (4: float32)."""
    vocabulary: int = Field(default=32000, ge=3)
    """Number of token ids; simulated text draws from it."""


class _Cost(Section):
    per: Literal["stage", "layer"] = "stage"
    """Whether the times are those of the whole stage, or of each of its layers."""
    kv_us_per_kilocell: float = Field(default=0.0, ge=0)
    """Extra time of each row for every 1000 KV cells of context that it attends to, itself included."""
    prefill_per_token_ms: float | None = Field(default=None, ge=0)
    """Time per prompt row in a prefill run, which takes at least a one-row run's time; null: as any other row."""


class LinearCost(_Cost):
    """Time of a run at a stage: constant_ms + rows * per_token_ms."""

    kind: Literal["linear"]
    constant_ms: float = Field(gt=0)
    """Time that every run takes, whatever its rows: reading the weights."""
    per_token_ms: float = Field(default=0.0, ge=0)
    """Time that every row adds."""


class TableCost(_Cost):
    """Time of a run at a stage, measured at some numbers of rows; linear between and beyond them."""

    kind: Literal["table"]
    rows_ms: dict[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Rows of a run -> its time. Constant under the smallest number given; never falling beyond the largest."""


Cost = Annotated[LinearCost | TableCost, Field(discriminator="kind")]


class Device(Section):
    """A machine that several parts share."""

    name: str
    """Stages, head and drafter refer to it by this name."""
    cores: int = Field(default=1, ge=1)
    """How many stages, or stages and drafter, can compute on it at the same time; more wait in FIFO order."""


class Stage(Section):
    """One stage of the pipeline, or ``repeat`` equal ones in a row."""

    cost: Cost
    """What a run costs here."""
    layers: int | None = Field(default=None, ge=1)
    """Layers of this stage; null: the model's other layers are spread evenly over all stages without a number."""
    device: str | None = None
    """Device it runs on; null: a machine of its own."""
    repeat: int = Field(default=1, ge=1)
    """This many equal stages in a row."""


class Head(Section):
    """The part that runs the scheduler."""

    device: str | None = None
    """Device it runs on; null: a machine of its own."""
    overhead_ms: float = Field(default=0.0, ge=0)
    """Time to handle one event: a run or a draft that came home."""


class Drafter(Section):
    """The part that drafts."""

    device: str | None = None
    """Device it runs on; null: a machine of its own."""
    level_ms: float = Field(ge=0)
    """Time to draft one level of a token tree, all its branches at once."""
    prefill_per_token_ms: float = Field(default=0.0, ge=0)
    """Time per prompt token before the first draft."""


class Link(Section):
    """An ordered channel. Bandwidth occupies it, latency does not."""

    latency_ms: float = Field(default=0.0, ge=0)
    """Propagation time of every message."""
    bandwidth_gbps: float | None = Field(default=None, gt=0)
    """10^9 bits per second; null: without limit."""


class OwnLink(Section):
    """What differs from the data links in general; what is null is as there."""

    latency_ms: float | None = Field(default=None, ge=0)
    """Propagation time of every message."""
    bandwidth_gbps: float | None = Field(default=None, gt=0)
    """10^9 bits per second."""

    def over(self, links: Link) -> Link:
        """The whole link."""
        return Link(
            latency_ms=links.latency_ms if self.latency_ms is None else self.latency_ms,
            bandwidth_gbps=links.bandwidth_gbps if self.bandwidth_gbps is None else self.bandwidth_gbps,
        )


class Hop(OwnLink):
    """A data link that differs from the others; what is null is as everywhere."""

    hop: int = Field(ge=0)
    """Which one: 0 is head to first stage, 1 first to second stage, ..., the last one leads home to the head."""


class Links(Link):
    """All links: latency and bandwidth of the data links, and what differs."""

    hops: tuple[Hop, ...] = Field(default=(), strict=False)
    """Data links that differ."""
    control: OwnLink = OwnLink()
    """Each link from the head directly to a stage, for cancellations; what is null is as the data links."""
    draft: OwnLink = OwnLink()
    """The links from the head to the drafter and back; what is null is as the data links."""


class Cluster(Section):
    """Machines, what runs on them, and the links between."""

    stages: tuple[Stage, ...] = Field(min_length=1, strict=False)
    """The pipeline in order."""
    drafter: Drafter
    """What drafts, and how fast."""
    devices: tuple[Device, ...] = Field(default=(), strict=False)
    """Machines that are shared, or that have several cores."""
    head: Head = Head()
    """What runs the scheduler."""
    links: Links = Links()
    """The network."""
    kv_cells: int | None = Field(default=None, ge=1)
    """KV cells of every stage; null: enough for the text and all that the policy can have in flight."""
    prefill_chunk: int = Field(default=64, ge=1)
    """Prompt tokens per prefill run."""
    prefill_window: int = Field(default=8, ge=1)
    """Prefill runs in flight at once."""


class Workload(Section):
    """What the user asks for."""

    prompt: str | None = None
    """The prompt's text."""
    prompt_tokens: int | None = Field(default=None, ge=1)
    """Simulation: tokens of the prompt; null: as in the recorded trace, or one for every 4 characters of the text."""
    max_new_tokens: int = Field(ge=1)
    """Tokens to generate at most."""
    chat: bool = False
    """Real runs: put the prompt into the model's chat template."""
    ignore_eos: bool = False
    """Real runs: generate on past the model's end-of-text token."""
    temperature: float = Field(default=0.0, ge=0)
    """Real runs: 0 takes the most probable token; otherwise, from 0.001 on, tokens are sampled, reproducibly from the
    seed."""
    top_k: int | None = Field(default=None, ge=1)
    """Real runs: sample among this many most probable tokens."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Real runs: sample among the most probable tokens that reach this probability together."""


class PolicySection(BaseModel):
    """The policy's name and, beside it, its own settings."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """Registered name: autoregressive, speculative, pipeinfer, or one from an installed package."""

    def build(self) -> Policy:
        """The policy itself. Raises BadInputError for an unknown name or setting."""
        return make_policy(self.name, self.model_extra)


class IidAcceptance(Section):
    """Every drafted token is right with the same probability, independently of all others.

    The drafter offers two candidates for each position. Its confidence in the first is uniform around a mean that
    is higher where the candidate is right: that is all a cutoff can go by.
    """

    kind: Literal["iid"]
    rate: float = Field(ge=0, le=1)
    """Probability that the first candidate is what the target says."""
    runner_up: float = Field(default=0.5, ge=0, le=1)
    """Where the first candidate is wrong: probability that the second one is right."""
    confidence_right: float = Field(default=0.8, ge=0, le=1)
    """Mean confidence in a first candidate that is right."""
    confidence_wrong: float = Field(default=0.5, ge=0, le=1)
    """Mean confidence in a first candidate that is wrong."""
    confidence_spread: float = Field(default=0.2, ge=0, le=1)
    """Confidence lies at most this far from its mean, within 0 and 1."""


class TraceAcceptance(Section):
    """Replays the text of a real model pair, with the drafter's candidates for every position."""

    kind: Literal["trace"]
    file: Path = Field(strict=False)
    """JSON: {"prompt_tokens": [..], "tokens": [..], "candidates": [[[token, confidence], ..], ..]}; candidates[i] are
    the drafter's for tokens[i], best first. Relative to the scenario file."""


Acceptance = Annotated[IidAcceptance | TraceAcceptance, Field(discriminator="kind")]


class Execution(Section):
    """Real runs: how the pipeline is brought up."""

    drafter: str = "ngram"
    """ngram (prompt look-up), layer-skip (the target without some layers), planted (known text, wrong as often as
    acceptance.rate says), or a draft model: name or path."""
    skip_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, strict=False)
    """layer-skip: layers to leave out; null: 5, 12, 17 and 25 of 30, the same depths of other models, the ends kept."""
    hosts: tuple[str | None, ...] | None = Field(default=None, strict=False)
    """host:port of a running stage server for each stage, null to start one here; null: start all here."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of weight matrices; activations are always float32."""
    threads_per_stage: int = Field(default=1, ge=1)
    """Compute threads of each stage process."""
    startup_timeout_s: float = Field(default=120.0, gt=0)
    """How long stages may take to load and connect."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage after ``repeat`` and ``layers: null`` are spelled out. ``device`` is None for a machine of its own."""

    name: str
    first_layer: int
    layers: int
    device: str | None
    cost: Cost


class Scenario(Section):
    """A what-if: who generates what, on which machines, by which policy."""

    model: Model
    cluster: Cluster
    workload: Workload
    policy: PolicySection
    acceptance: Acceptance | None = None
    """Simulation: which drafted tokens are right."""
    execution: Execution = Execution()
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Same seed, same bytes out: simulated truth, sampling noise."""

    @model_validator(mode="after")
    def _check_across_sections(self) -> "Scenario":
        problems = list(chain(self._layer_problems(), self._device_problems(), self._other_problems()))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _layer_problems(self) -> Iterator[str]:
        stages = [stage for stage in self.cluster.stages for _ in range(stage.repeat)]
        fixed = sum(stage.layers or 0 for stage in stages)
        open_stages = sum(stage.layers is None for stage in stages)
        left = self.model.layers - fixed
        if left < open_stages:
            yield (
                f"cluster.stages: {len(stages)} stages need at least {fixed + open_stages} layers, "
                f"model.layers is {self.model.layers}: use fewer stages or layers"
            )
        elif left and not open_stages:
            yield (
                f"cluster.stages: the stages' layers sum up to {fixed}, model.layers is {self.model.layers}: "
                "make them equal, or leave one stage's layers out"
            )

    def _device_problems(self) -> Iterator[str]:
        names = [device.name for device in self.cluster.devices]
        for twice in sorted({name for name in names if names.count(name) > 1}):
            yield f"cluster.devices: two devices are named {twice!r}: rename one"
        users: list[tuple[str, str | None]] = [
            ("cluster.head.device", self.cluster.head.device),
            ("cluster.drafter.device", self.cluster.drafter.device),
            *((f"cluster.stages.{i}.device", stage.device) for i, stage in enumerate(self.cluster.stages)),
        ]
        for field, name in users:
            if name is not None and name not in names:
                known = ", ".join(names) or "none"
                yield f"{field}: there is no device {name!r} in cluster.devices (known: {known}): add it"
        used = {name for _, name in users}
        for idle in names:
            if idle not in used and names.count(idle) == 1:
                yield f"cluster.devices: nothing runs on device {idle!r}: remove it, or name it where it is used"

    def _other_problems(self) -> Iterator[str]:
        last_hop = sum(stage.repeat for stage in self.cluster.stages)
        hops = [hop.hop for hop in self.cluster.links.hops]
        for i, hop in enumerate(hops):
            field = f"cluster.links.hops.{i}.hop"
            if hop > last_hop:
                yield f"{field}: there is no hop {hop}, the last one (home to the head) is {last_hop}"
            if hop in hops[:i]:
                yield f"{field}: hop {hop} is described twice: merge the two entries"
        if self.workload.prompt is None and self.workload.prompt_tokens is None:
            recorded = isinstance(self.acceptance, TraceAcceptance)
            if not recorded:
                yield "workload: give a prompt (text) or, for simulation only, prompt_tokens (a number)"
        elif not self.workload.prompt and self.workload.prompt is not None:
            yield "workload.prompt: an empty prompt cannot be continued: give at least one character"
        hosts = self.execution.hosts
        if hosts is not None and len(hosts) != last_hop:
            yield f"execution.hosts: {len(hosts)} hosts for {last_hop} stages: one per stage, null to start it here"
        execution = self.execution
        if execution.skip_layers is not None and execution.drafter != "layer-skip":
            yield (
                f"execution.skip_layers: only layer-skip leaves layers out, execution.drafter is "
                f"{execution.drafter!r}: remove it, or change the drafter"
            )
        if 0 < self.workload.temperature < _LOWEST_TEMPERATURE:
            yield (
                f"workload.temperature = {self.workload.temperature}: "
                f"use 0 (the most probable token) or at least {_LOWEST_TEMPERATURE}"
            )
        try:
            self.policy.build()
        except BadInputError as problem:
            yield str(problem)

    def stages(self) -> tuple[StagePlan, ...]:
        """The pipeline's stages in order, each with its layers."""
        listed = [stage for stage in self.cluster.stages for _ in range(stage.repeat)]
        open_stages = sum(stage.layers is None for stage in listed)
        left = self.model.layers - sum(stage.layers or 0 for stage in listed)
        plans: list[StagePlan] = []
        first = 0
        for index, stage in enumerate(listed):
            layers = stage.layers
            if layers is None:
                layers = -(-left // open_stages)
                left, open_stages = left - layers, open_stages - 1
            plans.append(StagePlan(f"stage {index}", first, layers, stage.device, stage.cost))
            first += layers
        return tuple(plans)

    def hops(self) -> tuple[Link, ...]:
        """The data links in order: head to first stage, between stages, last stage to head."""
        links = self.cluster.links
        special = {hop.hop: hop for hop in links.hops}
        return tuple(special.get(index, OwnLink()).over(links) for index in range(len(self.stages()) + 1))

    def scheduler(self) -> Scheduler:
        """A fresh scheduler with this scenario's policy and limits."""
        cluster = self.cluster
        return Scheduler(self.policy.build(), cluster.kv_cells, cluster.prefill_chunk, cluster.prefill_window)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of scenario files, each known policy with its own settings."""
    schema = Scenario.model_json_schema()
    schema["$defs"]["PolicySection"] = {"oneOf": [_policy_schema(name) for name in policy_names()]}
    return schema


def _policy_schema(name: str) -> dict[str, Any]:
    policy = policy_class(name)
    settings = TypeAdapter(policy).json_schema().get("properties", {})
    return {
        "title": name,
        "description": inspect.getdoc(policy),
        "type": "object",
        "properties": {"name": {"const": name}, **settings},
        "required": ["name"],
        "additionalProperties": False,
    }
