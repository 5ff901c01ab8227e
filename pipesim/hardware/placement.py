"""Which layers go to which stage: the slowest stage shall be as fast as can be."""

import heapq
from collections.abc import Callable, Sequence


def place_layers(
    layers: int, seconds: Sequence[Callable[[int], float]], room: Callable[[int, list[int]], bool] | None = None
) -> tuple[int, ...]:
    """Layers per stage, at least one each, such that the largest ``seconds[stage](layers of it)`` is smallest.

    Each layer in turn goes to the stage that has it done first; among equals, to the one with the fewest layers. That
    is exact if no stage gets faster by a further layer: before a layer is placed at a time T, every stage holds all
    layers that it can hold in less than T, so no placement whose maximum is below T has a place for this layer, too.
    What does not depend on the number of layers, such as an LM head, is part of ``seconds``.

    Args:
        layers: how many to place.
        seconds: per stage, the time of a run by the number of its layers; never falling.
        room: whether a stage's memory takes one more layer, given all stages' present numbers; None: always.

    Returns:
        Layers per stage, in order; fewer in total than ``layers`` if there is no room for more.
    """
    placed = [1] * len(seconds)
    waiting = [(time(2), 1, stage) for stage, time in enumerate(seconds)]
    heapq.heapify(waiting)
    left = layers - len(placed)
    while left > 0 and waiting:
        _, _, stage = heapq.heappop(waiting)
        if room is not None and not room(stage, placed):
            continue  # memory only fills up: it has no room later either
        placed[stage] += 1
        left -= 1
        heapq.heappush(waiting, (seconds[stage](placed[stage] + 1), placed[stage], stage))
    return tuple(placed)
