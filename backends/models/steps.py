"""Runs in a few fixed shapes, whose launches a device can record and a compiler can know.

A *step* takes one tile of rows through all layers of a stage. Its shape is the tile's row count and its *reach*: how
many batches of 16 units (see ``attention.py``) it attends to, a power of two. All that sets runs of one shape apart is
in its inputs, the rows and one array of integers. Units beyond what a row sees are masked: adding them changes no bit.

Prefill chunks are padded to a multiple of 64 rows and are one tile; other runs are cut as the tiling says. Tiles follow
one another, their rows in order of position, so that a row finds its ancestors in the cache.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from backends.models.attention import AttentionTile, Batch, Numbers, Units, find_units, flat_rows
from backends.models.config import ModelConfig
from backends.models.decoder import (
    KvCache,
    LayerForward,
    Look,
    RunPlan,
    forward_layer,
    read_layer,
    run_layers,
)
from backends.models.devices import Device
from backends.models.exact import BATCHED_BLOCKS, BLOCK, LARGEST_TILE, Tiling, largest, pad_rows, refined
from backends.models.products import Matrix
from backends.models.weights import LayerWeights
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import Run, RunKind


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class StepShape:
    """``rows`` of a tile, and its ``reach``: batches of 16 units."""

    rows: int
    reach: int

    @property
    def units(self) -> int:
        """Units that every row of the tile is multiplied with."""
        return self.reach * BATCHED_BLOCKS


class Step:
    """One shape's way through ``layers``; ``repeat()`` computes it from what ``rows`` and ``numbers`` hold.

    ``numbers`` are, one after another: each row's position and its KV cell; the cells of each unit; for each window and
    unit the first of its cells that each row sees, and for each unit how many of them, from the first on, it sees
    without a window.
    """

    def __init__(
        self,
        shape: StepShape,
        layers: Sequence[LayerWeights[Matrix]],
        config: ModelConfig,
        cache: KvCache,
        device: Device,
        layer_forward: LayerForward,
    ) -> None:
        self.shape, self.windows = shape, sorted({kind.window for kind in cache.rotary})
        self._layers, self._config, self._cache, self._layer_forward = layers, config, cache, layer_forward
        by_row = shape.units * shape.rows
        self._sizes = [shape.rows, shape.rows, shape.units * BLOCK, *[by_row] * len(self.windows), by_row]
        self.rows = torch.zeros(shape.rows, config.hidden, device=device.place)
        self.numbers = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device.place)
        self.repeat = device.record(self._compute)

    def _compute(self) -> torch.Tensor:
        """The rows ``[rows, hidden]`` that leave the last layer."""
        hidden = run_layers(
            self.rows, self._layers, self._config, self._plan(), self._cache, _never, self._layer_forward
        )
        assert hidden is not None
        return hidden

    def _plan(self) -> RunPlan:
        rows, units, kv_heads = self.shape.rows, self.shape.units, self._config.kv_heads
        positions, cells, unit_cells, *firsts, last = torch.split(self.numbers, self._sizes)
        gather = flat_rows(unit_cells, kv_heads).view(units, BLOCK, kv_heads).transpose(1, 2).flatten()
        many = BATCHED_BLOCKS * kv_heads
        batches = tuple(Batch(True, *[slice(at, at + many)] * 2) for at in range(0, units * kv_heads, many))
        at = torch.arange(BLOCK, device=last.device)
        tiles = {}
        for window, first in zip(self.windows, firsts, strict=True):
            seen = (at >= first.view(units, rows, 1)) & (at < last.view(units, rows, 1))
            mask = torch.zeros(seen.shape, device=last.device).masked_fill_(~seen, -torch.inf)
            tiles[window] = AttentionTile(units, batches, gather, 0, mask[:, None, :, None, :])
        return RunPlan(
            rows=rows,
            padded=rows,
            bounds=((0, rows),),
            cells=flat_rows(cells, kv_heads).flatten(),
            looks={
                kind: Look(cos[positions], sin[positions], (tiles[kind.window],))
                for kind, (cos, sin) in self._cache.rotary.items()
            },
        )


class FixedRuns:
    """Runs of one session in fixed shapes; a shape's step is made when it is first needed.

    The cache has a block more than ``cells`` need: padding rows write there.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights[Matrix]],
        config: ModelConfig,
        cells: int,
        tiling: Tiling,
        device: Device,
        layer_forward: LayerForward = forward_layer,
        least_reach: int = 1,
    ) -> None:
        self.cells = cells
        self._least_reach = least_reach
        self.cache = KvCache(config, [layer.kind for layer in layers], cells, device.place, spare_blocks=1)
        self._tiling, self._device = tiling, device
        self._steps: dict[StepShape, Step] = {}
        self._parts = (layers, config, self.cache, device, layer_forward)

    def forward(
        self, hidden: torch.Tensor, run: Run, cells: Sequence[int], table: CellTable, should_stop: Callable[[], bool]
    ) -> torch.Tensor | None:
        """Takes ``run``, which ``table`` has admitted last and given ``cells``, through the layers.

        ``hidden`` ``[rows, hidden]`` and what is returned are on the device. None once ``should_stop()``, asked before
        every tile, says so.
        """
        bounds = self._bounds(run)
        order = np.argsort(run.positions, kind="stable")
        if len(bounds) > 1 and (order[:-1] > order[1:]).any():
            at = torch.from_numpy(order).to(hidden.device)
            positions, sequences = (tuple(column[row] for row in order) for column in (run.positions, run.sequences))
            ordered = dataclasses.replace(run, positions=positions, sequences=sequences)
            found = self.forward(hidden[at], ordered, [cells[row] for row in order], table, should_stop)
            return None if found is None else torch.empty_like(found).index_copy_(0, at, found)
        outputs = []
        for start, stop in bounds:
            if should_stop():
                return None
            end = min(stop, run.rows)
            outputs.append(self._tile(hidden[start:end], run, start, end, stop - start, cells[start:end], table))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _bounds(self, run: Run) -> tuple[tuple[int, int], ...]:
        if run.kind is RunKind.PREFILL:
            return ((0, -(-run.rows // BLOCK) * BLOCK),)
        return self._tiling.split(run.rows)[1]

    def _tile(
        self, hidden: torch.Tensor, run: Run, start: int, stop: int, padded: int, cells: Sequence[int], table: CellTable
    ) -> torch.Tensor:
        units = find_units(table, run, start, stop)
        shape = StepShape(padded, max(self._least_reach, _reach(len(units.starts))))
        if shape not in self._steps:
            self._steps[shape] = Step(shape, *self._parts)
        step = self._steps[shape]
        positions = np.array(run.positions[start:stop])
        numbers = self._numbers(step, positions, units, cells)
        step.numbers.copy_(self._device.send(torch.from_numpy(numbers)).arrived())
        step.rows.copy_(pad_rows(hidden, padded))
        return step.repeat()[: stop - start].clone()  # the next tile of this shape overwrites it

    def _numbers(self, step: Step, positions: Numbers, units: Units, cells: Sequence[int]) -> Numbers:
        """A step's numbers for rows at ``positions`` with ``cells``."""
        rows, count, padding = step.shape.rows, step.shape.units, step.shape.rows - len(positions)
        spare = -(-self.cells // BLOCK) * BLOCK + np.arange(padding) % BLOCK
        unit_cells = np.zeros((count, BLOCK), np.int64)
        unit_cells[: len(units.cells)] = units.cells
        last = np.zeros((count, rows), np.int64)
        last[: len(units.counts), : len(positions)] = units.counts
        last[0, len(positions) :] = 1  # padding rows see something, to stay finite
        firsts = []
        for window in step.windows:
            first = np.zeros((count, rows), np.int64)
            first[: len(units.counts), : len(positions)] = units.hidden(positions, window)
            firsts.append(first)
        parts = [np.pad(positions, (0, padding)), np.concatenate((cells, spare)), unit_cells, *firsts, last]
        return np.concatenate([part.ravel() for part in parts]).astype(np.int64)


def _reach(units: int) -> int:
    """The least power of two of batches that hold so many units."""
    return 1 << (-(-units // BATCHED_BLOCKS) - 1).bit_length()


class _RandomModel:
    """Random weights for the layers of a model, as ``ModelSource`` reads them."""

    path = Path("random weights")

    def __init__(self, config: ModelConfig) -> None:
        c = self.config = config
        self._generator = torch.Generator().manual_seed(0)
        queries, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self._shapes = {
            "q_proj": (queries, c.hidden),
            "k_proj": (kv, c.hidden),
            "v_proj": (kv, c.hidden),
            "o_proj": (c.hidden, queries),
            "gate_proj": (c.intermediate, c.hidden),
            "up_proj": (c.intermediate, c.hidden),
            "down_proj": (c.hidden, c.intermediate),
            "q_norm": (c.head_dim,),
            "k_norm": (c.head_dim,),
        }

    def blocks(self, name: str) -> None:
        """None: nothing is quantized."""

    def read(self, name: str) -> torch.Tensor:
        """Entries of about the size that a trained model's have."""
        *_, part, kind = name.split(".")
        shape = self._shapes.get(part, (self.config.hidden,))
        shape = shape[:1] if kind == "bias" else shape
        scale, mean = (0.1, 1.0) if len(shape) == 1 else (shape[-1] ** -0.5, 0.0)
        return torch.randn(shape, generator=self._generator) * scale + mean


def agreeing_steps(
    tiling: Tiling,
    config: ModelConfig,
    dtype: torch.dtype,
    device: Device,
    layer_forward: LayerForward = forward_layer,
    probes: int = 1,
) -> Tiling:
    """Of the tiling's sizes the largest set that agree on a whole layer in fixed shapes, whatever a step's reach.

    They are tried on so many rows as ``probes`` says.

    Raises:
        BadInputError: no size agrees even with itself.
    """
    layer = read_layer(_RandomModel(config), 0, dtype, tiling.kernel, device.place)
    generator = torch.Generator().manual_seed(0)
    agreeing = [tiling.sizes]

    def product(rows: torch.Tensor) -> torch.Tensor:
        """NaN where the reach matters: no size agrees then."""
        near, far = (_probe_layer(layer, config, rows, reach, device, layer_forward) for reach in (1, 2))
        same: torch.Tensor = near == far
        return torch.where(same, near, torch.nan)

    with torch.inference_mode():
        for probe in torch.randn(probes, config.hidden, generator=generator):
            agreeing = refined(agreeing, product, probe, generator, device.place)
    return dataclasses.replace(tiling, sizes=largest(agreeing))


_PROBED_CONTEXT = 3 * BLOCK + 5


def _probe_layer(
    layer: LayerWeights[Matrix],
    config: ModelConfig,
    rows: torch.Tensor,
    reach: int,
    device: Device,
    layer_forward: LayerForward,
) -> torch.Tensor:
    """Each of the ``rows``, alone on its branch behind a shared prefix."""
    count, everyone = len(rows), (1 << len(rows)) - 1
    table = CellTable(_PROBED_CONTEXT + count, count)
    table.allocate(range(_PROBED_CONTEXT), [everyone] * _PROBED_CONTEXT)
    branches = tuple(1 << row for row in range(count))
    run = Run(0, 0, RunKind.SPECULATIVE, (0,) * count, (_PROBED_CONTEXT,) * count, branches)
    tiling = Tiling((count,))
    fixed = FixedRuns([layer], config, _PROBED_CONTEXT + LARGEST_TILE, tiling, device, layer_forward, reach)
    generator = torch.Generator().manual_seed(0)
    for cache in (fixed.cache.keys, fixed.cache.values):
        cache.copy_(torch.randn(cache.shape, generator=generator))
    found = fixed.forward(rows, run, table.admit(run), table, _never)
    assert found is not None
    return found
