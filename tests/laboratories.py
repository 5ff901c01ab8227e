"""A laboratory that works in this process, and searches that are soon over."""

from concurrent.futures import Executor, Future
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
    """Tuning on one seed after the other, from one start, and only for big gains."""
    monkeypatch.setattr(tuning, "SEEDS", ((90,), (91,)))
    monkeypatch.setattr(tuning, "CLIMBS", 1)
    monkeypatch.setattr(tuning, "GAIN", 1.1)
