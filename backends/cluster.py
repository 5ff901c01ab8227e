"""Brings a pipeline up, on this machine and others, replaces what it loses, and takes it down whatever happens."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from backends.control import ConfigureDrafter, ConfigureStage
from backends.frames import Compression
from backends.logs import event
from backends.models.loading import fingerprint, open_model
from backends.models.native import library
from backends.node import Node
from backends.pipeline import Pipeline, together
from backends.processes import NodeProcess, Nursery
from backends.transport import split_address
from pipesim.errors import BadInputError, PipesimError, StageFailedError

_log = logging.getLogger(__name__)
_TRY_AGAIN_S = 0.25
_RETURN_S = 10.0
"""A lost server may come back to its address for so long; where there is a spare, that one takes over then."""
DRAFTERS = ("ngram", "planted", "layer-skip")
"""Drafters by name; any other name is a draft model's."""


@dataclass(frozen=True, slots=True)
class StagePart:
    """Layers ``[first_layer, last_layer)`` at ``address``; None starts a process here.

    ``device`` is where it computes, None for what its server was started with: cpu here.
    """

    first_layer: int
    last_layer: int
    address: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class DrafterPart:
    """A drafter for texts of up to ``max_context`` tokens, always a process here."""

    drafter: str
    vocabulary: int
    max_context: int
    skip_layers: tuple[int, ...] | None = None
    device: str = "cpu"

    @property
    def is_model(self) -> bool:
        """Whether drafting takes PyTorch."""
        return self.drafter not in ("ngram", "planted")


@dataclass(frozen=True, slots=True)
class Recovery:
    """A broken pipeline is restored up to ``attempts`` times in a row, each of which may take ``timeout_s``."""

    attempts: int = 3
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """All that it takes to bring a pipeline up, and to replace what it loses.

    ``emulated`` are the parts of an emulated cluster, stages in order and the drafter: see ``emulation.to_bytes``.
    ``spares`` are addresses of servers that take the place of lost ones, in this order.
    """

    model: str
    stages: tuple[StagePart, ...]
    drafter: DrafterPart | None = None
    dtype: str = "float32"
    kernels: str = "auto"
    compression: Compression = "none"
    threads: int = 1
    emulated: tuple[bytes, ...] = ()
    startup_timeout_s: float = 120.0
    recovery: Recovery = Recovery()
    spares: tuple[str, ...] = ()

    @property
    def wants_native_kernels(self) -> bool:
        """Whether processes here will look for them."""
        devices = [part.device or "cpu" for part in self.stages if part.address is None]
        if self.drafter and self.drafter.is_model:
            devices.append(self.drafter.device)
        return self.kernels in ("auto", "native") and self.dtype != "float16" and "cpu" in devices


def stage_parts(
    layers: Sequence[int], hosts: Sequence[str | None] | None = None, devices: Sequence[str | None] | None = None
) -> tuple[StagePart, ...]:
    """Stages with so many layers each, in order, at ``hosts``, on ``devices``."""
    parts, first, nothing = list[StagePart](), 0, [None] * len(layers)
    for count, host, device in zip(layers, hosts or nothing, devices or nothing, strict=True):
        if host is not None:
            split_address(host, "host")
        parts.append(StagePart(first, first + count, host, device))
        first += count
    used = [part.address for part in parts if part.address]
    for address in used:
        if used.count(address) > 1:
            raise BadInputError(f"host {address} is listed for two stages: each stage needs a server of its own")
    return tuple(parts)


@contextlib.asynccontextmanager
async def running_pipeline(plan: ClusterPlan) -> AsyncIterator[Pipeline]:
    """A connected pipeline; on the way out, no process of ours is left and foreign stages are free again.

    What the first run on a machine has to compile does not count as startup time.

    Raises:
        BadInputError: a stage cannot be reached or cannot do what ``plan`` says.
        StageFailedError: a stage died, or is not ready in time.
    """
    if plan.wants_native_kernels:
        with contextlib.suppress(BadInputError):  # whether that matters is for the stages to say
            await asyncio.to_thread(library.prepare)
    pipeline = Pipeline(plan.recovery.attempts)
    assembly = Assembly(plan, pipeline)
    try:
        try:
            async with asyncio.timeout(plan.startup_timeout_s):
                await assembly.bring_up()
        except TimeoutError:
            raise pipeline.failure or _too_late(pipeline, plan.startup_timeout_s) from None
        except StageFailedError as error:  # maybe only the consequence of a known one
            raise pipeline.failure or error from None
        yield pipeline
    finally:
        await pipeline.close()
        await assembly.close()


