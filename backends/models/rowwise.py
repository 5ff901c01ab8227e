"""What happens to each row by itself: normalisation, and the MLP's activation."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square normalisation over the last dimension (arXiv 1910.07467)."""
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """The MLP's hidden rows ``[rows, intermediate]``: its gate's activation times the other half of ``gate_up``."""
    gate, up = gate_up.chunk(2, -1)
    return _ACTIVATIONS[activation](gate) * up
