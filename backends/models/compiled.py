"""The decoder layer compiled by ``torch.compile``, where ``execution.kernels`` asks for it: two graphs for a row tile.

Attention, whose shape changes with the text, stays as it is; the shape of what comes before and after it is given by
the tile's row count alone. All layers share the graphs: weights are arguments. Inductor keeps them in its own folder.
"""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from backends.logs import event
from backends.models.config import ModelConfig
from backends.models.decoder import LayerForward, conclude, forward_layer, project
from backends.models.devices import Device
from backends.models.exact import Tiling
from backends.models.steps import agreeing_steps
from pipesim.errors import BadInputError

_log = logging.getLogger(__name__)
_GRAPHS = 1024
"""Of one function in one process, at most: PyTorch's own 8 do not suffice for a few models."""

_PROBES = 8
"""Rows that are compared: bfloat16 results hide most differences."""

_Half = TypeVar("_Half", bound=Callable[..., Any])


def compiled_layer(
    tiling: Tiling, config: ModelConfig, dtype: torch.dtype, device: Device
) -> tuple[Tiling, LayerForward]:
    """The compiled layer, and those of every other of the tiling's row counts with which it is exact.

    Raises:
        BadInputError: it cannot be compiled here, most likely for want of a C++ compiler, or is not exact.
    """
    began = time.monotonic()
    sizes = tiling.sizes[::-2][::-1]  # each takes seconds to compile
    _log.warning("compiling layers for tiles of %s rows, a minute or more the first time", ", ".join(map(str, sizes)))
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _GRAPHS
    layer_forward = functools.partial(forward_layer, before=_compiled(project, sizes), after=_compiled(conclude, sizes))
    try:
        tiling = agreeing_steps(Tiling(sizes, tiling.kernel), config, dtype, device, layer_forward, _PROBES)
    except BadInputError:
        raise BadInputError(
            "execution.kernels compile: what torch.compile makes of a layer is not exact here, no number of rows gives "
            "the same result twice: use auto or torch"
        ) from None
    except RuntimeError as error:
        raise BadInputError(
            f"execution.kernels compile: torch.compile fails here, use auto or torch: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    event(_log, logging.INFO, "layers compiled", seconds=round(time.monotonic() - began, 3))
    return tiling, layer_forward


def _compiled(half: _Half, sizes: tuple[int, ...]) -> _Half:
    """``half`` of a layer, compiled for tiles of ``sizes`` rows; others, prefill chunks, are computed as ever."""
    fast = torch.compile(half, fullgraph=True, dynamic=False)

    def chosen(rows: torch.Tensor, *others: Any) -> Any:
        return (fast if len(rows) in sizes else half)(rows, *others)

    return cast(_Half, chosen)
