"""What happens to each row by itself: normalisation, and the MLP's activation."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

_SHARED_FROM = 32_768  # values; PyTorch's at::internal::GRAIN_SIZE

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square normalisation over the last dimension (arXiv 1910.07467)."""
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """The MLP's hidden rows ``[rows, intermediate]``: its gate's activation times the other half of ``gate_up``.

    Never so many rows at once that threads share them: the last values of a thread's share, which may end anywhere in
    a row, are computed one at a time, and round differently.
    """
    gate, up = gate_up.chunk(2, -1)
    together, function = max(1, _SHARED_FROM // gate.shape[-1]), _ACTIVATIONS[activation]
    if gate.is_cuda or len(gate) <= together:
        return function(gate) * up
    return torch.cat([function(rows) for rows in torch.split(gate, together)]) * up
