"""A laboratory that works in this process, and searches that are soon over."""

from concurrent.futures import Executor, Future
from itertools import islice
from typing import Any

import pytest

from analysis import tuning
from analysis.laboratory import Laboratory
from pipesim.sweep.journal import Journal


class InProcess(Executor):
    """Works on jobs as they are submitted, and counts them."""

    def __init__(self) -> None:
        self.jobs = 0

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.jobs += 1
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def in_process() -> Laboratory:
    """A laboratory that forgets."""
    return Laboratory(InProcess(), Journal())


def search_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning without a climb: on one seed, the best of every sixteenth place of the grid."""
    coarse = tuning.Space.coarse
    monkeypatch.setattr(tuning.Space, "coarse", lambda space: islice(coarse(space), 0, None, 16))
    monkeypatch.setattr(tuning.Search, "climb", lambda search, place, seeds: place)
    monkeypatch.setattr(tuning, "SEEDS", ((90,), (90,)))
    monkeypatch.setattr(tuning, "CLIMBS", 1)
