"""Measures one forward pass on this machine beside transformers and the reading of the weights; the price of exactness.

``python -m analysis.forward_speed -o docs/forward-speed.md``
"""

import argparse
import datetime
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from analysis.pages import fill, markdown_table
from backends.models import decoder
from backends.models.attention import AttentionTile
from backends.models.devices import DTYPES, QUANTIZED
from backends.models.exact import Tiling
from backends.models.finding import DEFAULT_MODEL
from backends.models.loading import ModelSource, open_model
from backends.models.native.engine import NativeEngine
from backends.models.native.weights import Arena
from backends.models.stage_model import StageModel
from backends.models.torch_engine import TorchEngine
from backends.sampling import Sampling
from pipesim.cli.common import check_outputs, diagnostic
from pipesim.scheduling.runs import END, Run, RunKind, SequenceRemove

CONTEXT = 256
"""KV cells that the rows of a forward pass attend to, beside their own."""

ROWS = (1, 2, 4, 8, 16)
MEASURED = ("bfloat16", "float32", QUANTIZED)

Forward = Callable[[int], object]
"""Computes the logits of so many new rows, and forgets the rows."""


def ours(source: ModelSource, dtype: str, kernels: str) -> tuple[StageModel, Forward]:
    """The whole model as one stage, and its forward pass."""
    model = StageModel(source, 0, source.config.layers, DTYPES[dtype], kernels=kernels)
    return opened(model)


def opened(model: StageModel) -> tuple[StageModel, Forward]:
    """``model``, a whole one, with a session whose first ``CONTEXT`` cells are filled, and its forward pass."""
    model.open_session(0, 2 * CONTEXT, 2, Sampling())
    for start in range(0, CONTEXT, 64):
        prefill = Run(0, 0, RunKind.PREFILL, tuple(range(64)), tuple(range(start, start + 64)), (3,) * 64, 63)
        model.logits(0, prefill, None, model.admit(0, prefill))

    def forward(rows: int) -> torch.Tensor | None:
        at = tuple(range(CONTEXT, CONTEXT + rows))
        run = Run(1, 0, RunKind.SPECULATIVE, tuple(range(rows)), at, (1,) * rows, 0, (SequenceRemove(1, CONTEXT, END),))
        return model.logits(0, run, None, model.admit(0, run))

    return model, forward


@contextmanager
def without_exactness(model: StageModel) -> Iterator[None]:
    """Rows are not padded, and attention is PyTorch's: for timing, it sees a plain copy of the cache made but once."""
    engine = model.engine
    assert isinstance(engine, TorchEngine)
    tiling = engine.tiling
    engine.tiling = Tiling(tuple(range(1, max(ROWS) + 1)), tiling.kernel)
    with mock.patch.object(decoder, "attend", _sdpa):
        yield
    engine.tiling = tiling


def _sdpa(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tile: AttentionTile) -> torch.Tensor:
    seen = CONTEXT + len(queries)
    heads = queries.flatten(1, 2).transpose(0, 1)
    keys, values = (_plain(cache.data_ptr(), cache)[None, :, :seen] for cache in (keys, values))
    mask = _causal(len(queries))
    attended = F.scaled_dot_product_attention(heads[None], keys, values, mask, scale=1.0, enable_gqa=True)
    return attended[0].transpose(0, 1).flatten(1)


_copies: dict[int, torch.Tensor] = {}


def _plain(address: int, cache: torch.Tensor) -> torch.Tensor:
    if address not in _copies:
        _copies[address] = cache.transpose(0, 1).flatten(1, 2)
    return _copies[address]


@functools.cache
def _causal(rows: int) -> torch.Tensor:
    return torch.ones(rows, CONTEXT + rows, dtype=torch.bool).tril(CONTEXT)


