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

import torch
import torch.nn.functional as F  # noqa: N812

from analysis.pages import fill, markdown_table
from backends.models import decoder, exact
from backends.models.attention import AttentionTile
from backends.models.exact import Tiling
from backends.models.finding import DEFAULT_MODEL
from backends.models.huge_pages import use_huge_pages
from backends.models.loading import ModelSource, open_model
from backends.models.products import Kernel, available_kernels
from backends.models.stage_model import StageModel
from backends.models.torch_engine import TorchEngine
from backends.sampling import Sampling
from pipesim.cli.common import check_outputs, diagnostic
from pipesim.scheduling.runs import END, Run, RunKind, SequenceRemove

CONTEXT = 256
"""KV cells that the rows of a forward pass attend to, beside their own."""

ROWS = (1, 2, 4, 8, 16)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Forward = Callable[[int], object]
"""Computes the logits of so many new rows, and forgets the rows."""


def ours(source: ModelSource, dtype: torch.dtype, kernel: Kernel | None = None) -> tuple[StageModel, Forward]:
    """The whole model as one stage, and its forward pass; with ``kernel`` instead of the one that would be chosen."""
    kernels = (kernel,) if kernel else available_kernels(dtype)
    exact._choose_tiling.cache_clear()
    with mock.patch.object(exact, "available_kernels", return_value=kernels):
        model = StageModel(source, 0, source.config.layers, dtype)
    exact._choose_tiling.cache_clear()
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


def products_alone(model: StageModel) -> Forward:
    """The matrix products of the forward pass in its tiles, and nothing else."""
    engine = model.engine
    assert isinstance(engine, TorchEngine)
    matrices = [m for layer in engine.layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    matrices += [engine.head] if engine.head else []
    inputs = {matrix.shape[1]: torch.randn(max(ROWS), matrix.shape[1]).to(matrix.dtype) for matrix in matrices}

    @torch.inference_mode()
    def forward(rows: int) -> None:
        _, bounds = engine.tiling.split(rows)
        for matrix in matrices:
            for start, stop in bounds:
                matrix.product(inputs[matrix.shape[1]][start:stop])

    return forward


def reading(parameters: int, dtype: torch.dtype) -> Forward:
    """Reads as many bytes as the weights have, once."""
    memory = torch.ones(parameters * dtype.itemsize // 4)
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
    """Medians in ms of one dtype by ``(name, rows)``, and what the start-up check chose."""

    dtype: str
    tiling: Tiling
    ms: Mapping[tuple[str, int], float]

    def ratio(self, name: str, other: str, rows: int = 1) -> float:
        """How many times as long ``name`` takes as ``other``."""
        return self.ms[name, rows] / self.ms[other, rows]


EXACT, PRODUCTS, FASTEST, UNPACKED, EAGER, FLOOR = (
    "ours, exact",
    "its matrix products alone",
    "ours, without exactness",
    "ours, exact, plain weights",
    "transformers, eager",
    "reading the weights",
)


def measure(source: ModelSource, dtype: str, rows: Sequence[int] = ROWS, rounds: int = 9) -> Measured:
    """All contestants in turns, on one thread."""
    torch.set_num_threads(1)
    model, forward = ours(source, DTYPES[dtype])

    def fastest(count: int) -> object:
        with without_exactness(model):
            return forward(count)

    forwards: dict[str, Forward] = {EXACT: forward, PRODUCTS: products_alone(model), FASTEST: fastest}
    if available_kernels(DTYPES[dtype])[0] is not Kernel.PLAIN:
        forwards[UNPACKED] = ours(source, DTYPES[dtype], Kernel.PLAIN)[1]
    forwards[EAGER] = transformers_forward(source, DTYPES[dtype])
    forwards[FLOOR] = reading(model.parameters, DTYPES[dtype])
    use_huge_pages()  # for all alike
    assert isinstance(model.engine, TorchEngine)
    return Measured(dtype, model.engine.tiling, take_turns(forwards, rows, rounds))


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
            f"The start-up check chose {one.tiling}.",
            markdown_table(
                ["", *(f"{count} row{'s' * (count > 1)}" for count in rows)],
                [[name, *(f"{one.ms[name, count]:.1f}" for count in rows)] for name in names],
            ),
            markdown_table(
                ["ratios", *(f"{count} row{'s' * (count > 1)}" for count in rows)],
                [
                    [f"{top} / {bottom}", *(f"{one.ratio(top, bottom, count):.2f}" for count in rows)]
                    for top, bottom in ((EAGER, EXACT), (EXACT, FLOOR), (PRODUCTS, FLOOR), (EXACT, FASTEST))
                ],
            ),
        ]
    parts += [
        fill(
            f"*{FASTEST}* is the same module with rows that are not padded to a tile and with PyTorch's "
            "scaled_dot_product_attention: the price of exactness is the last ratio. Reading is one sum over as many "
            "bytes that lie together. All lie in huge pages where Linux has them. Aims, at 1 row in bfloat16: "
            "transformers at least 1.4 times as slow as ours, and ours at most 1.7 times as slow as reading them. "
            + _verdict(found)
        ),
        "Made by `python -m analysis.forward_speed -o docs/forward-speed.md`.",
    ]
    return "\n\n".join(parts) + "\n"


def _verdict(found: Sequence[Measured]) -> str:
    half = next(one for one in found if one.dtype == "bfloat16")
    speedup, distance = half.ratio(EAGER, EXACT), half.ratio(EXACT, FLOOR)
    return (
        f"The first is {'reached' if speedup >= 1.4 else 'missed'} ({speedup:.2f}), "
        f"the second {'reached' if distance <= 1.7 else 'missed'} ({distance:.2f}): oneDNN's products alone take "
        f"{half.ratio(PRODUCTS, FLOOR):.2f} times as long as the reading, "
        f"{100 * half.ratio(PRODUCTS, EXACT):.0f} % of the pass; the rest is attention and some 80 small operations a "
        "layer."
    )


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contestant")
    options = parser.parse_args()
    check_outputs(options.output)
    source = open_model(DEFAULT_MODEL)
    options.output.write_text(page([measure(source, dtype, rounds=options.rounds) for dtype in DTYPES]))
    diagnostic(f"wrote {options.output}")


if __name__ == "__main__":
    main()
