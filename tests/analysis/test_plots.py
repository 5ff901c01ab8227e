from dataclasses import replace
from pathlib import Path

import pytest
from scenario_builder import build

from analysis.plots import Fate, fate, plot_timeline
from pipesim.scheduling.commands import Outcome
from pipesim.simulation.pipeline import simulate


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_timeline_is_drawn(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"t.{ending}"
    plot_timeline(simulate(build("policy.always_canonical=true")), path)
    assert path.stat().st_size > 10_000


def test_a_part_can_be_cut_out(tmp_path: Path) -> None:
    plot_timeline(simulate(build()), tmp_path / "t.png", start_s=0.1, end_s=0.3)


def test_a_trace_without_drafts_can_be_drawn(tmp_path: Path) -> None:
    plot_timeline(simulate(build("policy.name=autoregressive", "workload.max_new_tokens=1")), tmp_path / "t.png")


def test_fates_tell_apart_what_became_of_runs() -> None:
    shown = {
        fate(run)
        for sets in (["policy.cancellation=false", "policy.always_canonical=true"], ["policy.partitions=4"])
        for run in simulate(build(*sets)).runs
    }
    assert shown == set(Fate) - {Fate.DRAINED}
    run = simulate(build()).runs[-1]
    assert fate(replace(run, outcome=Outcome.DRAINED)) is fate(replace(run, outcome=None)) is Fate.DRAINED
