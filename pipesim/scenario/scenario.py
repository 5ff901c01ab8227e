"""A whole scenario, what must hold across its sections, and its JSON Schema."""

import contextlib
import inspect
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, model_validator

from pipesim.errors import BadInputError
from pipesim.scenario.acceptance import Acceptance, TraceAcceptance
from pipesim.scenario.calibration import CalibrationSource
from pipesim.scenario.cluster import Cluster
from pipesim.scenario.costs import RooflineCost
from pipesim.scenario.faults import Fault, JitterFault, LossFault, fault_problems
from pipesim.scenario.memory import Load, memory_problems
from pipesim.scenario.model import Model
from pipesim.scenario.network import Link, LinkPlan, link_plans
from pipesim.scenario.plans import (
    DraftPlan,
    StagePlan,
    StageSummary,
    Surroundings,
    draft_load,
    draft_plan,
    plan_stages,
    roofline_problems,
    summarize,
)
from pipesim.scenario.section import Section
from pipesim.scenario.workload import ACTIVATION_BYTES, SCALE_BYTES, Execution, PolicySection, Workload
from pipesim.scheduling.policy import make_policy, policy_class, policy_names
from pipesim.scheduling.scheduler import Scheduler

_CHARACTERS_PER_TOKEN = 4
_LOWEST_TEMPERATURE = 1e-3  # sampling divides by it


