"""The layers of a Llama-family model: their weights, and one run through them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from backends.models.attention import AttentionTile, attend, plan_tile
from backends.models.config import ModelConfig
from backends.models.exact import Tiling, tiled_linear
from backends.models.loading import ModelSource
from pipesim.errors import BadInputError
from pipesim.scheduling.cells import CellTable
from pipesim.scheduling.runs import Run, RunKind


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer: ``qkv`` is ``[qkv_width, hidden]``, ``gate_up`` ``[2 * intermediate, hidden]``."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def read_weight(source: ModelSource, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """One weight, its shape checked."""
    weight = source.read(name)
    if tuple(weight.shape) != shape:
        raise BadInputError(
            f"{source.path}: weight {name!r} has shape {list(weight.shape)}, the config asks for {list(shape)}"
        )
    return weight.to(dtype).contiguous()


def read_layer(source: ModelSource, index: int, dtype: torch.dtype) -> LayerWeights:
    """Layer ``index`` of the model, its parallel projections fused."""
    c = source.config

    def read(name: str, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return read_weight(source, f"model.layers.{index}.{name}.weight", shape, dtype)

    queries, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return LayerWeights(
        attention_norm=read("input_layernorm", c.hidden, dtype=torch.float32),
        qkv=torch.cat(
            [
                read("self_attn.q_proj", queries, c.hidden),
                read("self_attn.k_proj", kv, c.hidden),
                read("self_attn.v_proj", kv, c.hidden),
            ]
        ),
        output=read("self_attn.o_proj", c.hidden, queries),
        mlp_norm=read("post_attention_layernorm", c.hidden, dtype=torch.float32),
        gate_up=torch.cat(
            [read("mlp.gate_proj", c.intermediate, c.hidden), read("mlp.up_proj", c.intermediate, c.hidden)]
        ),
        down=read("mlp.down_proj", c.hidden, c.intermediate),
    )


class KvCache:
    """Keys and values of one session on one stage, ``[layers, kv_heads, cells, head_dim]`` each, and rotary tables."""

    def __init__(self, config: ModelConfig, layers: int, cells: int) -> None:
        shape = (layers, config.kv_heads, cells, config.head_dim)
        # Zeros, not whatever memory held: masked cells meet a weight of zero, and zero times NaN is NaN.
        self.keys = torch.zeros(shape)
        self.values = torch.zeros(shape)
        self.cos, self.sin = rotary_tables(config, cells)


def rotary_tables(config: ModelConfig, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines, and sines signed for the swapped halves, both ``[positions, 1, head_dim]`` (RoPE, arXiv 2104.09864)."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    if config.rope_factors:
        frequencies = frequencies / torch.tensor(config.rope_factors)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies).double()
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """All that the layers need to know of a run, worked out once: tiles, rotations, cells, attention units.

    Rows are padded to ``padded`` in total; ``bounds`` are the tiles' row ranges.
    """

    rows: int
    padded: int
    bounds: tuple[tuple[int, int], ...]
    cos: torch.Tensor
    sin: torch.Tensor
    cells: torch.Tensor
    attention: tuple[AttentionTile, ...]


def plan_run(run: Run, cells: Sequence[int], table: CellTable, cache: KvCache, tiling: Tiling) -> RunPlan:
    """Prepares ``run``, which ``table`` has admitted last and given ``cells``.

    A prefill chunk is always computed as a whole, so it is one tile of whatever size; other rows go by ``tiling``.
    """
    rows = run.rows
    padded, bounds = (rows, ((0, rows),)) if run.kind is RunKind.PREFILL else tiling.split(rows)
    positions = torch.tensor(run.positions + (0,) * (padded - rows))
    return RunPlan(
        rows=rows,
        padded=padded,
        bounds=bounds,
        cos=cache.cos[positions],
        sin=cache.sin[positions],
        cells=torch.tensor(cells),
        attention=tuple(plan_tile(table, run, start, min(stop, rows), stop) for start, stop in bounds),
    )


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square normalisation of each row (arXiv 1910.07467)."""
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight


def run_layers(
    hidden: torch.Tensor,
    layers: Sequence[LayerWeights],
    config: ModelConfig,
    plan: RunPlan,
    cache: KvCache,
    should_stop: Callable[[], bool],
) -> torch.Tensor | None:
    """Sends ``hidden`` ``[padded, hidden]`` through ``layers``; None once ``should_stop()`` says so."""
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        if should_stop():
            return None
        normed = rms_norm(hidden, layer.attention_norm, config.norm_eps)
        attended = _attention(normed, layer, config, plan, keys, values)
        hidden = hidden + tiled_linear(attended, layer.output, plan.bounds)
        normed = rms_norm(hidden, layer.mlp_norm, config.norm_eps)
        gate, up = tiled_linear(normed, layer.gate_up, plan.bounds).chunk(2, -1)
        hidden = hidden + tiled_linear(F.silu(gate) * up, layer.down, plan.bounds)
    return hidden


def _attention(
    normed: torch.Tensor,
    layer: LayerWeights,
    config: ModelConfig,
    plan: RunPlan,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Writes the rows' keys and values into their cells, then attends; returns ``[padded, heads * head_dim]``."""
    heads, kv_heads, half = config.heads, config.kv_heads, config.head_dim // 2
    qkv = tiled_linear(normed, layer.qkv, plan.bounds).view(plan.padded, -1, config.head_dim)
    qk, value = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    swapped = torch.cat((qk[..., half:], qk[..., :half]), -1)
    qk = qk * plan.cos + swapped * plan.sin
    keys.index_copy_(1, plan.cells, qk[: plan.rows, heads:].transpose(0, 1))
    values.index_copy_(1, plan.cells, value[: plan.rows].transpose(0, 1))
    queries = (qk[:, :heads] * config.head_dim**-0.5).view(plan.padded, kv_heads, config.group, config.head_dim)
    tiles = zip(plan.bounds, plan.attention, strict=True)
    outputs = [attend(queries[start:stop], keys, values, tile) for (start, stop), tile in tiles]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
