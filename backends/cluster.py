"""Brings a pipeline up, on this machine and others, and takes it down again whatever happens in between."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from backends.control import ConfigureDrafter, ConfigureStage
from backends.models.loading import fingerprint, open_model
from backends.node import Node
from backends.pipeline import Pipeline
from backends.processes import NodeProcess, Nursery
from backends.transport import split_address
from pipesim.errors import BadInputError, StageFailedError

DRAFTERS = ("ngram", "planted", "layer-skip")
"""Drafters by name; any other name is a draft model's."""


@dataclass(frozen=True, slots=True)
class StagePart:
    """Layers ``[first_layer, last_layer)`` at ``address``; None starts a process here."""

    first_layer: int
    last_layer: int
    address: str | None = None


@dataclass(frozen=True, slots=True)
class DrafterPart:
    """A drafter for texts of up to ``max_context`` tokens, always a process here."""

    drafter: str
    vocabulary: int
    max_context: int
    skip_layers: tuple[int, ...] | None = None

    @property
    def is_model(self) -> bool:
        """Whether drafting takes PyTorch."""
        return self.drafter not in ("ngram", "planted")


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """All that it takes to bring a pipeline up."""

    model: str
    stages: tuple[StagePart, ...]
    drafter: DrafterPart | None = None
    dtype: str = "float32"
    threads: int = 1
    startup_timeout_s: float = 120.0


def stage_parts(layers: Sequence[int], hosts: Sequence[str | None] | None = None) -> tuple[StagePart, ...]:
    """Stages with so many layers each, in order, at ``hosts``."""
    parts, first = [], 0
    for count, host in zip(layers, hosts or [None] * len(layers), strict=True):
        if host is not None:
            split_address(host, "host")
        parts.append(StagePart(first, first + count, host))
        first += count
    used = [part.address for part in parts if part.address]
    for address in used:
        if used.count(address) > 1:
            raise BadInputError(f"host {address} is listed for two stages: each stage needs a server of its own")
    return tuple(parts)


@contextlib.asynccontextmanager
async def running_pipeline(plan: ClusterPlan) -> AsyncIterator[Pipeline]:
    """A connected pipeline; on the way out, no process of ours is left and foreign stages are free again.

    Raises:
        BadInputError: a stage cannot be reached or cannot do what ``plan`` says.
        StageFailedError: a stage died, or is not ready in time.
    """
    pipeline = Pipeline(Pipeline.new_token())
    spawned = sum(part.address is None for part in plan.stages) + (plan.drafter is not None)
    preload = any(part.address is None for part in plan.stages) or (plan.drafter is not None and plan.drafter.is_model)
    nursery = await Nursery.start(preload) if spawned else None
    try:
        try:
            async with asyncio.timeout(plan.startup_timeout_s):
                processes = await nursery.spawn(spawned) if nursery else []
                await _bring_up(pipeline, plan, processes)
        except TimeoutError:
            raise pipeline.failure or _too_late(pipeline, plan.startup_timeout_s) from None
        except StageFailedError as error:  # maybe only the consequence of a known one
            raise pipeline.failure or error from None
        yield pipeline
    finally:
        await pipeline.close()
        if nursery:
            await nursery.stop()


def _too_late(pipeline: Pipeline, timeout_s: float) -> StageFailedError:
    late = ", ".join(node.name for node in pipeline.nodes if not node.ready)
    waiting = f", still waiting for {late}" if late else ""
    return StageFailedError(
        f"the pipeline was not ready within {timeout_s:g} s{waiting}: raise execution.startup_timeout_s"
    )


async def _bring_up(pipeline: Pipeline, plan: ClusterPlan, processes: list[NodeProcess]) -> None:
    """Configures all nodes in parallel; nodes connect when all have loaded."""
    here = iter(processes)
    weights = fingerprint(open_model(plan.model))
    orders: list[ConfigureStage | ConfigureDrafter] = []
    for index, part in enumerate(plan.stages):
        process = next(here) if part.address is None else None
        address = process.address if process else str(part.address)
        name = f"stage {index} ({address}, layers {part.first_layer}..{part.last_layer - 1})"
        pipeline.stages.append(Node(name, address, process, pipeline.node_failed, pipeline.link_lost))
        orders.append(
            ConfigureStage(
                token=pipeline.token,
                stage=index,
                model=plan.model,
                fingerprint=weights,
                first_layer=part.first_layer,
                last_layer=part.last_layer,
                dtype=plan.dtype,
                threads=plan.threads,
            )
        )
    if plan.drafter:
        process = next(here)
        name = f"drafter {plan.drafter.drafter} ({process.address})"
        pipeline.drafter = Node(name, process.address, process, pipeline.node_failed, pipeline.link_lost)
        orders.append(_drafter_order(plan, plan.drafter, pipeline.token))
    nodes = pipeline.nodes
    await asyncio.gather(*(node.configure(order) for node, order in zip(nodes, orders, strict=True)))
    successors = [*(stage.address for stage in pipeline.stages[1:]), None]
    await asyncio.gather(*(stage.connect(to) for stage, to in zip(pipeline.stages, successors, strict=True)))
    await pipeline.connect()
    for node in nodes:  # one at a time: clocks are measured best while nothing else goes on
        await node.watch()


def _drafter_order(plan: ClusterPlan, part: DrafterPart, token: bytes) -> ConfigureDrafter:
    return ConfigureDrafter(
        token=token,
        drafter=part.drafter,
        model=plan.model,
        vocabulary=part.vocabulary,
        max_context=part.max_context,
        dtype=plan.dtype,
        threads=plan.threads,
        skip_layers=part.skip_layers,
    )
