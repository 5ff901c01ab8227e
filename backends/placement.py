"""Which layers go to which stage."""

from backends.models.config import ModelConfig
from pipesim.errors import BadInputError


def split_layers(config: ModelConfig, stages: int) -> tuple[int, ...]:
    """Layers per stage, in order, such that the heaviest stage has as few parameters as can be.

    The LM head counts, on the last stage: it is 21 % of SmolLM2-135M. The embedding is looked up, not computed.

    Raises:
        BadInputError: there are more stages than layers.
    """
    if not 1 <= stages <= config.layers:
        raise BadInputError(f"--stages {stages}: the model has {config.layers} layers, use 1 to {config.layers} stages")
    if stages == 1:
        return (config.layers,)
    attention = config.hidden * config.qkv_width + config.heads * config.head_dim * config.hidden
    layer = attention + 3 * config.hidden * config.intermediate
    head = config.vocabulary * config.hidden

    def heaviest(last: int) -> int:
        return max(-(-(config.layers - last) // (stages - 1)) * layer, last * layer + head)

    last = min(range(1, config.layers - stages + 2), key=lambda last: (heaviest(last), -last))
    each, more = divmod(config.layers - last, stages - 1)
    return (*(each + (stage < more) for stage in range(stages - 1)), last)
