"""The decoder layer that all families share, in PyTorch: one run through such layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from backends.models.attention import AttentionTile, attend, flat_rows, plan_tiles
from backends.models.config import LayerKind, ModelConfig
from backends.models.devices import CPU
from backends.models.exact import BLOCK, Tiling, float_product, joined
from backends.models.loading import ModelSource
from backends.models.products import Kernel, Matrix, lay_out
from backends.models.rowwise import gated, rms_norm
from backends.models.weights import LayerWeights, Weight, WeightReader
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import Run, RunKind


def read_layer(
    source: ModelSource, index: int, dtype: torch.dtype, kernel: Kernel, place: torch.device = CPU
) -> LayerWeights[Matrix]:
    """Layer ``index`` of the model at ``place``, its matrices in ``dtype`` laid out for ``kernel``."""

    def lay(weight: Weight) -> Matrix:
        assert isinstance(weight, torch.Tensor)
        return lay_out(weight, kernel)

    return WeightReader(source, dtype, lay, place).layer(index)


class KvCache:
    """Keys and values of one session on one stage, and the rotary tables of each of its layers' ``kinds``.

    ``keys`` and ``values`` are ``[layers, blocks, kv_heads, 64, head_dim]`` each, see ``attention.py``.
    """

    def __init__(
        self,
        config: ModelConfig,
        kinds: Sequence[LayerKind],
        cells: int,
        place: torch.device = CPU,
        spare_blocks: int = 0,
    ) -> None:
        shape = (len(kinds), -(-cells // BLOCK) + spare_blocks, config.kv_heads, BLOCK, config.head_dim)
        # Zeros, not whatever memory held: masked cells meet a weight of zero, and zero times NaN is NaN.
        # Written at once: pages that are touched as the text reaches them would make memory grow with it.
        self.keys = torch.empty(shape, device=place).zero_()
        self.values = torch.empty(shape, device=place).zero_()
        self.rotary = {kind: rotary_tables(kind, config.head_dim, cells, place) for kind in dict.fromkeys(kinds)}


def rotary_frequencies(kind: LayerKind, head_dim: int) -> torch.Tensor:
    """By how much each pair of a head turns from one position to the next, ``[head_dim / 2]`` float32."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / kind.rope_theta ** (pairs / head_dim)
    return frequencies / torch.tensor(kind.rope_factors) if kind.rope_factors else frequencies


