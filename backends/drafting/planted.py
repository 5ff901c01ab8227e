"""A drafter that knows the text beforehand and errs on purpose, so that acceptance can be swept on real hardware."""

from collections.abc import Callable, Sequence

from backends.drafting.base import Context, Drafter
from pipesim.scheduling.tree import Candidate

Draw = Callable[[int], Sequence[tuple[bool, float]]]
"""What to propose at a position: per candidate, best first, whether it is the true token, and its confidence."""


class PlantedDrafter(Drafter):
    """Replays ``known`` (prompt and continuation), as ``draw(position)`` says right or wrong.

    Proposals depend on the position only, so every policy meets the same ones in whatever order it asks. Past the end
    of ``known`` it proposes nothing.
    """

    def __init__(self, known: Sequence[int], vocabulary: int, draw: Draw) -> None:
        super().__init__()
        self._known, self._vocabulary, self._draw = tuple(known), vocabulary, draw

    def candidates_after(self, context: Context, path: tuple[int, ...]) -> list[Candidate]:
        """The planted candidates at position ``len(context) + len(path)``."""
        position = len(context) + len(path)
        if position >= len(self._known):
            return []
        true = self._known[position]
        drawn = self._draw(position)
        # any other token is wrong; the distance from the true one keeps wrong candidates apart
        return [
            (true if right else (true + 1 + rank) % self._vocabulary, confidence)
            for rank, (right, confidence) in enumerate(drawn)
        ]