class Scenario(Section):
    """A what-if: who generates what, on which machines, by which policy."""

    model: Model
    cluster: Cluster
    workload: Workload
    policy: PolicySection
    policies: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings by policy name: what ``policy`` leaves open comes from here, so that each policy can be named alone and
    meets the others at its best."""
    acceptance: Acceptance | None = None
    """Simulation: which drafted tokens are right."""
    execution: Execution = Execution()
    faults: tuple[Fault, ...] = Field(default=(), strict=False)
    """What goes wrong, and when: all of it in simulations and emulated clusters, crashes in other real runs as well."""
    calibration: CalibrationSource = None
    """A profile that `pipesim calibrate` wrote: what was measured there takes the place of what model, cluster and
    execution say here, and --set changes that. In a profile itself: the evidence."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Same seed, same bytes out: simulated truth, sampling noise."""

    @model_validator(mode="before")
    @classmethod
    def _complete_the_policy(cls, raw: Any) -> Any:
        match raw:
            case {"policy": {"name": str(name)} as policy, "policies": dict(policies)}:
                settings = policies.get(name)
                return {**raw, "policy": {**settings, **policy}} if isinstance(settings, dict) else raw
        return raw

    @model_validator(mode="before")
    @classmethod
    def _complete_the_model(cls, raw: Any) -> Any:
        match raw:
            case {"model": dict(model), "execution": {"dtype": str(dtype)}} if dtype in ACTIVATION_BYTES:
                if model.get("profile") is None:
                    return {**raw, "model": {"activation_bytes": ACTIVATION_BYTES[dtype], **model}}
        return raw

    @model_validator(mode="after")
    def _check_across_sections(self) -> "Scenario":
        problems = list(
            chain(
                self._layer_problems(),
                self._device_problems(),
                self._link_problems(),
                fault_problems(self.faults, sum(stage.repeat for stage in self.cluster.stages), self.links()),
                self._other_problems(),
            )
        )
        problems = problems or list(self._memory_problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _layer_problems(self) -> Iterator[str]:
        stages = [stage for stage in self.cluster.stages for _ in range(stage.repeat)]
        numbers = [stage.layers for stage in stages if isinstance(stage.layers, int)]
        fixed, open_stages = sum(numbers), len(stages) - len(numbers)
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
        if {None, "auto"} <= {stage.layers for stage in stages}:
            yield "cluster.stages: layers are auto in some stages and left out in others: write auto in all of them"
        for index, stage in enumerate(self.cluster.stages):
            cost, field = stage.cost, f"cluster.stages.{index}"
            if stage.layers == "auto" and not isinstance(cost, RooflineCost) and cost.per == "stage":
                yield f"{field}.cost.per = 'stage': layers: auto needs the time of a layer: use per: layer"
            yield from roofline_problems(f"{field}.cost", cost, "model", self.model)
        drafter = self.cluster.drafter
        if drafter.model and drafter.cost:
            yield from roofline_problems("cluster.drafter.cost", drafter.cost, "cluster.drafter.model", drafter.model)

    def _memory_problems(self) -> Iterator[str]:
        plans = self.stages()
        placed = sum(plan.layers for plan in plans)
        if placed < self.model.layers:
            yield (
                f"cluster.stages: layers: auto finds memory for {placed} of {self.model.layers} layers: "
                "use more or larger devices, or a smaller quantization"
            )
        loads = (*(plan.load(self.kv_cells()) for plan in plans), self._draft_load())
        yield from memory_problems(load for load in loads if load)

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

    def _link_problems(self) -> Iterator[str]:
        last_hop = sum(stage.repeat for stage in self.cluster.stages)
        hops = [hop.hop for hop in self.cluster.links.hops]
        for i, hop in enumerate(hops):
            field = f"cluster.links.hops.{i}.hop"
            if hop > last_hop:
                yield f"{field}: there is no hop {hop}, the last one (home to the head) is {last_hop}"
            if hop in hops[:i]:
                yield f"{field}: hop {hop} is described twice: merge the two entries"
        yield from self.cluster.links.problems()

    def _other_problems(self) -> Iterator[str]:
        if isinstance(self.calibration, Path):
            yield f"calibration = {self.calibration}: only scenario files and --set can name a profile"
        elif self.calibration:
            yield from self.cluster.links.shadowed()
        last_hop = sum(stage.repeat for stage in self.cluster.stages)
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
        if execution.spares and not any(hosts or ()):
            yield "execution.spares: they take the place of lost hosts, and execution.hosts names none: remove them"
        devices = len(execution.devices(last_hop))
        if devices != last_hop:
            yield f"execution.device: {devices} devices for {last_hop} stages: one per stage, or one for all"
        if execution.skip_layers is not None and execution.drafter != "layer-skip":
            yield (
                f"execution.skip_layers: only layer-skip leaves layers out, execution.drafter is "
                f"{execution.drafter!r}: remove it, or change the drafter"
            )
        if execution.stand_in is not None and not execution.emulate:
            yield (
                f"execution.stand_in = {execution.stand_in!r}: only an emulated cluster takes another model's times: "
                "set execution.emulate, or name the model in model.name"
            )
        if 0 < self.workload.temperature < _LOWEST_TEMPERATURE:
            yield (
                f"workload.temperature = {self.workload.temperature}: "
                f"use 0 (the most probable token) or at least {_LOWEST_TEMPERATURE}"
            )
        for name, settings in self.policies.items():
            try:
                make_policy(name, settings)
            except BadInputError as problem:
                yield f"policies.{name}: {problem}"
        try:
            self.policy.build()
        except BadInputError as problem:
            yield str(problem)

    def with_seeds(self, count: int) -> list["Scenario"]:
        """This scenario, and the same under each of the ``count - 1`` seeds that follow. Raises BadInputError."""
        if self.seed + count > 2**64:
            raise BadInputError(f"seed = {self.seed}: the last of {count} seeds is above 2^64 - 1, use a smaller one")
        return [self.model_copy(update={"seed": self.seed + number}) for number in range(count)]

    def stages(self) -> tuple[StagePlan, ...]:
        """The pipeline's stages in order, each with its layers."""
        head = self.cluster.head
        around = Surroundings(self.kv_cells(), self._middle(), head.device, head.overhead_ms * 1e-3, self._draft_load())
        return plan_stages(self.cluster.stages, self.model, around)

    def stage_summaries(self) -> tuple[StageSummary, ...]:
        """What each stage is, for reports."""
        return tuple(summarize(plan, self.kv_cells(), self._middle()) for plan in self.stages())

    def drafter(self, branches: int | None = None) -> DraftPlan:
        """The drafter's times, given or from its model; for trees of ``branches``, None: of as many as the policy's."""
        branches = branches or self.policy.build().limits.branches
        return draft_plan(self.cluster.drafter, self.prompt_length(), self._middle(), branches)

    def row_bytes(self) -> int:
        """What the activations of one row take on a link between stages."""
        if self.execution.activation_compression == "none":
            return self.model.hidden * self.model.activation_bytes
        return self.model.hidden + SCALE_BYTES

    def kv_cells(self) -> int:
        """KV cells of every stage."""
        given = self.cluster.kv_cells
        return self.policy.build().limits.kv_cells(self._text()) if given is None else given

    def prompt_length(self) -> int:
        """Tokens of the prompt: as given, as in the recorded trace, or estimated from the text's length."""
        workload, acceptance = self.workload, self.acceptance
        if workload.prompt_tokens is None and isinstance(acceptance, TraceAcceptance):
            with contextlib.suppress(BadInputError):  # a real run may be about to record it; no simulation starts
                return len(acceptance.recorded.prompt_tokens)
        return workload.prompt_tokens or -(-len(workload.prompt or "") // _CHARACTERS_PER_TOKEN)

    def _draft_load(self) -> Load | None:
        return draft_load(self.cluster.drafter, self._text())

    def _text(self) -> int:
        return self.prompt_length() + self.workload.max_new_tokens

    def _middle(self) -> float:
        """Cells to which a row attends in the middle of the text."""
        return self.prompt_length() + self.workload.max_new_tokens / 2

    def hops(self) -> tuple[Link, ...]:
        """The data links in order: head to first stage, between stages, last stage to head."""
        return tuple(plan.link for plan in self.links() if plan.group == "data")

    def links(self) -> tuple[LinkPlan, ...]:
        """All links: data links as ``hops``, a control link to each stage, to the drafter and back."""
        cluster = self.cluster
        devices = [stage.device for stage in cluster.stages for _ in range(stage.repeat)]
        return link_plans(cluster.links, cluster.head.device, devices, cluster.drafter.device)

    def links_draw(self) -> bool:
        """Whether links leave something to chance, drawn with the seed."""
        drawn = any(plan.link.jitter_ms or plan.link.loss for plan in self.links())
        return drawn or any(isinstance(fault, JitterFault | LossFault) for fault in self.faults)

    def scheduler(self) -> Scheduler:
        """A fresh scheduler with this scenario's policy and limits."""
        cluster = self.cluster
        return Scheduler(self.policy.build(), cluster.kv_cells, cluster.prefill_chunk, cluster.prefill_window)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of scenario files, each known policy with its own settings."""
    schema = Scenario.model_json_schema()
    schemas = {name: _policy_schema(name) for name in policy_names()}
    schema["$defs"]["PolicySection"] = {"oneOf": list(schemas.values())}
    schema["properties"]["policies"] |= {
        "properties": {name: _without_name(one) for name, one in schemas.items()},
        "additionalProperties": False,
    }
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


def _without_name(policy: dict[str, Any]) -> dict[str, Any]:
    settings = {key: field for key, field in policy["properties"].items() if key != "name"}
    return {**policy, "properties": settings, "required": []}
