"""Which layers go to which stage."""

from functools import partial

from backends.models.config import ModelConfig
from pipesim.errors import BadInputError
from pipesim.hardware.placement import place_layers


def split_layers(config: ModelConfig, stages: int) -> tuple[int, ...]:
    """Layers per stage, in order, such that the heaviest stage has as few parameters as can be.

    The LM head counts, on the last stage: it is 21 % of SmolLM2-135M. The embedding is looked up, not computed.

    Raises:
        BadInputError: there are more stages than layers.
    """
    if not 1 <= stages <= config.layers:
        raise BadInputError(f"--stages {stages}: the model has {config.layers} layers, use 1 to {config.layers} stages")
    attention = config.hidden * config.qkv_width + config.heads * config.head_dim * config.hidden
    layer = attention + 3 * config.hidden * config.intermediate
    head = config.vocabulary * config.hidden

    def weight(extra: int, layers: int) -> int:
        return layers * layer + extra

    return place_layers(config.layers, [partial(weight, 0)] * (stages - 1) + [partial(weight, head)])
