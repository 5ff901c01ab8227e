"""An engine for sweeps that starts no process, so that tests are fast."""

from collections.abc import Iterator, Sequence
from typing import Any

from pipesim.sweep.engines import Done, attempt


class InProcess:
    """Computes the last item first; ``runs`` counts the items."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, function: Any, items: Sequence[Any], jobs: int | None = None) -> Iterator[Done]:
        for index in reversed(range(len(items))):
            self.runs += 1
            yield attempt(function, index, items[index])