def _too_late(pipeline: Pipeline, timeout_s: float) -> StageFailedError:
    late = ", ".join(node.name for node in pipeline.nodes if not node.ready)
    waiting = f", still waiting for {late}" if late else ""
    return StageFailedError(
        f"the pipeline was not ready within {timeout_s:g} s{waiting}: raise execution.startup_timeout_s"
    )


class Assembly:
    """Configures and links the nodes of ``pipeline``, which it serves as its mender.

    A lost stage that was a process here is killed, should it only be frozen, and born again. One on another machine is
    called at the same address for a while, then at the next spare's. All others keep their layers: they forget links
    and sessions, and take only frames that show the new epoch's token.
    """

    def __init__(self, plan: ClusterPlan, pipeline: Pipeline) -> None:
        self._plan = plan
        self._pipeline = pipeline
        self._nursery: Nursery | None = None
        self._spares = list(plan.spares)  # and lost servers, which may come back some day
        self._starting = asyncio.Lock()
        self._weights = ""
        self._arithmetic: list[str] = []  # of each stage as it was at first
        pipeline.mender = self

    async def bring_up(self) -> None:
        """Configures all nodes in parallel; they are linked when all have loaded.

        Raises:
            BadInputError: a stage cannot be reached or cannot do what the plan says.
            StageFailedError: a stage failed.
        """
        plan, pipeline = self._plan, self._pipeline
        self._weights = fingerprint(open_model(plan.model))
        here = sum(part.address is None for part in plan.stages) + (plan.drafter is not None)
        processes = iter(await self._spawn(here) if here else [])
        for index, part in enumerate(plan.stages):
            pipeline.stages.append(self._stage(index, part.address or next(processes)))
        if plan.drafter:
            pipeline.drafter = self._drafter(plan.drafter, next(processes))
        configured = [stage.configure(self._stage_order(index)) for index, stage in enumerate(pipeline.stages)]
        if plan.drafter and pipeline.drafter:
            configured.append(pipeline.drafter.configure(self._drafter_order(plan.drafter)))
        await asyncio.gather(*configured)
        self._compare_arithmetic()
        await pipeline.connect()
        if pipeline.drafter:
            await pipeline.connect_drafter(pipeline.token)
        for node in pipeline.nodes:  # one at a time: clocks are measured best while nothing else goes on
            await node.watch()

    def _compare_arithmetic(self) -> None:
        """Each stage is exact in itself; but only with one arithmetic does the text not depend on the stage split."""
        self._arithmetic = [stage.arithmetic for stage in self._pipeline.stages]
        found = {stage.arithmetic: stage.name for stage in self._pipeline.stages}
        if len(found) > 1:
            named = "; ".join(f"{name}: {arithmetic}" for arithmetic, name in found.items())
            event(_log, logging.WARNING, f"stages compute differently, another split may yield another text: {named}")

    async def close(self) -> None:
        """Ends all processes."""
        if self._nursery:
            await self._nursery.stop()

    # -- repair ------------------------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """As ``Mender.restore``."""
        pipeline, limit_s, start = self._pipeline, self._plan.recovery.timeout_s, time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                await pipeline.unlink()
                lost = [index for index, stage in enumerate(pipeline.stages) if stage.failure]
                kept = [stage for stage in pipeline.stages if not stage.failure]
                await together(
                    [*(stage.reset(pipeline.token) for stage in kept), *(self._replace(index) for index in lost)]
                )
                await pipeline.connect()
                await together(stage.watch() for stage in pipeline.stages if not stage.watched)
        except TimeoutError:
            late = ", ".join(stage.name for stage in pipeline.stages if not stage.ready)
            raise StageFailedError(
                f"the pipeline was not restored within {limit_s:g} s, still waiting for {late or 'its links'}: raise "
                "execution.recovery.timeout_s"
            ) from None
        if pipeline.failure:
            raise pipeline.failure
        new = ", ".join(pipeline.stages[index].name for index in lost) or "no stage"
        event(_log, logging.WARNING, "pipeline restored", seconds=round(time.monotonic() - start, 3), new=new)

    async def _replace(self, index: int) -> None:
        """Puts a configured stage in the place of a lost one."""
        lost = self._pipeline.stages[index]
        await lost.close()
        if lost.process:
            lost.process.kill()
            (process,) = await self._spawn(1)
            await self._configure(index, process)
            return
        returns_within_s = _RETURN_S if self._spares else self._plan.recovery.timeout_s
        if await self._wait_for(index, lost.address, returns_within_s):
            return
        spare = self._spares.pop(0) if self._spares else None
        self._spares.append(lost.address)
        if spare is None or not await self._wait_for(index, spare, _RETURN_S):
            raise StageFailedError(f"{lost.name} is lost, and no spare can take its place")

    async def _wait_for(self, index: int, address: str, within_s: float) -> bool:
        """Whether a server at ``address`` became the stage: it may have to notice first that it is free."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            try:
                await self._configure(index, address)
                return True
            except PipesimError as error:
                event(_log, logging.INFO, str(error))
                await asyncio.sleep(_TRY_AGAIN_S)
        return False

    async def _configure(self, index: int, place: NodeProcess | str) -> None:
        node = self._pipeline.stages[index] = self._stage(index, place)
        try:
            await node.configure(self._stage_order(index))
            if node.arithmetic != self._arithmetic[index]:
                raise BadInputError(
                    f"{node.name} computes with {node.arithmetic}, the lost stage with {self._arithmetic[index]}"
                )
        except BaseException:
            await node.close()  # it counts as lost
            raise

    async def replace_drafter(self) -> None:
        """As ``Mender.replace_drafter``."""
        pipeline, part, limit_s = self._pipeline, self._plan.drafter, self._plan.recovery.timeout_s
        assert pipeline.drafter
        assert part
        await pipeline.drafter.close()
        if pipeline.drafter.process:
            pipeline.drafter.process.kill()
        try:
            async with asyncio.timeout(limit_s):
                (process,) = await self._spawn(1)
                pipeline.drafter = self._drafter(part, process)
                order = self._drafter_order(part)
                await pipeline.drafter.configure(order)
                await pipeline.connect_drafter(order.token)
                await pipeline.drafter.watch()
        except TimeoutError:
            pipeline.drafter.fail(f"was not ready within {limit_s:g} s")
        if pipeline.drafter.failure:
            raise pipeline.drafter.failure

    # -- nodes -------------------------------------------------------------------------------------------------------

    async def _spawn(self, count: int) -> list[NodeProcess]:
        """New processes; a nursery that has died, and its nodes with it, is replaced."""
        async with self._starting:
            if self._nursery and self._nursery.ended:
                await self._nursery.stop()
                self._nursery = None
            if self._nursery is None:
                plan = self._plan
                preload = any(part.address is None for part in plan.stages)
                preload = preload or (plan.drafter is not None and plan.drafter.is_model)
                try:
                    self._nursery = await Nursery.start(preload)
                except OSError as error:
                    raise StageFailedError(f"this machine cannot start another process ({error})") from error
        return await self._nursery.spawn(count)

    def _stage(self, index: int, place: NodeProcess | str) -> Node:
        part = self._plan.stages[index]
        process = place if isinstance(place, NodeProcess) else None
        address = place.address if isinstance(place, NodeProcess) else place
        name = f"stage {index} ({address}, layers {part.first_layer}..{part.last_layer - 1})"
        return Node(name, address, process, self._pipeline.node_failed, self._pipeline.link_lost)

    def _stage_order(self, index: int) -> ConfigureStage:
        plan, part = self._plan, self._plan.stages[index]
        return ConfigureStage(
            token=self._pipeline.token,
            stage=index,
            model=plan.model,
            fingerprint=self._weights,
            first_layer=part.first_layer,
            last_layer=part.last_layer,
            dtype=plan.dtype,
            kernels=plan.kernels,
            threads=plan.threads,
            device=part.device,
            emulated=plan.emulated[index] if plan.emulated else None,
            compression=plan.compression,
        )

    def _drafter(self, part: DrafterPart, process: NodeProcess) -> Node:
        name = f"drafter {part.drafter} ({process.address})"
        return Node(name, process.address, process, self._pipeline.node_failed, self._pipeline.link_lost)

    def _drafter_order(self, part: DrafterPart) -> ConfigureDrafter:
        return ConfigureDrafter(
            token=self._pipeline.token,
            drafter=part.drafter,
            model=self._plan.model,
            vocabulary=part.vocabulary,
            max_context=part.max_context,
            dtype=self._plan.dtype,
            kernels=self._plan.kernels,
            threads=self._plan.threads,
            skip_layers=part.skip_layers,
            device=part.device,
            emulated=self._plan.emulated[-1] if self._plan.emulated else None,
        )
