"""What follows from a scenario's sections for each stage and the drafter: layers, cost model, memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipesim.hardware.costs import CostModel, ModelPart, Roofline, micro_batch_slope
from pipesim.hardware.placement import place_layers
from pipesim.scenario.cluster import Drafter, Stage
from pipesim.scenario.costs import Cost, RooflineCost
from pipesim.scenario.memory import Load, limit
from pipesim.scenario.model import Model, ModelShapeSection
from pipesim.scheduling.runs import RunKind

SLOPE_ROWS = 4
"""Rows of the run by which a stage's micro-batch cost slope is reported: micro-batches of 1-4 tokens work best."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage after ``repeat`` and open ``layers`` are spelled out.

    ``device`` is None for a machine of its own; ``model`` is needed by roofline costs; ``last``: it has the LM head;
    ``void_ms``: what a dead run costs.
    """

    name: str
    first_layer: int
    layers: int
    device: str | None
    cost: Cost
    model: Model | None = None
    last: bool = False
    void_ms: float = 0.0

    def part(self) -> ModelPart:
        """What of the model it holds."""
        assert self.model is not None
        return self.model.part(self.layers, self.first_layer == 0, self.last, self.model.activation_bytes)

    def cost_model(self) -> CostModel:
        """The time of runs here."""
        if isinstance(self.cost, RooflineCost):
            assert self.model is not None
            return Roofline(self.part(), self.cost.machine(self.model.quantization))
        return self.cost.model(self.layers, self.last)

    def load(self, kv_cells: int) -> Load | None:
        """What it needs of each device's memory; None unless its cost is a roofline, which knows the model's bytes."""
        if not isinstance(self.cost, RooflineCost):
            return None
        needed = self.part().memory_bytes(kv_cells, self.cost.tensor_parallel)
        return Load(f"{self.name} ({self.layers} layers)", self.device, needed, self.cost.memory_bytes())


@dataclass(frozen=True, slots=True)
class StageSummary:
    """What a stage is, for reports.

    Attributes:
        device: where it runs: a device of the cluster or, on a machine of its own, that machine's profile.
        memory_bytes: weights and KV cells on each device; None where the cost does not know the model's bytes.
        run_ms: time of a one-row run in the middle of the text.
        slope_c: micro-batch cost slope there, by a run of ``slope_rows`` rows.
    """

    name: str
    layers: int
    device: str | None
    memory_bytes: int | None
    run_ms: float
    slope_c: float
    slope_rows: int


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """The drafter's times.

    Attributes:
        level_ms: of one level of a tree.
        prefill_per_token_ms: of each prompt token before the first draft.
        request_ms: of every request, on top of its levels.
        cell_ms: what a token of text adds to each level after it.
    """

    level_ms: float
    prefill_per_token_ms: float
    request_ms: float = 0.0
    cell_ms: float = 0.0


def summarize(plan: StagePlan, kv_cells: int, context: float) -> StageSummary:
    """A stage in figures."""
    cost, load = plan.cost_model(), plan.load(kv_cells)
    device = plan.cost.profile if plan.device is None and isinstance(plan.cost, RooflineCost) else plan.device
    return StageSummary(
        name=plan.name,
        layers=plan.layers,
        device=device,
        memory_bytes=None if load is None else round(load.needed),
        run_ms=1e3 * cost.seconds(RunKind.CANONICAL, 1, context),
        slope_c=micro_batch_slope(cost, SLOPE_ROWS, context),
        slope_rows=SLOPE_ROWS,
    )


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What ``layers: auto`` takes into account beside the stages.

    Attributes:
        kv_cells: of every stage.
        context: cells to which the one-row runs attend by which stages are compared.
        head: the head's device, None for its own.
        head_seconds: what the head takes there for each run.
        drafter: what the draft model needs, if that is known.
    """

    kv_cells: int
    context: float
    head: str | None
    head_seconds: float
    drafter: Load | None


def plan_stages(stages: Sequence[Stage], model: Model, around: Surroundings) -> tuple[StagePlan, ...]:
    """The pipeline's stages in order, each with its layers; too few in total if memory has no room for ``auto``."""
    listed = [stage for stage in stages for _ in range(stage.repeat)]
    plans = [
        StagePlan(
            *(f"stage {index}", min(index, 1), 1, stage.device, stage.cost, model, index == len(listed) - 1),
            void_ms=stage.void_ms,
        )
        for index, stage in enumerate(listed)
    ]
    wanted = [stage.layers for stage in listed]
    numbers = _placed(plans, wanted, model.layers, around) if "auto" in wanted else _spread(wanted, model.layers)
    firsts = (sum(numbers[:index]) for index in range(len(numbers)))
    return tuple(
        replace(plan, layers=number, first_layer=first)
        for plan, number, first in zip(plans, numbers, firsts, strict=True)
    )