def transformers_forward(source: ModelSource, dtype: torch.dtype) -> Forward:
    """The eager forward of a model of the same shape, with a cache that is cut back after each short pass."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    c = source.config
    config = LlamaConfig(
        vocab_size=c.vocabulary,
        hidden_size=c.hidden,
        intermediate_size=c.intermediate,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        max_position_embeddings=c.max_context,
        tie_word_embeddings=c.tied,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    cache = DynamicCache()

    @torch.inference_mode()
    def forward(rows: int) -> torch.Tensor:
        logits: torch.Tensor = model(torch.arange(rows)[None], past_key_values=cache).logits
        if rows < CONTEXT:
            cache.crop(-rows)
        return logits

    forward(CONTEXT)
    return forward


def products_alone(engine: NativeEngine) -> Forward:
    """The matrix products of the forward pass, and nothing else."""
    matrices = engine.matrices
    inputs = {matrix.inputs: torch.randn(max(ROWS), matrix.inputs) for matrix in matrices}

    def forward(rows: int) -> None:
        for matrix in matrices:
            matrix.product(inputs[matrix.inputs][:rows])

    return forward


def reading(size: int) -> Forward:
    """Reads ``size`` bytes, once."""
    memory = torch.from_numpy(Arena().keep(np.ones(size // 4, np.float32)))
    return lambda _: memory.sum()


def take_turns(forwards: Mapping[str, Forward], rows: Sequence[int], rounds: int) -> dict[tuple[str, int], float]:
    """Median CPU ms of each forward by rows; in each round every one has its turn, after one that is not counted."""
    times: dict[tuple[str, int], list[float]] = {(name, count): [] for name in forwards for count in rows}
    for turn in range(rounds + 1):
        for count in rows:
            for name, forward in forwards.items():
                began = time.process_time()
                forward(count)
                if turn:
                    times[name, count].append(1e3 * (time.process_time() - began))
    return {key: statistics.median(found) for key, found in times.items()}


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians in ms of one dtype by ``(name, rows)``; ``arithmetic`` of all engines, the native one's first."""

    dtype: str
    arithmetic: tuple[str, ...]
    ms: Mapping[tuple[str, int], float]

    def ratio(self, name: str, other: str, rows: int = 1) -> float:
        """How many times as long ``name`` takes as ``other``."""
        return self.ms[name, rows] / self.ms[other, rows]


EXACT, PRODUCTS, TORCH, COMPILED, FASTEST, EAGER, FLOOR = (
    "ours, native kernels",
    "its matrix products alone",
    "ours, PyTorch's operations",
    "ours, torch.compile",
    "the same without exactness",
    "transformers, eager",
    "reading the weights",
)


def measure(
    source: ModelSource, dtype: str, rows: Sequence[int] = ROWS, rounds: int = 9, compiles: bool = False
) -> Measured:
    """All contestants in turns, on one thread. Quantized weights are nobody's but the native kernels'.

    ``compiles``: torch.compile is one of them, which takes a minute or more before.
    """
    torch.set_num_threads(1)
    native, forward = ours(source, dtype, "native")
    assert isinstance(native.engine, NativeEngine)
    arithmetic = [native.arithmetic]
    forwards: dict[str, Forward] = {EXACT: forward, PRODUCTS: products_alone(native.engine)}
    if dtype != QUANTIZED:
        model, forwards[TORCH] = ours(source, dtype, "torch")
        arithmetic.append(model.arithmetic)
        if compiles:
            compiled, forwards[COMPILED] = ours(source, dtype, "compile")
            arithmetic.append(compiled.arithmetic)

        def fastest(count: int) -> object:
            with without_exactness(model):
                return forwards[TORCH](count)

        forwards[FASTEST] = fastest
        forwards[EAGER] = transformers_forward(source, getattr(torch, dtype))
    forwards[FLOOR] = reading(native.engine.weight_bytes)
    return Measured(dtype, tuple(arithmetic), take_turns(forwards, rows, rounds))


