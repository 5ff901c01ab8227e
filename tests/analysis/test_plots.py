from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from scenario_builder import build
from typer.testing import CliRunner

from analysis.plots import BUBBLE, DRAFT, FATES, VAIN_DRAFT, plot_timeline, plot_timelines
from pipesim.cli.commands import app
from pipesim.scheduling.commands import Outcome
from pipesim.simulation.pipeline import simulate
from pipesim.trace import Fate, Trace

DEMO = str(Path(__file__).parents[2] / "scenarios" / "demo.yaml")


def drawn(tmp_path: Path, *traces: Trace, window: tuple[float, float] | None = None) -> str:
    """The picture as SVG, text as text."""
    path = tmp_path / "t.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        if len(traces) == 1:
            plot_timeline(traces[0], path, window)
        else:
            plot_timelines({trace.policy: trace for trace in traces}, path, window)
    return path.read_text()


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_a_timeline_is_drawn(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"t.{ending}"
    plot_timeline(simulate(build("policy.always_canonical=true")), path)
    assert path.stat().st_size > 10_000


def test_a_trace_without_drafts_has_neither_drafts_nor_speculation_in_its_picture(tmp_path: Path) -> None:
    plain = drawn(tmp_path, simulate(build("policy.name=autoregressive", "workload.max_new_tokens=2")))
    assert ">prefill<" in plain
    assert ">canonical<" in plain
    assert ">drafter<" not in plain
    assert ">drafting<" not in plain
    assert ">speculative, accepted<" not in plain
    full = drawn(tmp_path, simulate(build()))
    for word in ("drafter", "drafting", "speculative, accepted", "bubble", "all tokens at the user"):
        assert f">{word}<" in full


def test_everything_has_a_colour_of_its_own() -> None:
    colours = [colour for _, colour in FATES.values()] + [DRAFT, VAIN_DRAFT, BUBBLE]
    assert len(set(colours)) == len(colours)
    assert FATES.keys() == set(Fate)


def test_fates_tell_apart_what_became_of_runs() -> None:
    shown = {
        run.fate
        for sets in (["policy.cancellation=false", "policy.always_canonical=true"], ["policy.partitions=4"])
        for run in simulate(build(*sets)).runs
    }
    assert shown == set(Fate) - {Fate.DRAINED}
    run = simulate(build()).runs[-1]
    assert replace(run, outcome=Outcome.DRAINED).fate is replace(run, outcome=None).fate is Fate.DRAINED


def test_a_window_shows_what_happens_in_it_and_numbers_its_runs(tmp_path: Path) -> None:
    trace = simulate(build("cluster.prefill_chunk=4"))
    assert trace.finished_s is not None
    decoding = trace.runs[3].submitted_s
    early = drawn(tmp_path, trace, window=(0.0, 0.04))
    assert ">prefill<" in early
    assert ">canonical<" not in early
    assert ">all tokens at the user<" not in early
    late = drawn(tmp_path, trace, window=(decoding + 0.05, decoding + 0.1))
    assert ">prefill<" not in late
    spans = [span for span in trace.spans if span.start_s > decoding + 0.05 and span.end_s < decoding + 0.1]
    wide = [span for span in spans if span.end_s - span.start_s > 0.01]
    assert wide
    for span in wide:
        assert f">{span.run_id}<" in late


def test_several_tokens_at_once_are_told_by_their_number(tmp_path: Path) -> None:
    trace = simulate(build("policy={name: speculative, max_nodes: 11, split: 1}", "acceptance.rate=1"))
    assert ">12<" in drawn(tmp_path, trace)


def test_policies_stand_one_above_the_other_on_one_axis_with_one_legend(tmp_path: Path) -> None:
    traces = [simulate(build(f"policy.name={name}")) for name in ("autoregressive", "speculative", "pipeinfer")]
    picture = drawn(tmp_path, *traces)
    assert picture.count("time since the prompt was submitted") == 1
    assert picture.count(">canonical<") == 1
    for trace in traces:
        assert picture.count(f">{trace.policy}: {len(trace.tokens)} tokens") == 1
    assert drawn(tmp_path, *traces) == picture


def test_a_window_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.svg", tmp_path / "part.svg"
    short = ["simulate", DEMO, "--set", "workload.max_new_tokens=8"]
    assert CliRunner().invoke(app, [*short, "--plot", str(whole)]).exit_code == 0
    assert CliRunner().invoke(app, [*short, "--plot", str(part), "--plot-window", "0.1:0.2"]).exit_code == 0
    assert whole.read_bytes() != part.read_bytes()


@pytest.mark.parametrize("wrong", ["1", "2:1", "a:b", "1:1", "-1:2", "0:inf", "nan:2", "1:2:3"])
def test_a_window_that_is_none_is_refused_before_anything_is_simulated(wrong: str) -> None:
    result = CliRunner().invoke(app, ["simulate", DEMO, "--plot", "t.png", "--plot-window", wrong])
    assert result.exit_code == 2
    assert f"--plot-window {wrong}: give two times in seconds" in result.stderr
