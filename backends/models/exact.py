"""Row tiles: how a token's logits come out bit for bit the same, whichever rows are computed beside it.

A matrix product picks its kernel, and with it the order of its sums, by its shape. Decode rows are therefore computed
in tiles of a few chosen sizes whose results were found to agree on this machine, for every matrix of the model.
Measured, float32, plain weights and one thread: on one CPU tiles of 2 to 8 rows agree, on another only 4 to 8; a single
row differs on both; prepacked, 2 to 16 agree. So kernel and sizes are found by a check at start-up, not written down.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from backends.models.config import ModelConfig
from backends.models.devices import CPU
from backends.models.products import Kernel, Matrix, available_kernels, lay_out
from backends.models.rowwise import gated, rms_norm
from pipesim.errors import BadInputError

CANDIDATES = {Kernel.PREPACKED: (1, 4, 6, 8, 12, 16), Kernel.PLAIN: (1, 2, 3, 4, 5, 6, 7, 8)}
"""Row counts that a tile may have, if the check finds them to agree. Prepacked, 4 rows take no longer than 2 or 3."""

LARGEST_TILE = max(max(sizes) for sizes in CANDIDATES.values())
"""Rows per tile at most."""

BLOCK = 64
"""Positions per attention block."""

BATCHED_BLOCKS = 16
"""Attention blocks that are multiplied in one batch, at most."""

_PROBED_OUTPUTS = 65_536  # a wider LM head is probed on its first outputs only

RowProduct = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Tiling:
    """The row counts that decode rows may be computed in, ascending, and the kernel of all matrix products.

    Smaller batches are padded up to one of ``sizes``.
    """

    sizes: tuple[int, ...]
    kernel: Kernel = Kernel.PLAIN

    def split(self, rows: int) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Cuts ``rows`` into tiles: the padded row count, and each tile's ``(start, stop)``."""
        largest, start, bounds = self.sizes[-1], 0, []
        while rows - start > 0:
            stop = start + next((size for size in self.sizes if size >= rows - start), largest)
            bounds.append((start, stop))
            start = stop
        return start, tuple(bounds)

    def __str__(self) -> str:
        return f"row tiles of {', '.join(map(str, self.sizes))}, {self.kernel.value}"


def pad_rows(rows: torch.Tensor, padded: int) -> torch.Tensor:
    """``rows`` with zero rows added at the end, ``padded`` in total."""
    return rows if padded == rows.shape[0] else F.pad(rows, (0, 0, 0, padded - rows.shape[0]))