def _spread(wanted: Sequence[int | str | None], layers: int) -> list[int]:
    """Open stages get what the others leave, evenly."""
    left, stages = layers - sum(number for number in wanted if isinstance(number, int)), wanted.count(None)
    numbers = []
    for number in wanted:
        if not isinstance(number, int):
            number = -(-left // stages)
            left, stages = left - number, stages - 1
        numbers.append(number)
    return numbers


def _placed(
    plans: Sequence[StagePlan], wanted: Sequence[int | str | None], layers: int, around: Surroundings
) -> list[int]:
    """Stages with ``auto`` get what the others leave such that the slowest of them is as fast as can be."""
    numbers = {stage: number for stage, number in enumerate(wanted) if isinstance(number, int)}
    left = layers - sum(numbers.values())
    open_stages = [stage for stage in range(len(plans)) if stage not in numbers]
    loads = [plan.load(around.kv_cells) for plan in plans]
    needs = [
        _by_layers(plan, lambda plan: load.needed if (load := plan.load(around.kv_cells)) else 0.0) for plan in plans
    ]

    def seconds(plan: StagePlan) -> float:
        with_head = plan.device is not None and plan.device == around.head
        time = plan.cost_model().seconds(RunKind.CANONICAL, 1, around.context)
        return time + (around.head_seconds if with_head else 0.0)

    def has_room(index: int, placed: Sequence[int]) -> bool:
        grown = open_stages[index]
        device = plans[grown].device
        now = {**numbers, **dict(zip(open_stages, placed, strict=True))}
        now[grown] += 1
        here = [stage for stage in now if stage == grown or (device is not None and plans[stage].device == device)]
        others = [around.drafter] if around.drafter and device is not None and around.drafter.device == device else []
        needed = sum(needs[stage](now[stage]) for stage in here) + sum(load.needed for load in others)
        return needed <= limit([*others, *(load for stage in here if (load := loads[stage]))])

    placed = place_layers(left, [_by_layers(plans[stage], seconds) for stage in open_stages], has_room)
    numbers.update(zip(open_stages, placed, strict=True))
    return [numbers[stage] for stage in range(len(plans))]


def _by_layers(plan: StagePlan, value: Callable[[StagePlan], float]) -> Callable[[int], float]:
    """A stage's time or size by the number of its layers: all of ours are a constant and an equal part per layer."""
    one, two = (value(replace(plan, layers=layers)) for layers in (1, 2))
    return lambda layers: one + (layers - 1) * (two - one)


def draft_plan(drafter: Drafter, prompt_tokens: int, context: float, branches: int) -> DraftPlan:
    """The drafter's times; a level of a tree is one run of as many rows as the tree may have branches."""
    if drafter.model is None or drafter.cost is None:
        cell_ms = drafter.kv_us_per_kilocell * 1e-6
        return DraftPlan(drafter.level_ms or 0.0, drafter.prefill_per_token_ms, drafter.request_ms, cell_ms)
    part = drafter.model.part(drafter.model.layers, embeds=True, predicts=True)
    cost = Roofline(part, drafter.cost.machine(drafter.model.quantization))
    rows = max(1, prompt_tokens)
    prefill = cost.seconds(RunKind.PREFILL, rows, (rows + 1) / 2) / rows
    level = cost.seconds(RunKind.CANONICAL, branches, context)
    return DraftPlan(1e3 * level, 1e3 * prefill, drafter.request_ms)


def draft_load(drafter: Drafter, tokens: int) -> Load | None:
    """What the draft model needs of its device's memory for a text of so many tokens; None if it is not described."""
    if drafter.model is None or drafter.cost is None:
        return None
    part = drafter.model.part(drafter.model.layers, embeds=True, predicts=True)
    needed = part.memory_bytes(tokens, drafter.cost.tensor_parallel)
    return Load("the draft model", drafter.device, needed, drafter.cost.memory_bytes())


def roofline_problems(field: str, cost: Cost, model_field: str, model: ModelShapeSection) -> Iterator[str]:
    """What a roofline cost lacks in the model section, or cannot divide."""
    if not isinstance(cost, RooflineCost):
        return
    missing = model.missing()
    if missing:
        yield f"{model_field}.{missing[0]}: missing, {field}.kind = roofline needs it: add it, or {model_field}.profile"
    elif model.heads and model.heads % cost.tensor_parallel:
        yield (
            f"{field}.tensor_parallel = {cost.tensor_parallel}: {model_field} has {model.heads} heads, "
            "which do not divide among so many devices"
        )
