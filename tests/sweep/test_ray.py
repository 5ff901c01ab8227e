"""The same sweep on a Ray cluster: one that is started on this machine."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import InProcess
from test_engines import halve
from test_run_points import BASE, POINTS

from pipesim.errors import PipesimError
from pipesim.sweep import engines, run_points
from pipesim.sweep.engines import run_ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="SKIPPED: ray is not installed, use pip install '.[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Ray's workers import test_engines, too
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def test_rows_are_byte_for_byte_those_of_this_machine(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "run_local", InProcess())
    for engine in ("local", "ray"):
        run_points(BASE, POINTS, repeats=2, engine=engine, jobs=2).to_parquet(tmp_path / engine)
    assert (tmp_path / "ray").read_bytes() == (tmp_path / "local").read_bytes()


@pytest.mark.slow  # Ray starts another worker, which takes it seconds, for each that dies
def test_what_raises_or_kills_its_worker_costs_one_item(cluster: None) -> None:
    done = list(run_ray(halve, range(12)))
    assert {i: value for i, value, error in done if error is None} == {i: i / 2 for i in (0, 1, 2, 4, 6, 8, 10, 11)}
    errors = {i: error for i, _, error in done if error}
    assert errors[3] == "ValueError: three is odd"
    assert errors[7] == errors[9] == "its worker process died (WorkerCrashedError)"


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PipesimError, match=r"pip install 'pipesim\[ray\]'"):
        list(run_ray(halve, range(2)))
