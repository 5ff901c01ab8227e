"""Whether the native kernels can be used on this machine: they compile, and compute right and exactly."""

import functools
from collections.abc import Iterator

import numpy as np
import torch

from backends.models.blocks import Blocks
from backends.models.exact import cancelling_pair
from backends.models.native import library
from backends.models.native.weights import Arena, PackedMatrix
from backends.models.weights import Weight
from pipesim.errors import BadInputError

_ROWS, _OUTPUTS, _INPUTS = 14, 72, 352


@functools.cache
def kernels_refusal() -> str:
    """Why the native kernels cannot be used here; empty if they can."""
    try:
        library.load()
    except BadInputError as error:
        return str(error)
    wrong = next((name for name, weight in _samples() if not _is_right(weight)), None)
    return f"compiled here, they fail the self-check for {wrong} weights" if wrong else ""


def _samples() -> Iterator[tuple[str, Weight]]:
    """A small matrix of each kind that the kernels tell apart."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        yield str(dtype).removeprefix("torch."), cancelling_pair(_OUTPUTS, _INPUTS, dtype, generator)[1]
    draw = np.random.default_rng(0)
    for bits, block, scale_type in ((4, 32, np.float16), (8, 32, np.float16), (8, 16, np.float32)):
        low, high = (0, 15) if bits == 4 else (-127, 127)
        codes = draw.integers(low, high, (_OUTPUTS, _INPUTS), np.int8, endpoint=True)
        scales, minima = draw.normal(size=(2, _OUTPUTS, _INPUTS // block)).astype(scale_type)
        yield f"{bits}-bit", Blocks(codes, scales, minima if bits == 4 else None, bits)


def _is_right(weight: Weight) -> bool:
    """Whether every row comes out the same alone and among others, and about as it should."""
    rows = torch.randn(_ROWS, _INPUTS, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    matrix = PackedMatrix(weight, Arena())
    together = matrix.product(rows)
    if not all(torch.equal(matrix.product(rows[:count]), together[:count]) for count in range(1, _ROWS)):
        return False
    values = torch.from_numpy(weight.values()) if isinstance(weight, Blocks) else weight.float()
    expected = rows.double() @ values.double().T
    scale = rows.double().abs() @ values.double().abs().T
    return bool(((together - expected).abs() <= 1e-5 * scale).all())
