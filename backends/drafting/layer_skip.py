"""Self-speculation: the target model itself, without a few of its layers, drafts for the whole."""

from collections.abc import Collection

import torch

from backends.drafting.model import ModelDrafter
from backends.models.devices import Device
from backends.models.loading import ModelSource
from backends.models.stage_model import StageModel


def default_skipped(layers: int) -> tuple[int, ...]:
    """Layers 5, 12, 17 and 25 of SmolLM2's 30, the same depths of other models; never the first or the last layer."""
    return tuple(sorted({at * layers // 30 for at in (5, 12, 17, 25)} - {0, layers - 1}))


class LayerSkipDrafter(ModelDrafter):
    """Drafts with the target's own weights, ``skipped`` layers left out; it loads its own copy of the others.

    Source: Draft & Verify (arXiv 2309.08168), with a fixed set of layers.
    """

    def __init__(
        self,
        source: ModelSource,
        max_context: int,
        skipped: Collection[int] | None = None,
        dtype: torch.dtype | str = torch.float32,
        threads: int = 1,
        device: Device | None = None,
        kernels: str = "auto",
    ) -> None:
        layers = source.config.layers
        left_out = default_skipped(layers) if skipped is None else skipped
        super().__init__(StageModel(source, 0, layers, dtype, threads, left_out, device, kernels), max_context)