def page(found: Sequence[Measured]) -> str:
    """The page as Markdown."""
    today = datetime.datetime.now(datetime.UTC).date()
    parts = [
        "# How fast one forward pass is",
        fill(
            f"SmolLM2-135M, all layers and the LM head, logits of every row, {CONTEXT} KV cells before them. Measured "
            f"on {today} with PyTorch {torch.__version__}, one thread, {platform.machine()}, {os.cpu_count()} cores "
            "that other work shared: read ratios. Milliseconds of CPU time, medians; all lines of a table took turns."
        ),
    ]
    for one in found:
        names = list(dict.fromkeys(name for name, _ in one.ms))
        rows = list(dict.fromkeys(count for _, count in one.ms))
        parts += [
            f"## {one.dtype}",
            fill(f"Arithmetic: {'; '.join(one.arithmetic)}."),
            markdown_table(
                ["", *(f"{count} row{'s' * (count > 1)}" for count in rows)],
                [[name, *(f"{one.ms[name, count]:.1f}" for count in rows)] for name in names],
            ),
            markdown_table(
                ["ratios", *(f"{count} row{'s' * (count > 1)}" for count in rows)],
                [
                    [f"{top} / {bottom}", *(f"{one.ratio(top, bottom, count):.2f}" for count in rows)]
                    for top, bottom in (
                        (EAGER, EXACT),
                        (EXACT, FLOOR),
                        (PRODUCTS, FLOOR),
                        (EXACT, FASTEST),
                        (TORCH, EXACT),
                        (TORCH, COMPILED),
                    )
                    if top in names and bottom in names
                ],
            ),
        ]
    parts += [
        fill(
            "The native kernels compute each row in an order of its own, so exactness costs them nothing but the "
            "freedom to choose another order: nothing is padded. PyTorch's operations are exact in row tiles; "
            f"*{FASTEST}* is that with rows that are not padded to a tile and with PyTorch's "
            "scaled_dot_product_attention. So the price of exactness is native / without, below 1 where the exact path "
            "is the faster one. Reading is one sum over as many bytes as the kernels' weights take, in huge pages as "
            "they are. Aims, at 1 row in bfloat16: transformers at least 1.4 times as slow as ours, and ours at most "
            "1.7 times (stretch 1.3) as slow as reading. " + _verdict(found)
        ),
        "## What is refused",
        fill(
            "int8 dynamic quantization (`torch.ao.quantization.quantize_dynamic`) is no dtype here: it scales the "
            f"activations of all rows of a run by one number. The start-up check's word: {int8_verdict()}. Native "
            "kernels that fail their self-check, on a machine that compiles them wrong, are not used either, and the "
            "log says so."
        ),
        "Made by `python -m analysis.forward_speed -o docs/forward-speed.md`. Against llama.cpp: "
        "[llama-cpp.md](llama-cpp.md).",
    ]
    return "\n\n".join(parts) + "\n"


def int8_verdict() -> str:
    """Whether a dynamically quantized product passes the check that row tiles must pass."""
    from torch.ao.quantization import quantize_dynamic

    from backends.models.exact import LARGEST_TILE, cancelling_pair, probe_result

    generator = torch.Generator().manual_seed(0)
    probe, weight = cancelling_pair(576, 576, torch.float32, generator)
    layer = torch.nn.Linear(576, 576, bias=False)
    layer.weight.data = weight
    quantized = quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, torch.qint8)
    noise = 8 * torch.randn(LARGEST_TILE, 576, generator=generator)  # neighbours with the largest activation
    with torch.inference_mode():
        sizes = [rows for rows in range(2, 9) if probe_result(quantized, probe, noise, rows) is not None]
    return f"exact for {sizes} rows" if sizes else "a row's product changes with the rows beside it, for any row count"


def _verdict(found: Sequence[Measured]) -> str:
    half = next(one for one in found if one.dtype == "bfloat16")
    speedup, distance = half.ratio(EAGER, EXACT), half.ratio(EXACT, FLOOR)
    return (
        f"The first is {'reached' if speedup >= 1.4 else 'missed'} ({speedup:.2f}), the second "
        f"{'reached' if distance <= 1.7 else 'missed'} ({distance:.2f})."
    )


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contestant")
    options = parser.parse_args()
    check_outputs(options.output)
    source = open_model(DEFAULT_MODEL)
    options.output.write_text(
        page([measure(source, dtype, rounds=options.rounds, compiles=True) for dtype in MEASURED])
    )
    diagnostic(f"wrote {options.output}")


if __name__ == "__main__":
    main()
