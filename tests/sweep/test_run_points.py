import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess
from pandas.testing import assert_frame_equal
from scenario_builder import PLAIN, build

from pipesim.acceptance_trace import FORMAT
from pipesim.errors import BadInputError
from pipesim.metrics import compute_metrics
from pipesim.scenario import Scenario
from pipesim.simulation.pipeline import simulate
from pipesim.sweep import cross, engines, parse_axis, run_points
from pipesim.sweep.rows import flatten

BASE = {**PLAIN, "workload": {"prompt_tokens": 8, "max_new_tokens": 12}}
POINTS = cross([parse_axis("policy.name=autoregressive,pipeinfer"), parse_axis("cluster.links.latency_ms=0.5,20")])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """Points are computed in this process."""
    engine = InProcess()
    monkeypatch.setattr(engines, "run_local", engine)
    return engine


def test_a_row_per_point_and_seed_with_what_was_varied_and_every_metric(here: InProcess) -> None:
    frame = run_points(BASE, POINTS, repeats=2)
    assert list(frame.columns[:4]) == ["policy.name", "cluster.links.latency_ms", "policy", "seed"]
    assert frame.columns[-1] == "error"
    assert frame["error"].isna().all()
    assert list(frame["seed"]) == [3, 4] * 4
    assert list(frame["policy"]) == ["autoregressive"] * 4 + ["pipeinfer"] * 4
    scenario = build("workload.max_new_tokens=12", "cluster.links.latency_ms=20", "seed=4")
    metrics = flatten(compute_metrics(simulate(scenario)).as_dict())
    assert {"tokens_per_second", "itl_s.p95", "runs.accepted", "stage_utilization.0"} <= set(metrics)
    last = frame.iloc[-1]
    assert {name: last[name] for name in metrics} == metrics


def test_rows_do_not_depend_on_jobs_or_on_what_was_done_first(request: pytest.FixtureRequest) -> None:
    by_one, by_three = (run_points(BASE, POINTS, repeats=2, jobs=jobs) for jobs in (1, 3))
    assert_frame_equal(by_three, by_one)
    request.getfixturevalue("here")
    assert_frame_equal(run_points(BASE, POINTS, repeats=2), by_one)


def kills_its_worker(scenario: Scenario) -> dict[str, Any]:
    if scenario.cluster.links.latency_ms == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"latency_s": {"twice": scenario.cluster.links.latency_ms / 500}}


def test_a_point_that_kills_its_worker_is_a_row_with_an_error() -> None:
    frame = run_points(BASE, POINTS, jobs=2, measure=kills_its_worker)
    assert list(frame["latency_s.twice"].isna()) == [False, True, False, True]
    assert (
        frame["error"][1] == frame["error"][3] == "its worker process died (killed by SIGKILL; perhaps memory ran out)"
    )
    assert frame["error"][[0, 2]].isna().all()


def test_a_point_that_is_no_scenario_is_a_row_with_an_error(here: InProcess) -> None:
    frame = run_points(BASE, [{"cluster.links.latency_ms": -1}, {"cluster.stages.9.repeat": 2}, {}], repeats=2)
    assert frame["error"].str.contains("cluster.links.latency_ms = -1").sum() == 2
    assert frame["error"].str.contains("'9' is not an index").sum() == 2
    assert list(frame["seed"]) == [3, 4] * 3
    assert frame["tokens_per_second"].notna().sum() == 2


def test_a_point_that_cannot_be_simulated_is_a_row_with_an_error(here: InProcess) -> None:
    frame = run_points(BASE, [{"cluster.kv_cells": 4}, {}])
    assert "kv_cells: 4 cells cannot hold" in frame["error"][0]
    assert frame["tokens_per_second"].notna()[1]


def test_a_sweep_without_a_single_scenario_is_refused() -> None:
    with pytest.raises(BadInputError, match="did you mean 'hidden'"):
        run_points(BASE, [{"model.hiden": 4}, {"model.hiden": 5}])


def test_a_finished_point_is_never_run_twice_and_a_failed_one_is(here: InProcess, tmp_path: Path) -> None:
    journal = tmp_path / "j"
    points = [*POINTS, {"cluster.kv_cells": 4}]
    first = run_points(BASE, points, journal=journal)
    assert here.runs == 5
    assert_frame_equal(run_points(BASE, points, journal=journal), first)
    assert here.runs == 6
    more = run_points(BASE, [*POINTS, {"cluster.links.latency_ms": 7}], repeats=2, journal=journal)
    assert here.runs == 6 + 6, "old points under the new seed, the new point under both"
    assert len(more) == 10


