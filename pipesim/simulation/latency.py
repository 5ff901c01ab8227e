"""Where the time went until a token was there: a gap between tokens, cut along the path of the run that brought it.

A run's *path* is the list of times at which it went on, each the end of one part of its life:

    the head heard what led to the run, took that up, submitted the run;
    for each link and the stage behind it: serialisation begins, ends, arrival, computation begins, ends;
    for the link home: serialisation begins, ends, arrival; then the head takes the result up, and shows the tokens.

Each part belongs to one component of ``trace.Latency``. What a gap holds of the time before the head heard of what led
to the run is the drafter's if that was a draft, and queueing otherwise (a run that waited for another one to return).
The parts of a gap sum up to it exactly: all times are whole nanoseconds, and each part ends where the next begins.
"""

from collections.abc import Sequence

from pipesim.trace import Latency

_QUEUEING, _COMPUTE, _SERIALISATION, _PROPAGATION, _HEAD, _DRAFTER = range(6)
_HOP = (_QUEUEING, _SERIALISATION, _PROPAGATION, _QUEUEING, _COMPUTE)


def path_parts(stages: int) -> tuple[int, ...]:
    """The component of each part of a path, after the first time, through so many stages."""
    home = (*_HOP[:-1], _HEAD)
    return (_QUEUEING, _HEAD, *(_HOP * stages), *home)


def decompose(path: Sequence[int], parts: Sequence[int], drafted: bool, since: int) -> Latency:
    """The gap from ``since`` to the end of ``path``, by component.

    Args:
        path: times in nanoseconds, ``len(parts) + 1`` of them, ascending.
        parts: see ``path_parts``.
        drafted: whether a draft led to the run.
        since: when the gap began.
    """
    spent = [0] * 6
    end = path[-1]
    for index in range(len(parts) - 1, -1, -1):
        start = path[index]
        if start <= since:
            spent[parts[index]] += end - since
            return Latency(*spent)
        spent[parts[index]] += end - start
        end = start
    spent[_DRAFTER if drafted else _QUEUEING] += end - since
    return Latency(*spent)