def float_product(tile: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """A tile's rows times ``matrix``, float32 in and out whatever the matrix's type."""
    return matrix.product(tile.to(matrix.dtype)).float()


def joined(tiles: Sequence[torch.Tensor]) -> torch.Tensor:
    """All tiles' rows."""
    return tiles[0] if len(tiles) == 1 else torch.cat(tuple(tiles))


def choose_tiling(config: ModelConfig, dtype: torch.dtype, place: torch.device = CPU) -> Tiling:
    """The largest set of row counts that agree bit for bit on all that the whole model does to rows.

    That is with the first available kernel of which several row counts agree. It depends on the machine, its threads,
    the model and ``dtype``, not on the layers a stage holds nor on timing: every stage split computes alike. Takes
    about half a second for SmolLM2-135M; later calls in the process are free.

    Raises:
        BadInputError: no row count agrees even with itself, so that nothing is exact here.
    """
    return _choose_tiling(config, dtype, torch.get_num_threads(), place)


@functools.lru_cache
def _choose_tiling(config: ModelConfig, dtype: torch.dtype, threads: int, place: torch.device) -> Tiling:
    kernels = available_kernels(dtype, place)
    tilings = (Tiling(agreeing_sizes(config, dtype, kernel, place), kernel) for kernel in kernels)
    return next(tiling for tiling in tilings if tiling.kernel is kernels[-1] or len(tiling.sizes) > 1)


def agreeing_sizes(
    config: ModelConfig, dtype: torch.dtype, kernel: Kernel, place: torch.device = CPU
) -> tuple[int, ...]:
    """Those of the ``kernel``'s candidates that agree, ascending; the largest such set."""
    generator = torch.Generator().manual_seed(0)
    agreeing: list[tuple[int, ...]] = [CANDIDATES[kernel]]
    with torch.inference_mode():
        for product, probe in model_products(config, dtype, kernel, generator, place):
            agreeing = refined(agreeing, product, probe, generator, place)
            # A size that agrees with no other cannot win while others agree: spare the wide LM head, which comes last.
            agreeing = [sizes for sizes in agreeing if len(sizes) > 1] or agreeing
    return largest(agreeing)


def largest(agreeing: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The set with most row counts, of equal ones that with the largest. Raises BadInputError if there is none."""
    if not agreeing:
        raise BadInputError(
            "execution.dtype: no number of rows gives the same result twice in it on this device, so runs cannot give "
            "equal text: use another dtype or device"
        )
    return max(agreeing, key=lambda sizes: (len(sizes), sizes))


def model_products(
    config: ModelConfig, dtype: torch.dtype, kernel: Kernel, generator: torch.Generator, place: torch.device = CPU
) -> Iterator[tuple[RowProduct, torch.Tensor]]:
    """All that rows go through side by side, as functions of rows, each with a row to probe it by; one at a time."""
    yield from rowwise_functions(config, generator)
    yield from attention_products(config, generator, place)
    for outputs, inputs in (
        (config.qkv_width, config.hidden),
        (config.hidden, config.heads * config.head_dim),
        (2 * config.intermediate, config.hidden),
        (config.hidden, config.intermediate),
        (min(config.vocabulary, _PROBED_OUTPUTS), config.hidden),
    ):
        probe, weight = cancelling_pair(outputs, inputs, dtype, generator)
        yield lay_out(weight.to(place), kernel).product, probe


def refined(
    agreeing: list[tuple[int, ...]],
    product: RowProduct,
    probe: torch.Tensor,
    generator: torch.Generator,
    place: torch.device = CPU,
) -> list[tuple[int, ...]]:
    """Splits each set of row counts into those that agree on ``product``, too."""
    refined: list[tuple[int, ...]] = []
    noise = torch.randn(LARGEST_TILE, probe.shape[0], generator=generator).to(probe.dtype).to(place)
    probe = probe.to(place)
    results = {size: probe_result(product, probe, noise, size) for sizes in agreeing for size in sizes}
    for sizes in agreeing:
        left = [size for size in sizes if results[size] is not None]
        while left:
            alike = tuple(size for size in left if _equal(results[size], results[left[0]]))
            refined.append(alike)
            left = [size for size in left if size not in alike]
    return refined


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def probe_result(product: RowProduct, probe: torch.Tensor, noise: torch.Tensor, size: int) -> torch.Tensor | None:
    """``product`` of ``probe`` within ``size`` rows, or None where its place or the other rows change it."""
    together = product(probe.expand(size, -1).contiguous())
    result = together[0].clone()
    if not torch.equal(together, result.expand_as(together)):
        return None
    mixed = noise[:size].clone()
    mixed[-1] = probe
    return result if torch.equal(product(mixed)[-1], result) else None


def cancelling_pair(
    outputs: int, inputs: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A row ``[inputs]`` and a weight ``[outputs, inputs]`` whose exact products are all zero.

    What a kernel returns for them is nothing but the rounding of its own order of summation, so two orders show at
    once; with ordinary numbers bfloat16 results hide most differences.
    """
    block, half = min(outputs, 512), inputs // 2
    weight = torch.zeros(block, inputs)
    row = torch.zeros(inputs)
    order = torch.randperm(inputs, generator=generator)
    weight[:, order[: 2 * half]] = torch.randn(block, half, generator=generator).repeat(1, 2)
    values = torch.randn(half, generator=generator)
    row[order[: 2 * half]] = torch.cat((values, -values))
    copies = -(-outputs // block)
    return row.to(dtype), weight.to(dtype).repeat(copies, 1)[:outputs].contiguous()


def rowwise_functions(config: ModelConfig, generator: torch.Generator) -> list[tuple[RowProduct, torch.Tensor]]:
    """Norms and activation: vectorised kernels may treat the end of a thread's share otherwise than its middle."""
    heads, width, name = config.heads + config.kv_heads, config.head_dim, config.family.activation

    def norm(rows: torch.Tensor) -> torch.Tensor:
        return rms_norm(rows, torch.ones(config.hidden, device=rows.device), config.norm_eps)

    def head_norms(rows: torch.Tensor) -> torch.Tensor:
        queries_and_keys = rows.view(len(rows), -1, width)[:, :heads]
        return rms_norm(queries_and_keys, torch.ones(heads, width, device=rows.device), config.norm_eps).flatten(1)

    def activation(rows: torch.Tensor) -> torch.Tensor:
        return gated(rows, name)

    gates = telling_values(lambda values: gated(torch.cat((values, torch.ones_like(values))), name), generator)
    gate = gates.repeat(-(-config.intermediate // len(gates)))[: config.intermediate]
    functions: list[tuple[RowProduct, torch.Tensor]] = [
        (norm, torch.randn(config.hidden, generator=generator)),
        (activation, torch.cat((gate, gate))),
    ]
    if config.family.qk_norm:
        functions.append((head_norms, torch.randn(config.qkv_width, generator=generator)))
    return functions


def telling_values(function: RowProduct, generator: torch.Generator) -> torch.Tensor:
    """Values that ``function`` rounds otherwise one at a time than many together, or any values if there are none.

    The last few values of a thread's share of an array are computed one at a time: these show where that is.
    """
    values = torch.randn(2048, generator=generator)
    alone = torch.cat([function(value) for value in values[:, None]])
    telling = values[function(values) != alone]
    return telling if len(telling) else values


def attention_products(
    config: ModelConfig, generator: torch.Generator, place: torch.device = CPU
) -> list[tuple[RowProduct, torch.Tensor]]:
    """The two products of one attention block (see ``attention.py``), as functions of rows, each with its probe."""
    group, kv_heads, width = config.group, config.kv_heads, config.head_dim
    query, key = cancelling_pair(kv_heads * BLOCK, width, torch.float32, generator)
    keys = key.to(place).view(kv_heads, BLOCK, width)
    weight, value = cancelling_pair(kv_heads * width, BLOCK, torch.float32, generator)
    values = value.to(place).view(kv_heads, width, BLOCK).transpose(1, 2).contiguous()

    def batched(rows: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """NaN where the product of a block depends on how many are in its batch: no size agrees then."""
        wide = rows.reshape(1, -1, blocks.shape[1]).repeat(kv_heads, 1, 1)
        few = torch.bmm(wide, blocks)
        for count in (2, 5, BATCHED_BLOCKS):
            many = torch.bmm(wide.repeat(count, 1, 1), blocks.repeat(count, 1, 1)).view(count, *few.shape)
            few = few.where((many == few).all(), torch.nan)
        return few.view(kv_heads, len(rows), -1).transpose(0, 1).flatten(1)

    def scores(rows: torch.Tensor) -> torch.Tensor:
        return batched(rows, keys.transpose(1, 2))

    def weighted(rows: torch.Tensor) -> torch.Tensor:
        return batched(rows, values)

    return [(scores, query.repeat(group)), (weighted, weight.repeat(group))]
