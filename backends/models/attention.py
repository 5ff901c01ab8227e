"""Attention in fixed blocks of positions: a row's result depends on what it sees, not on where or beside whom.

A *unit* is one block of 64 positions as some rows of a tile see it: its cells in position order. Blocks of the shared
prefix are one unit for all rows; where branches differ, a block has one unit per branch. Every unit is multiplied
with all rows of the tile in products of one fixed shape, units that lie in a row in one batch; what a row does not
see, be it on another branch or behind a sliding window, is masked, so its weight is exactly zero and adding it changes
no bit. Maxima are exact in any order, sums run unit by unit in order of position.

The cache of a layer is ``[blocks, kv_heads, 64, head_dim]``: cell ``c`` is at ``c % 64`` of block ``c // 64``.

Everything that depends on cells and sequences is worked out once per run here, none of it per layer.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from backends.models.exact import BATCHED_BLOCKS, BLOCK
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import END, Run

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Units that are multiplied in one batch: ``units`` of the tile, at ``blocks`` of the cache, or of a copy of it.

    Both count heads: a block is ``kv_heads`` matrices.
    """

    gathered: bool
    units: slice
    blocks: slice


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """What one tile of rows attends to.

    ``batches`` hold its ``units`` in order. ``gather`` are the rows of the flat cache that are copied. The first
    ``open_units`` units are seen in full by every row; for the others ``mask``, of shape
    ``[units - open_units, 1, rows, 1, 64]``, is 0 where a row sees a cell and -inf elsewhere.
    """

    units: int
    batches: tuple[Batch, ...]
    gather: torch.Tensor | None
    open_units: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Units:
    """Units in order of their first positions, ``starts``.

    ``cells`` ``[units, 64]`` are the ``sizes`` cells of each, then its first again; ``counts`` ``[units, rows]`` says
    how many, from the first on, a row sees.
    """

    starts: Numbers
    cells: Numbers
    sizes: Numbers
    counts: Numbers

    def hidden(self, positions: Numbers, window: int) -> Numbers:
        """How many of them are behind the ``window`` of rows at ``positions`` (0: none), ``[units, rows]``."""
        behind: Numbers = np.clip(positions + 1 - (window or END) - self.starts[:, None], 0, self.counts)
        return behind


