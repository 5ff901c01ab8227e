"""What follows from a scenario's sections for each stage and the drafter: layers, cost model, memory."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pipesim.hardware.costs import CostModel, Roofline, StagePart, micro_batch_slope
from pipesim.hardware.placement import place_layers
from pipesim.scenario.cluster import Drafter, Stage
from pipesim.scenario.costs import Cost, RooflineCost
from pipesim.scenario.model import Model, ModelShapeSection
from pipesim.scheduling.runs import RunKind

SLOPE_ROWS = 4
"""Rows of the run by which a stage's micro-batch cost slope is reported: micro-batches of 1-4 tokens work best."""
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage after ``repeat`` and open ``layers`` are spelled out.

    ``device`` is None for a machine of its own; ``model`` is needed by roofline costs; ``last``: it has the LM head.
    """

    name: str
    first_layer: int
    layers: int
    device: str | None
    cost: Cost
    model: Model | None = None
    last: bool = False

    def part(self) -> StagePart:
        """What of the model it holds."""
        assert self.model is not None
        return self.model.part(self.layers, self.first_layer == 0, self.last, self.model.activation_bytes)

    def cost_model(self) -> CostModel:
        """The time of runs here."""
        if isinstance(self.cost, RooflineCost):
            assert self.model is not None
            return Roofline(self.part(), self.cost.machine(self.model.quantization))
        return self.cost.model(self.layers, self.last)

    def memory_bytes(self, kv_cells: int) -> float | None:
        """What each of its devices must hold; None unless its cost is a roofline, which knows the model's bytes."""
        if not isinstance(self.cost, RooflineCost):
            return None
        return self.part().memory_bytes(kv_cells, self.cost.tensor_parallel)


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
    """The drafter's times: of one level of a tree, and of each prompt token before the first draft."""

    level_ms: float
    prefill_per_token_ms: float


def summarize(plan: StagePlan, kv_cells: int, context: float) -> StageSummary:
    """A stage in figures."""
    cost, memory = plan.cost_model(), plan.memory_bytes(kv_cells)
    device = plan.cost.profile if plan.device is None and isinstance(plan.cost, RooflineCost) else plan.device
    return StageSummary(
        name=plan.name,
        layers=plan.layers,
        device=device,
        memory_bytes=None if memory is None else round(memory),
        run_ms=1e3 * cost.seconds(RunKind.CANONICAL, 1, context),
        slope_c=micro_batch_slope(cost, SLOPE_ROWS, context),
        slope_rows=SLOPE_ROWS,
    )


def plan_stages(
    stages: Sequence[Stage], model: Model, kv_cells: int, context: float, head: tuple[str | None, float]
) -> tuple[StagePlan, ...]:
    """The pipeline's stages in order, each with its layers; too few in total if memory has no room for ``auto``.

    Args:
        stages: as the scenario lists them.
        model: the target model.
        kv_cells: of every stage.
        context: cells to which the one-row runs attend by which ``layers: auto`` compares stages.
        head: the head's device, None for its own, and the seconds it takes there for each run.
    """
    listed = [stage for stage in stages for _ in range(stage.repeat)]
    plans = [
        StagePlan(f"stage {index}", min(index, 1), 1, stage.device, stage.cost, model, index == len(listed) - 1)
        for index, stage in enumerate(listed)
    ]
    wanted = [stage.layers for stage in listed]
    numbers = _placed(plans, wanted, kv_cells, context, head) if "auto" in wanted else _spread(wanted, model.layers)
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
    plans: Sequence[StagePlan],
    wanted: Sequence[int | str | None],
    kv_cells: int,
    context: float,
    head: tuple[str | None, float],
) -> list[int]:
    """Stages with ``auto`` get what the others leave such that the slowest of them is as fast as can be."""
    numbers = [number if isinstance(number, int) else 1 for number in wanted]
    open_stages = [stage for stage, number in enumerate(wanted) if not isinstance(number, int)]

    def seconds(stage: int, layers: int) -> float:
        plan = plans[stage]
        time = replace(plan, layers=layers).cost_model().seconds(RunKind.CANONICAL, 1, context)
        return time + (head[1] if plan.device is not None and plan.device == head[0] else 0.0)

    def has_room(index: int, placed: Sequence[int]) -> bool:
        for stage, layers in zip(open_stages, placed, strict=True):
            numbers[stage] = layers
        grown = open_stages[index]
        device = plans[grown].device
        neighbours = [s for s, plan in enumerate(plans) if s == grown or (device is not None and plan.device == device)]
        together = [replace(plans[s], layers=numbers[s] + (s == grown)) for s in neighbours]
        return not any(memory_problems(together, kv_cells))

    model = plans[0].model
    assert model is not None
    left = model.layers - sum(number for number in wanted if isinstance(number, int))
    placed = place_layers(left, [partial(seconds, stage) for stage in open_stages], has_room)
    for stage, layers in zip(open_stages, placed, strict=True):
        numbers[stage] = layers
    return numbers