def rotary_tables(
    kind: LayerKind, head_dim: int, positions: int, place: torch.device = CPU
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines, and sines signed for the swapped halves, both ``[positions, 1, head_dim]`` (RoPE, arXiv 2104.09864)."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), rotary_frequencies(kind, head_dim)).double()
    cos, sin = angles.cos().float().to(place), angles.sin().float().to(place)
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Look:
    """What a run needs to know in layers of one kind: its rows' rotations, and what each of its tiles attends to."""

    cos: torch.Tensor
    sin: torch.Tensor
    tiles: tuple[AttentionTile, ...]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """All that the layers need to know of a run, worked out once: tiles, cells, and a look for each kind of layer.

    Rows are padded to ``padded`` in total; ``bounds`` are the tiles' row ranges; ``cells`` is where the rows' keys and
    values go in the flat cache, head by head.
    """

    rows: int
    padded: int
    bounds: tuple[tuple[int, int], ...]
    cells: torch.Tensor
    looks: Mapping[LayerKind, Look]


def plan_run(run: Run, cells: Sequence[int], table: CellTable, cache: KvCache, tiling: Tiling) -> RunPlan:
    """Prepares ``run``, which ``table`` has admitted last and given ``cells``.

    A prefill chunk is always computed as a whole, so it is one tile of whatever size; other rows go by ``tiling``.
    """
    rows = run.rows
    padded, bounds = (rows, ((0, rows),)) if run.kind is RunKind.PREFILL else tiling.split(rows)
    positions = torch.tensor(run.positions + (0,) * (padded - rows))
    windows = {kind.window for kind in cache.rotary}
    tiles = [
        plan_tiles(table, run, start, min(stop, rows), stop, windows, cache.keys.shape[2]) for start, stop in bounds
    ]
    return RunPlan(
        rows=rows,
        padded=padded,
        bounds=bounds,
        cells=flat_rows(cells, cache.keys.shape[2]).flatten(),
        looks={
            kind: Look(cos[positions], sin[positions], tuple(tile[kind.window] for tile in tiles))
            for kind, (cos, sin) in cache.rotary.items()
        },
    )


def project(
    rows: torch.Tensor, layer: LayerWeights[Matrix], config: ModelConfig, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A tile's ``rows`` ``[rows, hidden]``, whose rotations are ``cos`` and ``sin``, on their way into attention.

    Their queries ``[rows, kv_heads, group, head_dim]``, scaled, and keys and values ``[rows, kv_heads, head_dim]``.
    """
    count, heads, kv_heads, half = len(rows), config.heads, config.kv_heads, config.head_dim // 2
    qkv = float_product(rms_norm(rows, layer.attention_norm, config.norm_eps), layer.qkv)
    if layer.qkv_bias is not None:  # not within the product: its kernels round differently by their rows
        qkv = qkv + layer.qkv_bias
    qkv = qkv.view(count, -1, config.head_dim)
    qk, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if layer.qk_norm is not None:
        qk = rms_norm(qk, layer.qk_norm, config.norm_eps)
    swapped = torch.cat((qk[..., half:], qk[..., :half]), -1)
    qk = qk * cos + swapped * sin
    queries = (qk[:, :heads] * config.query_scale).view(count, kv_heads, config.group, config.head_dim)
    return queries, qk[:, heads:], values


def conclude(
    rows: torch.Tensor, attended: torch.Tensor, layer: LayerWeights[Matrix], config: ModelConfig
) -> torch.Tensor:
    """What becomes of a tile's ``rows`` after they ``attended`` ``[rows, heads * head_dim]``: ``[rows, hidden]``."""
    eps = config.norm_eps
    change = float_product(attended, layer.output)
    if layer.post_attention_norm is not None:
        change = rms_norm(change, layer.post_attention_norm, eps)
    rows = rows + change
    gate_up = float_product(rms_norm(rows, layer.mlp_norm, eps), layer.gate_up)
    change = float_product(gated(gate_up, config.family.activation), layer.down)
    if layer.post_mlp_norm is not None:
        change = rms_norm(change, layer.post_mlp_norm, eps)
    return rows + change


Project = Callable[
    [torch.Tensor, LayerWeights[Matrix], ModelConfig, torch.Tensor, torch.Tensor],
    tuple[torch.Tensor, torch.Tensor, torch.Tensor],
]
"""What :func:`project` is, or does as it does."""

Conclude = Callable[[torch.Tensor, torch.Tensor, LayerWeights[Matrix], ModelConfig], torch.Tensor]
"""What :func:`conclude` is, or does as it does."""


def forward_layer(
    hidden: torch.Tensor,
    layer: LayerWeights[Matrix],
    config: ModelConfig,
    plan: RunPlan,
    keys: torch.Tensor,
    values: torch.Tensor,
    before: Project = project,
    after: Conclude = conclude,
) -> torch.Tensor:
    """``hidden`` ``[padded, hidden]`` through one layer, tile by tile; its cache is ``keys`` and ``values``.

    With bfloat16 matrices the result is rounded to it: a stage may end here, and what travels on is bfloat16. That is
    done here because torch.compile leaves such a rounding out if it sees the way back to float32 with it.
    """
    look, tiles = plan.looks[layer.kind], [slice(*bound) for bound in plan.bounds]
    projected = [before(hidden[rows], layer, config, look.cos[rows], look.sin[rows]) for rows in tiles]
    queries, *fresh = zip(*projected, strict=True)
    for cache, parts in zip((keys, values), fresh, strict=True):  # tiles may see one another
        cache.view(-1, config.head_dim).index_copy_(0, plan.cells, joined(parts)[: plan.rows].flatten(0, 1))
    attended = [attend(query, keys, values, tile) for query, tile in zip(queries, look.tiles, strict=True)]
    hidden = joined([after(hidden[rows], seen, layer, config) for rows, seen in zip(tiles, attended, strict=True)])
    return hidden.bfloat16().float() if layer.down.dtype == torch.bfloat16 else hidden


LayerForward = Callable[
    [torch.Tensor, LayerWeights[Matrix], ModelConfig, RunPlan, torch.Tensor, torch.Tensor], torch.Tensor
]
"""What :func:`forward_layer` is, or does as it does."""


def run_layers(
    hidden: torch.Tensor,
    layers: Sequence[LayerWeights[Matrix]],
    config: ModelConfig,
    plan: RunPlan,
    cache: KvCache,
    should_stop: Callable[[], bool],
    layer_forward: LayerForward = forward_layer,
) -> torch.Tensor | None:
    """Sends ``hidden`` ``[padded, hidden]`` through ``layers``; None once ``should_stop()`` says so."""
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        if should_stop():
            return None
        hidden = layer_forward(hidden, layer, config, plan, keys, values)
    return hidden