def flat_rows(cells: Sequence[int] | torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Where ``cells`` are in the flat cache ``[blocks * kv_heads * 64, head_dim]``: ``[cells, kv_heads]``."""
    at = torch.as_tensor(cells).unsqueeze(1)
    return (at // BLOCK * kv_heads + torch.arange(kv_heads, device=at.device)) * BLOCK + at % BLOCK


def plan_tiles(
    table: CellTable, run: Run, start: int, stop: int, padded_stop: int, windows: Collection[int], kv_heads: int
) -> dict[int, AttentionTile]:
    """Prepares rows ``[start, stop)`` of ``run``, padded up to ``padded_stop``; ``run`` has been admitted last.

    One tile for each of ``windows``: of so many positions, its own the last, a row sees the cells (0: of all).
    """
    units = find_units(table, run, start, stop)
    positions = np.array(run.positions[start:stop])
    tiles = {}
    for window in windows:
        hidden = units.hidden(positions, window)
        # A unit that no row sees is left out: in a larger tile its weights would be zero, which changes no bit.
        near = np.flatnonzero((hidden < units.counts).any(axis=1))
        # padding rows see everything, to stay finite
        first, last = (np.full((len(near), padded_stop - start), seen) for seen in (0, BLOCK))
        first[:, : stop - start], last[:, : stop - start] = hidden[near], units.counts[near]
        tiles[window] = _tile(units.cells[near], units.sizes[near], first, last, kv_heads)
    return tiles


def _tile(cells: Numbers, sizes: Numbers, first: Numbers, last: Numbers, kv_heads: int) -> AttentionTile:
    """The tile of units with ``cells``, of which a row sees those from ``first`` up to ``last``, ``[units, rows]``."""
    at = np.arange(BLOCK)
    as_stored = (cells == cells[:, :1] + at) | (at >= sizes[:, None])
    copied = ~as_stored.all(axis=1) | (cells[:, 0] % BLOCK > 0)
    blocks = np.where(copied, np.cumsum(copied) - 1, cells[:, 0] // BLOCK)
    gathered = cells[copied].ravel()
    open_units = int(np.cumprod((last - first == BLOCK).all(axis=1)).sum())
    first, last = first[open_units:, :, None], last[open_units:, :, None]
    mask = np.where((at >= first) & (at < last), 0.0, -np.inf).astype(np.float32)
    gather = flat_rows(torch.from_numpy(gathered), kv_heads).view(-1, BLOCK, kv_heads).transpose(1, 2).flatten()
    return AttentionTile(
        units=len(cells),
        batches=tuple(_batches(list(zip(copied.tolist(), blocks.tolist(), strict=True)), kv_heads)),
        gather=gather if len(gathered) else None,
        open_units=open_units,
        mask=torch.from_numpy(mask)[:, None, :, None, :],
    )


def _batches(places: Sequence[tuple[bool, int]], kv_heads: int) -> Iterator[Batch]:
    start = 0
    for unit in range(1, len(places) + 1):
        (gathered, block), count = places[start], unit - start
        if unit == len(places) or count == BATCHED_BLOCKS or places[unit] != (gathered, block + count):
            yield Batch(
                gathered,
                slice(start * kv_heads, unit * kv_heads),
                slice(block * kv_heads, (block + count) * kv_heads),
            )
            start = unit


def find_units(table: CellTable, run: Run, start: int, stop: int) -> Units:
    """The units of rows ``[start, stop)`` of ``run``, by block, without any window."""
    positions = np.array(run.positions[start:stop])
    prefix = table.shared_prefix()
    shared = min(len(prefix), int(positions.max()) + 1) // BLOCK
    tails: dict[int, list[tuple[list[int], Numbers]]] = {}
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
    own = [(at, unit, count) for at in sorted(tails) for unit, count in tails[at]]
    padded = [unit + unit[:1] * (BLOCK - len(unit)) for _, unit, _ in own]
    before = np.arange(shared) * BLOCK
    return Units(
        starts=np.concatenate((before, np.array([at for at, _, _ in own], np.int64))),
        cells=np.concatenate(
            (np.array(prefix[: shared * BLOCK], np.int64), np.array(padded, np.int64).ravel())
        ).reshape(-1, BLOCK),
        sizes=np.array([BLOCK] * shared + [len(unit) for _, unit, _ in own]),
        counts=np.concatenate(
            (
                np.clip(positions + 1 - before[:, None], 0, BLOCK),
                np.array([count for _, _, count in own], np.int64).reshape(-1, stop - start),
            )
        ),
    )


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tile: AttentionTile) -> torch.Tensor:
    """Softmax attention of one tile in one layer.

    ``queries`` are ``[rows, kv_heads, group, head_dim]``, already scaled; ``keys`` and ``values`` the layer's cache
    ``[blocks, kv_heads, 64, head_dim]``, never repeated per query head. Returns ``[rows, heads * head_dim]``.
    """
    rows, kv_heads, group, width = queries.shape
    key_blocks, copied_keys = _blocks(keys, tile)
    value_blocks, copied_values = _blocks(values, tile)
    most = min(tile.units, BATCHED_BLOCKS)
    flat = queries.transpose(0, 1).reshape(1, kv_heads, rows * group, width).expand(most, -1, -1, -1).flatten(0, 1)
    scores = flat.new_empty(tile.units * kv_heads, rows * group, BLOCK)
    for batch in tile.batches:
        blocks = (copied_keys if batch.gathered else key_blocks)[batch.blocks]
        torch.bmm(flat[: len(blocks)], blocks.transpose(1, 2), out=scores[batch.units])
    scores = scores.view(tile.units, kv_heads, rows * group, BLOCK)
    scores[tile.open_units :].view(-1, kv_heads, rows, group, BLOCK).add_(tile.mask)
    highest = scores.amax(-1).amax(0)
    weights = scores.sub_(highest.unsqueeze(-1)).exp_()
    # cumsum adds unit after unit, where sum would pair them up by their number
    total = weights.sum(-1).cumsum(0)[-1]
    parts = flat.new_empty(tile.units * kv_heads, rows * group, width)
    for batch in tile.batches:
        blocks = (copied_values if batch.gathered else value_blocks)[batch.blocks]
        torch.bmm(weights.flatten(0, 1)[batch.units], blocks, out=parts[batch.units])
    attended = _sum_in_order(parts.view(tile.units, kv_heads, rows * group, width))
    attended /= total.unsqueeze(-1)
    return attended.view(kv_heads, rows, group * width).transpose(0, 1).reshape(rows, -1)


def _sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, one after another."""
    if parts.is_cuda:  # one launch, though it writes down every sum on the way
        return parts.cumsum(0)[-1]
    total, *others = parts.unbind()
    for other in others:
        total += other
    return total


def _blocks(cache: torch.Tensor, tile: AttentionTile) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks of each head, ``[blocks * kv_heads, 64, head_dim]``: those of the cache, and the tile's copies."""
    blocks = cache.flatten(0, 1)
    if tile.gather is None:
        return blocks, blocks
    return blocks, blocks.flatten(0, 1).index_select(0, tile.gather).view(-1, *blocks.shape[1:])
