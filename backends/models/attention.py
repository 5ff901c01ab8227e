"""Attention in fixed blocks of positions: a row's result depends on what it sees, not on where or beside whom.

A *unit* is one block of 64 positions as some rows of a tile see it: its cells in position order. Blocks of the shared
prefix are one unit for all rows; where branches differ, a block has one unit per branch. Every unit is multiplied
with all rows of the tile in products of one fixed shape; what a row does not see, be it on another branch or behind a
sliding window, is masked, so its weight is exactly zero and adding it changes no bit. Maxima are exact in any order,
sums run unit by unit in order of position.

Everything that depends on cells and sequences is worked out once per run here, none of it per layer.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from backends.models.exact import BLOCK
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import END, Run


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


def plan_tiles(
    table: CellTable, run: Run, start: int, stop: int, padded_stop: int, windows: Collection[int]
) -> dict[int, AttentionTile]:
    """Prepares rows ``[start, stop)`` of ``run``, padded up to ``padded_stop``; ``run`` has been admitted last.

    One tile for each of ``windows``: of so many positions, its own the last, a row sees the cells (0: of all).
    """
    blocks, cells, counts = _find_units(table, run, start, stop)
    positions = np.array(run.positions[start:stop])
    tiles = {}
    for window in windows:
        hidden = np.clip(positions + 1 - (window or END) - blocks[:, None], 0, counts)
        # A unit that no row sees is left out: in a larger tile its weights would be zero, which changes no bit.
        near = np.flatnonzero((hidden < counts).any(axis=1))
        # padding rows see everything, to stay finite
        first, last = (np.full((len(near), padded_stop - start), seen) for seen in (0, BLOCK))
        first[:, : stop - start], last[:, : stop - start] = hidden[near], counts[near]
        tiles[window] = _tile([cells[unit] for unit in near], first, last, table.total)
    return tiles


def _tile(
    cells: list[list[int]], first: npt.NDArray[np.int64], last: npt.NDArray[np.int64], total: int
) -> AttentionTile:
    """The tile of units with ``cells``, of which a row sees those from ``first`` up to ``last``, ``[units, rows]``."""
    units: list[tuple[bool, int]] = []
    gathered: list[int] = []
    for unit in cells:
        cell = unit[0]
        if cell + BLOCK <= total and unit == list(range(cell, cell + len(unit))):
            units.append((False, cell))
        else:
            units.append((True, len(gathered)))
            gathered += unit + unit[:1] * (BLOCK - len(unit))
    open_units = int(np.cumprod((last - first == BLOCK).all(axis=1)).sum())
    first, last, at = first[open_units:, :, None], last[open_units:, :, None], np.arange(BLOCK)
    mask = np.where((at >= first) & (at < last), 0.0, -np.inf).astype(np.float32)
    return AttentionTile(
        units=tuple(units),
        gather=torch.tensor(gathered) if gathered else None,
        open_units=open_units,
        mask=torch.from_numpy(mask)[:, None, :, None, :],
    )


def _find_units(
    table: CellTable, run: Run, start: int, stop: int
) -> tuple[npt.NDArray[np.int64], list[list[int]], npt.NDArray[np.int64]]:
    """By block: each unit's first position, its cells, and ``[units, rows]``: how many, from the first on, a row sees.

    That is without any window.
    """
    positions = np.array(run.positions[start:stop])
    prefix = table.shared_prefix()
    shared = min(len(prefix), int(positions.max()) + 1) // BLOCK
    blocks = [block * BLOCK for block in range(shared)]
    cells = [prefix[at : at + BLOCK] for at in blocks]
    counts = [np.clip(positions + 1 - at, 0, BLOCK) for at in blocks]
    tails: dict[int, list[tuple[list[int], npt.NDArray[np.int64]]]] = {}
    for row in np.argsort(-positions, kind="stable").tolist():  # the longest first: shorter ones are its beginnings
        tail = table.visible(run.positions[start + row], run.sequences[start + row], shared * BLOCK)
        for block in range(0, len(tail), BLOCK):
            piece = tail[block : block + BLOCK]
            units = tails.setdefault(shared * BLOCK + block, [])
            count = next((count for unit, count in units if unit[: len(piece)] == piece), None)
            if count is None:
                count = np.zeros(stop - start, np.int64)
                units.append((piece, count))
            count[row] = len(piece)
    for at in sorted(tails):
        for unit, count in tails[at]:
            blocks.append(at)
            cells.append(unit)
            counts.append(count)
    return np.array(blocks), cells, np.stack(counts)


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
