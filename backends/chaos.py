"""Faults of a scenario, carried out on a real pipeline: the one place where they turn into actions.

A kind of fault joins in by an entry in ``ACTIONS``: a coroutine that begins when the fault does, and ends with it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from backends.logs import event
from backends.pipeline import Pipeline
from pipesim.errors import BadInputError
from pipesim.scenario import CrashFault, Fault

_log = logging.getLogger(__name__)


async def _crash(fault: CrashFault, pipeline: Pipeline) -> None:
    """Kills a stage's process; the pipeline may not be restored sooner than the scenario says."""
    stage = pipeline.stages[fault.stage]
    event(_log, logging.WARNING, f"a fault of the scenario kills {stage.name}")
    pipeline.not_restored_before(time.monotonic() + 1e-3 * (fault.detect_ms + fault.restart_ms))
    if stage.process:
        stage.process.kill()


ACTIONS: dict[type, Callable[..., Awaitable[None]]] = {CrashFault: _crash}
"""What is done about a kind of fault; it gets the fault and the pipeline."""


def check_faults(faults: Sequence[Fault], hosts: Sequence[str | None]) -> None:
    """Raises BadInputError for a fault that cannot be carried out. ``hosts`` are those of the stages, None: here."""
    for number, fault in enumerate(faults):
        if isinstance(fault, CrashFault) and hosts[fault.stage] is not None:
            raise BadInputError(
                f"faults.{number}: stage {fault.stage} runs at {hosts[fault.stage]}, and only a stage that is started "
                "here can be made to crash: remove the fault, or the host"
            )


@contextlib.asynccontextmanager
async def faults_under_way(faults: Sequence[Fault], pipeline: Pipeline, after_s: float = 0.0) -> AsyncIterator[None]:
    """Carries ``faults`` out, their times counted from ``after_s`` on; what has not begun by the end never happens."""

    async def carry_out(fault: Fault) -> None:
        await asyncio.sleep(after_s + 1e-3 * fault.start_ms)
        await ACTIONS[type(fault)](fault, pipeline)

    tasks = [asyncio.create_task(carry_out(fault)) for fault in faults if type(fault) in ACTIONS]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
