"""Weight matrices as their kernel wants them. Which kernel it is, the start-up check in ``exact.py`` decides."""

import functools
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F  # noqa: N812

from backends.models.devices import CPU

PACKED_FOR_ROWS = 16
"""The row count that oneDNN lays out a prepacked weight for; it serves every other as well."""


class Kernel(Enum):
    """How rows meet a weight. One for all matrices of a model: other stages and recoveries must compute alike."""

    PREPACKED = "oneDNN, prepacked weights"
    PLAIN = "plain weights"


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight, ``[outputs, inputs]`` to the outside, laid out for ``kernel``."""

    kernel: Kernel
    dtype: torch.dtype
    shape: torch.Size
    weight: torch.Tensor

    def numel(self) -> int:
        """How many weights these are."""
        return self.shape.numel()

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ weight.T`` in the matrix's type, which is also that of ``rows``, ``[rows, inputs]``."""
        if self.kernel is Kernel.PLAIN:
            return F.linear(rows, self.weight)
        product: torch.Tensor = torch.ops.pipesim.prepacked_product(rows, self.weight)
        return product


def _prepacked_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return product


def _shape_of_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(len(rows), weight.shape[0])


# An operator of our own: torch.compile takes prepacked weights only as constants, and all layers share one graph.
_operators = torch.library.Library("pipesim", "DEF")  # type: ignore[no-untyped-call]
_operators.define("prepacked_product(Tensor rows, Tensor weight) -> Tensor")  # type: ignore[no-untyped-call]
_operators.impl("prepacked_product", _prepacked_product, "MkldnnCPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("pipesim::prepacked_product", _shape_of_product)


def lay_out(weight: torch.Tensor, kernel: Kernel) -> Matrix:
    """``weight`` ``[outputs, inputs]`` for ``kernel``; a prepacked one is a copy."""
    laid = weight
    if kernel is Kernel.PREPACKED:
        laid = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
    return Matrix(kernel, weight.dtype, weight.shape, laid)


@functools.cache
def available_kernels(dtype: torch.dtype, place: torch.device = CPU) -> tuple[Kernel, ...]:
    """The kernels that this build of PyTorch has on this machine for ``dtype`` at ``place``, the preferred one first.

    Prepacking is what torch.compile's freezing emits, but private to PyTorch: tried out, not looked up.
    """
    if place != CPU:
        return (Kernel.PLAIN,)
    weight, rows = (torch.linspace(-1, 1, 64 * count).view(count, 64).to(dtype) for count in (32, 3))
    try:
        with torch.inference_mode():
            product = lay_out(weight, Kernel.PREPACKED).product(rows)
            right = torch.allclose(product.float(), F.linear(rows, weight).float(), rtol=0.02, atol=1e-3)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        right = False
    return (Kernel.PREPACKED, Kernel.PLAIN) if right else (Kernel.PLAIN,)