def memory_problems(plans: Sequence[StagePlan], kv_cells: int) -> Iterator[str]:
    """One line for each device, shared or a stage's own, that cannot hold what lies on it."""
    shared: defaultdict[str, list[StagePlan]] = defaultdict(list)
    for plan in plans:
        shared[plan.device or plan.name].append(plan)
    for device, users in shared.items():
        needed = sum(plan.memory_bytes(kv_cells) or 0.0 for plan in users)
        limits = [plan.cost.memory_bytes() for plan in users if isinstance(plan.cost, RooflineCost)]
        available = min((limit for limit in limits if limit is not None), default=None)
        if available is not None and needed > available:
            names = ", ".join(plan.name for plan in users)
            where = f" on {device!r}" if device != names else ""
            layers = "+".join(str(plan.layers) for plan in users)
            yield f"cluster.stages: {names}{where} with {layers} layers {_too_much(needed, available, kv_cells)}"


def draft_plan(drafter: Drafter, prompt_tokens: int, context: float, branches: int) -> DraftPlan:
    """The drafter's times; a level of a tree is one run of as many rows as the tree may have branches."""
    if drafter.model is None or drafter.cost is None:
        return DraftPlan(drafter.level_ms or 0.0, drafter.prefill_per_token_ms)
    part = drafter.model.part(drafter.model.layers, embeds=True, predicts=True)
    cost = Roofline(part, drafter.cost.machine(drafter.model.quantization))
    rows = max(1, prompt_tokens)
    prefill = cost.seconds(RunKind.PREFILL, rows, (rows + 1) / 2) / rows
    return DraftPlan(1e3 * cost.seconds(RunKind.CANONICAL, branches, context), 1e3 * prefill)


def drafter_problems(drafter: Drafter, kv_cells: int) -> Iterator[str]:
    """One line if the draft model is not fully described or does not fit."""
    if drafter.model is None or drafter.cost is None:
        return
    problems = list(roofline_problems("cluster.drafter.cost", drafter.cost, "cluster.drafter.model", drafter.model))
    yield from problems
    available = drafter.cost.memory_bytes()
    if problems or available is None:
        return
    part = drafter.model.part(drafter.model.layers, embeds=True, predicts=True)
    needed = part.memory_bytes(kv_cells, drafter.cost.tensor_parallel)
    if needed > available:
        yield f"cluster.drafter: the draft model {_too_much(needed, available, kv_cells)}"


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


def _too_much(needed: float, available: float, kv_cells: int) -> str:
    return (
        f"needs {needed / _GIB:.2f} GiB of each device (weights and {kv_cells} KV cells), {available / _GIB:.2f} GiB "
        f"are available: {(needed - available) / _GIB:.2f} GiB too much: use more or larger devices, or a smaller "
        "quantization"
    )
