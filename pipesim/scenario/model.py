"""The target model of a scenario."""

from pydantic import Field

from pipesim.scenario.section import Section


class Model(Section):
    """The target model."""

    name: str
    """What to load for real: a known name such as smollm2-135m, or a path. A label in simulation."""
    layers: int = Field(ge=1)
    """Transformer layers, spread over the stages."""
    hidden: int = Field(ge=1)
    """Width of the activations that travel between stages, in elements per row."""
    activation_bytes: int = Field(default=4, ge=1)
    """Bytes of one activation element on a link (4: float32)."""
    vocabulary: int = Field(default=32000, ge=3)
    """Number of token ids; simulated text draws from it."""
