from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from scenario_builder import build

from analysis.plots import _BUBBLE, _DRAFT, _VAIN_DRAFT, Fate, fate, plot_timeline
from pipesim.scheduling.commands import Outcome
from pipesim.simulation.pipeline import simulate


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_timeline_is_drawn(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"t.{ending}"
    plot_timeline(simulate(build("policy.always_canonical=true")), path)
    assert path.stat().st_size > 10_000


def test_a_trace_without_drafts_has_neither_drafts_nor_speculation_in_its_legend(tmp_path: Path) -> None:
    def words(*sets: str) -> str:
        path = tmp_path / "t.svg"
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
            plot_timeline(simulate(build(*sets)), path)
        return path.read_text()

    plain = words("policy.name=autoregressive", "workload.max_new_tokens=2")
    assert ">prefill<" in plain
    assert ">canonical<" in plain
    assert ">drafting<" not in plain
    assert ">speculative, accepted<" not in plain
    full = words()
    assert ">drafting<" in full
    assert ">speculative, accepted<" in full


def test_everything_has_a_colour_of_its_own() -> None:
    colours = [one.value[1] for one in Fate] + [_DRAFT, _VAIN_DRAFT, _BUBBLE]
    assert len(set(colours)) == len(colours)


def test_fates_tell_apart_what_became_of_runs() -> None:
    shown = {
        fate(run)
        for sets in (["policy.cancellation=false", "policy.always_canonical=true"], ["policy.partitions=4"])
        for run in simulate(build(*sets)).runs
    }
    assert shown == set(Fate) - {Fate.DRAINED}
    run = simulate(build()).runs[-1]
    assert fate(replace(run, outcome=Outcome.DRAINED)) is fate(replace(run, outcome=None)) is Fate.DRAINED
