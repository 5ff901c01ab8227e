"""How long a run takes at a stage."""

from bisect import bisect_right
from typing import Protocol

from pipesim.scenario import LinearCost, StagePlan, TableCost
from pipesim.scheduling.runs import RunKind


class CostModel(Protocol):
    """Time of a run of ``rows`` rows whose last one attends to ``kv_length`` cells."""

    def seconds(self, kind: RunKind, rows: int, kv_length: int) -> float:
        """Compute time in seconds, more than zero."""
        ...


class LinearCostModel:
    """``scale * (constant + rows * per_token + rows * kv_length * per_cell)``; ``scale`` is 1 or the layers."""

    def __init__(self, cost: LinearCost, scale: int) -> None:
        self._constant = cost.constant_ms * 1e-3 * scale
        self._per_token = cost.per_token_ms * 1e-3 * scale
        self._rest = _Rest(cost, scale)

    def seconds(self, kind: RunKind, rows: int, kv_length: int) -> float:
        """See ``CostModel``."""
        return self._rest.add(kind, rows, kv_length, self._constant + rows * self._per_token, self._one_row)

    @property
    def _one_row(self) -> float:
        return self._constant + self._per_token


class TableCostModel:
    """Measured times at some numbers of rows, linear between them, and on beyond them but never falling."""

    def __init__(self, cost: TableCost, scale: int) -> None:
        self._rows = sorted(cost.rows_ms)
        self._seconds = [cost.rows_ms[rows] * 1e-3 * scale for rows in self._rows]
        self._rest = _Rest(cost, scale)

    def seconds(self, kind: RunKind, rows: int, kv_length: int) -> float:
        """See ``CostModel``."""
        return self._rest.add(kind, rows, kv_length, self._table(rows), self._seconds[0])

    def _table(self, rows: int) -> float:
        known, seconds = self._rows, self._seconds
        if rows <= known[0] or len(known) == 1:
            return seconds[0]
        right = min(bisect_right(known, rows), len(known) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (known[right] - known[left])
        if rows > known[-1]:
            return seconds[-1] + max(0.0, slope) * (rows - known[-1])
        return seconds[left] + slope * (rows - known[left])


class _Rest:
    """What both kinds of cost share: the price of prompt rows, and of the context."""

    def __init__(self, cost: LinearCost | TableCost, scale: int) -> None:
        prefill = cost.prefill_per_token_ms
        self._prefill = None if prefill is None else prefill * 1e-3 * scale
        self._per_cell = cost.kv_us_per_kilocell * 1e-9 * scale

    def add(self, kind: RunKind, rows: int, kv_length: int, decode: float, one_row: float) -> float:
        if self._prefill is not None and kind is RunKind.PREFILL:
            decode = max(one_row, rows * self._prefill)
        return decode + rows * kv_length * self._per_cell


def make_cost_model(plan: StagePlan) -> CostModel:
    """The cost model of a stage."""
    scale = plan.layers if plan.cost.per == "layer" else 1
    if isinstance(plan.cost, TableCost):
        return TableCostModel(plan.cost, scale)
    return LinearCostModel(plan.cost, scale)
