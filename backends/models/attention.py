"""Attention in fixed blocks of positions: a row's result depends on what it sees, not on where or beside whom.

A *unit* is one block of 64 positions as some rows of a tile see it: its cells in position order. Blocks of the shared
prefix are one unit for all rows; where branches differ, a block has one unit per branch. Every unit is multiplied
with all rows of the tile in products of one fixed shape; what a row does not see is masked, so its weight is exactly
zero and adding it changes no bit. Maxima are exact in any order, sums run unit by unit in order of position.
Everything that depends on cells and sequences is worked out once per run here, none of it per layer.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from backends.models.exact import BLOCK
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import Run


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """What one tile of rows attends to.

    ``units[u]`` is ``(gathered, start)``: 64 cells in a row, from ``start`` on, of the cache itself or of the copy that
    ``gather`` makes. The first ``open_units`` units are seen in full by every row; for the others ``mask``, of shape
    ``[units - open_units, 1, rows, 1, 64]``, is 0 where a row sees a cell and -inf elsewhere.
    """

    units: tuple[tuple[bool, int], ...]
    gather: torch.Tensor | None
    open_units: int
    mask: torch.Tensor


def plan_tile(table: CellTable, run: Run, start: int, stop: int, padded_stop: int) -> AttentionTile:
    """Prepares rows ``[start, stop)`` of ``run``, padded up to ``padded_stop``; ``run`` has been admitted last."""
    cells, counts = _find_units(table, run, start, stop)
    seen = np.full((len(cells), padded_stop - start), BLOCK)  # padding rows see everything, to stay finite
    seen[:, : stop - start] = counts
    units: list[tuple[bool, int]] = []
    gathered: list[int] = []
    for unit in cells:
        first = unit[0]
        if first + BLOCK <= table.total and unit == list(range(first, first + len(unit))):
            units.append((False, first))
        else:
            units.append((True, len(gathered)))
            gathered += unit + unit[:1] * (BLOCK - len(unit))
    open_units = int(np.cumprod((seen == BLOCK).all(axis=1)).sum())
    mask = np.where(np.arange(BLOCK) < seen[open_units:, :, None], 0.0, -np.inf).astype(np.float32)
    return AttentionTile(
        units=tuple(units),
        gather=torch.tensor(gathered) if gathered else None,
        open_units=open_units,
        mask=torch.from_numpy(mask)[:, None, :, None, :],
    )


def _find_units(table: CellTable, run: Run, start: int, stop: int) -> tuple[list[list[int]], npt.NDArray[np.int64]]:
    """The cells of each unit, by block, and ``[units, rows]``: how many of them, from the first on, a row sees."""
    positions = np.array(run.positions[start:stop])
    prefix = table.shared_prefix()
    shared = min(len(prefix), int(positions.max()) + 1) // BLOCK
    cells = [prefix[block * BLOCK : (block + 1) * BLOCK] for block in range(shared)]
    counts = [np.clip(positions + 1 - block * BLOCK, 0, BLOCK) for block in range(shared)]
    tails: dict[int, list[tuple[list[int], npt.NDArray[np.int64]]]] = {}
    for row in np.argsort(-positions, kind="stable").tolist():  # the longest first: shorter ones are its beginnings
        tail = table.visible(run.positions[start + row], run.sequences[start + row], shared * BLOCK)
        for block in range(0, len(tail), BLOCK):
            piece = tail[block : block + BLOCK]
            units = tails.setdefault(block, [])
            count = next((count for unit, count in units if unit[: len(piece)] == piece), None)
            if count is None:
                count = np.zeros(stop - start, np.int64)
                units.append((piece, count))
            count[row] = len(piece)
    for block in sorted(tails):
        for unit, count in tails[block]:
            cells.append(unit)
            counts.append(count)
    return cells, np.stack(counts)


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tile: AttentionTile) -> torch.Tensor:
    """Softmax attention of one tile in one layer.

    ``queries`` are ``[rows, kv_heads, group, head_dim]``, already scaled; ``keys`` and ``values`` the layer's cache
    ``[kv_heads, cells, head_dim]``, never repeated per query head. Returns ``[rows, heads * head_dim]``.
    """
    rows, kv_heads, group, width = queries.shape
    flat = queries.transpose(0, 1).reshape(kv_heads, rows * group, width)
    copied_keys = copied_values = keys
    if tile.gather is not None:
        copied_keys, copied_values = keys.index_select(1, tile.gather), values.index_select(1, tile.gather)
    scores = flat.new_empty(len(tile.units), kv_heads, rows * group, BLOCK)
    for unit, (gathered, start) in enumerate(tile.units):
        block = (copied_keys if gathered else keys)[:, start : start + BLOCK]
        torch.bmm(flat, block.transpose(1, 2), out=scores[unit])
    masked = scores[tile.open_units :]
    masked.view(-1, kv_heads, rows, group, BLOCK).add_(tile.mask)
    highest = scores.amax(-1).amax(0)
    weights = scores.sub_(highest.unsqueeze(-1)).exp_()
    # cumsum adds unit after unit, where sum would pair them up by their number
    total = weights.sum(-1).cumsum(0)[-1]
    attended = torch.zeros_like(flat)
    for unit, (gathered, start) in enumerate(tile.units):
        block = (copied_values if gathered else values)[:, start : start + BLOCK]
        attended.baddbmm_(weights[unit], block)
    attended /= total.unsqueeze(-1)
    return attended.view(kv_heads, rows, group * width).transpose(0, 1).reshape(rows, -1)
