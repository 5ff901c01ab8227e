"""Plain decoding: one token at a time through the whole pipeline."""

from dataclasses import dataclass

from pipesim.scheduling.generation import Generation
from pipesim.scheduling.policy import Policy, register


@register("autoregressive")
@dataclass(frozen=True, slots=True)
class Autoregressive(Policy):
    """No speculation: the reference for text, and the floor for speed."""

    def decide(self, generation: Generation) -> None:
        """Sends the newest token as soon as it is known."""
        if generation.root.run is None:
            generation.submit_canonical()