@pytest.mark.parametrize("moved", [{"cluster": {**BASE["cluster"], "prefill_window": 1}}, {"seed": 8}])
def test_a_changed_scenario_never_gets_old_rows(here: InProcess, tmp_path: Path, moved: dict[str, Any]) -> None:
    journal = tmp_path / "j"
    run_points(BASE, POINTS, journal=journal)
    frame = run_points({**BASE, **moved}, POINTS, journal=journal)
    assert here.runs == 8
    assert_frame_equal(frame, run_points({**BASE, **moved}, POINTS))


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_sweep_loses_nothing_that_finished(
    here: InProcess, tmp_path: Path, stopped_by: type[BaseException]
) -> None:
    journal = tmp_path / "j"

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise stopped_by

    with pytest.raises(stopped_by):
        run_points(BASE, POINTS, journal=journal, progress=stop)
    assert here.runs == 3
    with journal.open("ab") as file:
        file.write(b'{"point": "half a li')  # as a kill leaves it
    told: list[tuple[int, int]] = []
    frame = run_points(BASE, POINTS, journal=journal, progress=lambda done, total: told.append((done, total)))
    assert here.runs == 4
    assert told == [(3, 4), (4, 4)]
    assert_frame_equal(frame, run_points(BASE, POINTS))
    assert len([json.loads(line) for line in journal.read_text().splitlines()]) == 4


def test_a_journal_belongs_to_one_sweep_at_a_time_and_other_files_are_left_alone(tmp_path: Path) -> None:
    journal = tmp_path / "j"

    def again(done: int, total: int) -> None:
        with pytest.raises(BadInputError, match="another sweep writes to it"):
            run_points(BASE, [{}], journal=journal)

    run_points(BASE, [], journal=journal, progress=again)
    journal.write_text("precious\nnot ours")
    with pytest.raises(BadInputError, match="j:1: not a line of a sweep's journal"):
        run_points(BASE, [{}], journal=journal)
    assert journal.read_text() == "precious\nnot ours"


def test_paired_settings_are_columns_of_their_parts(here: InProcess) -> None:
    axis = parse_axis("policy=[{name: pipeinfer, micro_batch: 2}, {name: speculative, max_nodes: 6}]")
    frame = run_points(BASE, cross([axis]))
    assert list(frame.columns[:5]) == ["policy.name", "policy.micro_batch", "policy.max_nodes", "policy", "seed"]
    assert list(frame["policy"]) == ["pipeinfer", "speculative"]
    assert frame["policy.max_nodes"].isna()[0]
    assert frame["policy.max_nodes"][1] == 6


def test_each_policy_gets_the_settings_that_the_scenario_has_for_it(here: InProcess) -> None:
    base = {**BASE, "policies": {"pipeinfer": {"micro_batch": 2}, "speculative": {"max_nodes": 6}}}
    named = run_points(base, cross([parse_axis("policy.name=pipeinfer,speculative")]))
    axis = parse_axis("policy={name: pipeinfer, micro_batch: 2},{name: speculative, max_nodes: 6}")
    assert list(named["e2e_s"]) == list(run_points(BASE, cross([axis]))["e2e_s"])
    assert list(named["e2e_s"]) != list(
        run_points(BASE, cross([parse_axis("policy.name=pipeinfer,speculative")]))["e2e_s"]
    )


def test_lists_and_mixtures_of_types_are_json_text(here: InProcess) -> None:
    points = [{"cluster.links.hops": [{"hop": 1, "latency_ms": 9}], "execution.drafter": "ngram"}]
    frame = run_points(BASE, [*points, {"cluster.links.hops": [], "execution.drafter": "planted"}])
    assert list(frame["cluster.links.hops"]) == ['[{"hop": 1, "latency_ms": 9}]', "[]"]
    assert list(frame["execution.drafter"]) == ["ngram", "planted"]


def test_figures_that_a_row_has_not_are_missing_in_their_columns(here: InProcess) -> None:
    frame = run_points(BASE, cross([parse_axis("workload.max_new_tokens=1,12")]))
    assert "itl_s" not in frame
    assert list(frame["itl_s.p95"].isna()) == list(frame["tokens_per_second"].isna()) == [True, False]
    plain = run_points(BASE, [{"policy.name": "autoregressive"}])
    assert plain["acceptance_rate"].dtype == float
    assert plain["acceptance_rate"].isna().all()


def test_files_are_looked_for_in_the_folder_that_is_given(here: InProcess, tmp_path: Path) -> None:
    recorded = {"format": FORMAT, "prompt_tokens": [1], "tokens": [3, 4], "candidates": [[[3, 0.9]], [[4, 0.9]]]}
    (tmp_path / "t.json").write_text(json.dumps(recorded))
    base = {**BASE, "workload": {"max_new_tokens": 2}}
    frame = run_points(base, [{"acceptance": {"kind": "trace", "file": "t.json"}}], folder=tmp_path)
    assert frame["error"].isna().all(), frame["error"][0]
