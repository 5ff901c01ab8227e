"""How long a run takes at a stage."""

from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import assert_never

from pipesim.scenario import Cost, LinearCost, StagePlan, TableCost
from pipesim.scheduling.runs import RunKind


class CostModel:
    """Time of a run at one stage: ``decode(rows)``, or the price of prompt rows, and the price of the context.

    Args:
        decode: time of a run of so many rows, in seconds.
        prefill: seconds per row of a prefill run, which takes at least a one-row run's time; None: as any other row.
        per_cell: seconds per row and KV cell that it attends to.
    """

    def __init__(self, decode: Callable[[int], float], prefill: float | None, per_cell: float) -> None:
        self._decode = decode
        self._one_row = decode(1)
        self._prefill = prefill
        self._per_cell = per_cell

    def seconds(self, kind: RunKind, rows: int, context: float) -> float:
        """Compute time of a run whose rows attend to ``context`` cells on average."""
        if self._prefill is not None and kind is RunKind.PREFILL:
            compute = max(self._one_row, rows * self._prefill)
        else:
            compute = self._decode(rows)
        return compute + rows * context * self._per_cell


def make_cost_model(plan: StagePlan) -> CostModel:
    """The cost model of a stage."""
    cost = plan.cost
    scale = plan.layers if cost.per == "layer" else 1
    prefill = None if cost.prefill_per_token_ms is None else cost.prefill_per_token_ms * 1e-3 * scale
    return CostModel(_decode(cost, scale), prefill, cost.kv_us_per_kilocell * 1e-9 * scale)


def _decode(cost: Cost, scale: int) -> Callable[[int], float]:
    match cost:
        case LinearCost():
            return partial(_linear, cost.constant_ms * 1e-3 * scale, cost.per_token_ms * 1e-3 * scale)
        case TableCost():
            known = sorted(cost.rows_ms)
            return partial(_table, known, [cost.rows_ms[rows] * 1e-3 * scale for rows in known])
        case _:
            assert_never(cost)


def _linear(constant: float, per_token: float, rows: int) -> float:
    return constant + rows * per_token


def _table(known: list[int], seconds: list[float], rows: int) -> float:
    """Linear between the known numbers of rows, constant before them, and on beyond them but never falling."""
    if rows <= known[0] or len(known) == 1:
        return seconds[0]
    right = min(bisect_right(known, rows), len(known) - 1)
    left = right - 1
    slope = (seconds[right] - seconds[left]) / (known[right] - known[left])
    if rows > known[-1]:
        return seconds[-1] + max(0.0, slope) * (rows - known[-1])
    return seconds[left] + slope * (rows - known[left])
