"""The degradation study: what is measured, what is kept, and what the page makes of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from laboratories import in_process, search_little

from analysis import degradation
from analysis.degradation import Planned, coarse, decisions, measure, missing, scenario_of, tuned
from analysis.degradation_page import BASE, Setting, by_setting, error, figure, gains, page, setting_of
from pipesim.errors import InvariantError
from pipesim.executors import RealResult, find_executor
from pipesim.scenario import Scenario
from pipesim.simulation.pipeline import simulate
from pipesim.summary import summarise
from pipesim.sweep.journal import Journal
from pipesim.trace import PaceSample

POLICY: dict[str, dict[str, Any]] = {"speculative": {"name": "speculative"}, "pipeinfer": {"name": "pipeinfer"}}
SETTINGS = dict.fromkeys(("0", "0.3", "0.6", "0.8", "0.95"), POLICY)


def row(policy: str, measured: float, predicted: float, rate: float = 0.8, **changes: Any) -> dict[str, Any]:
    figures = {"ttft_s": 0.2, "itl_s.p50": 0.0, "itl_s.p95": 0.1}
    return {
        **asdict(Setting(*BASE, rate, policy)),
        "seed": 1,
        "measured": {"tokens_per_second": measured, **figures},
        "predicted": {"tokens_per_second": predicted, **figures},
        "kept": True,
        "problems": [],
        "replay_identical": True,
        "decided_as_predicted": True,
        "attempt": 2,
        "late_p95_ms": 1.2,
        "date": "2026-11-23T05:30:00+00:00",
        **changes,
    }


def test_the_grid_is_what_issue_5_asks_for() -> None:
    settings = coarse()
    assert len(set(settings)) == len(settings) >= 24
    assert {one.policy for one in settings} == set(degradation.POLICIES)
    assert {one.acceptance for one in settings if (one.share, one.latency_ms) == BASE} == set(degradation.ACCEPTANCES)
    assert (0.01, 20.0) in {(one.share, one.latency_ms) for one in settings}, "10 Mbit/s and 20 ms"
    assert {one.drafter_ms for one in settings} == {2.0, 4.0, 10.0}, "2 to 10 ms"
    assert {scenario_of(one, SETTINGS, 1).cluster.drafter.level_ms for one in settings} == {2.0, 4.0, 10.0}
    assert [setting_of(asdict(one)) for one in settings] == settings
    for setting in settings:
        assert len(scenario_of(setting, SETTINGS, 1).stages()) == 8


def test_at_acceptance_0_policies_have_the_settings_of_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    search_little(monkeypatch)
    monkeypatch.setattr(degradation, "ACCEPTANCES", (0.0, 0.3))
    found = tuned(in_process())
    assert found["0"] == found["0.3"]
    assert found["0"]["pipeinfer"]["calibrated"]


def test_what_was_not_measured_or_lost_its_pace_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    few = coarse()[:3]
    monkeypatch.setattr(degradation, "coarse", lambda: few)
    names = [f"{one.name}, seed {seed}" for seed in (1, 2) for one in few]
    finished = {
        names[0]: {**asdict(few[0]), "kept": True, "attempt": 1},
        names[1]: {**asdict(few[1]), "kept": False, "attempt": 1},
    }
    left = [run.name for run in missing(finished, SETTINGS, 2)]
    assert left == [names[2], names[4], names[5], names[1], names[3]], "settings without a result, least tried first"


def simulated(late_s: float = 0.0, tokens: int | None = None) -> Callable[..., None]:
    """In the place of the executor: simulations whose stage is so late, of which the last one ends early."""

    def execute_all(scenarios: Sequence[Scenario], logs: Path, on_result: Callable[[int, RealResult], None]) -> None:
        for number, scenario in enumerate(scenarios):
            with (logs / f"run-{number}.jsonl").open("w") as events:
                trace = simulate(scenario, events)
            object.__setattr__(trace, "pace", (PaceSample("stage 0", 1.0, 1.02, 1.02 + late_s, False),) * 20)
            if tokens and number == len(scenarios) - 1:
                object.__setattr__(trace, "emissions", trace.emissions[:tokens])
            on_result(number, RealResult("", summarise(trace)))

    return execute_all


def planned() -> list[Planned]:
    found = []
    for policy in degradation.POLICIES:
        setting = Setting(*BASE, 0.8, policy)
        found.append(Planned(setting, 1, scenario_of(setting, SETTINGS, 1, tokens=6), {"e2e_s": 1.0}))
    return found


def test_a_run_is_kept_with_its_prediction_its_pace_and_its_replay(tmp_path: Path) -> None:
    with Journal.opened(tmp_path / "measured.jsonl") as journal:
        measure(journal, iter(planned()), 60, simulated(late_s=0.01), "tiny")
        measure(journal, iter(planned()), 60, simulated(), "tiny")
    with Journal.opened(tmp_path / "measured.jsonl") as journal:
        rows = list(journal.finished.values())
    assert [one["policy"] for one in rows] == list(degradation.POLICIES)
    for one in rows:
        assert one["measured"] == one["predicted"]
        assert (one["attempt"], one["kept"], one["replay_identical"], one["tokens"]) == (2, True, True, 6)
        assert one["decided_as_predicted"]


def test_decisions_are_compared_without_tokens_and_housekeeping() -> None:
    def log(*commands: dict[str, Any]) -> str:
        return json.dumps({"format": "pipesim-events"}) + "\n" + json.dumps({"commands": commands})

    def submitted(position: int, token: int, operations: int) -> dict[str, Any]:
        run = {"tokens": [token], "positions": [position], "kv_operations": [{}] * operations}
        return {"type": "SubmitRun", "run": run}

    one, over = log(submitted(5, 7, 1)), {"type": "EndRun", "run_id": 1}
    assert decisions(one) == decisions(log(over, submitted(5, 8, 0)))
    assert decisions(one) != decisions(log(submitted(6, 7, 1)))
    assert decisions(one) != decisions(log(submitted(5, 7, 1), {"type": "CancelRuns", "run_ids": [1]}))


def test_no_run_begins_that_does_not_fit_into_the_time() -> None:
    journal = Journal()
    measure(journal, iter(planned()), degradation._BRING_UP_S + 4, simulated(), "tiny")
    assert len(journal.finished) == 2


def test_another_text_is_no_measurement() -> None:
    with pytest.raises(InvariantError, match="another text"):
        measure(Journal(), iter(planned()), 60, simulated(tokens=2), "tiny")


def test_errors_are_of_runs_that_kept_their_pace_with_the_same_seeds() -> None:
    rows = [row("pipeinfer", 10, 11), row("pipeinfer", 20, 20, seed=2), row("pipeinfer", 1, 20, seed=3, kept=False)]
    (kept,) = by_setting(rows).values()
    assert error(kept, "tokens_per_second") == pytest.approx(31 / 30 - 1)
    assert error(kept, "itl_s.p50") is None, "most tokens come together"
    plain = row("autoregressive", 5, 5)
    told = dict(gains(by_setting([*rows, plain])))[0.8]
    assert told["autoregressive"] == (pytest.approx(2.0), pytest.approx(2.2)), "seeds that both have"
    assert told["speculative"] == (None, None)


def test_the_page_says_what_is_missing_and_what_is_missed() -> None:
    rows = [row("autoregressive", 5, 5), row("pipeinfer", 4.8, 5.6, rate=0.0)]
    rows.append(row("speculative", 3, 6, kept=False, problems=["stage 3: one in twenty was 9 ms late"], late_p95_ms=9))
    text = page(rows, coarse(), 2, SETTINGS, "degradation")
    flat = " ".join(text.split())
    assert f"Measured: 2 of {len(coarse())} settings, 2 of {2 * len(coarse())} runs" in flat
    assert "did not keep the emulated cluster's pace in their last attempt: 1." in flat
    assert f"{2 * len(rows)} attempts in all, 2 at most for one run" in flat
    assert f"Settings still missing: {len(coarse()) - 2};" in flat
    assert "95 % was at most 1.2 ms late (median of runs; 1.2 ms in the worst)" in flat, "of kept runs"
    assert "At acceptance 0 it has 0.960 of plain decoding's speed: **slower than** the 0.97." in flat
    assert "stage 3: one in twenty was 9 ms late" in text
    speed, with_late_runs = (line for line in text.splitlines() if line.startswith("| tokens/s "))
    assert "+16.7%" in speed
    assert "**no**" in speed
    assert "+100.0%" in with_late_runs
    empty = page([], coarse(), 2, SETTINGS, "degradation")
    assert f"Measured: 0 of {len(coarse())} settings" in empty


def test_the_figure_has_lines_bands_points_and_rings() -> None:
    lines = [
        {**asdict(Setting(share, 0.1, 0.8, "pipeinfer")), "mean": 9.0, "low": 8.0, "high": 10.0} for share in (0.1, 1.0)
    ]
    picture = figure(lines, [row("pipeinfer", 8.5, 9.0)])
    assert len(picture.axes) == 10
    marked = [one for axes in picture.axes for one in axes.lines if one.get_markerfacecolor() == "none"]
    assert [list(one.get_ydata()) for one in marked] == [[9.0], [9.0]], "on the base link: in both rows"


@pytest.mark.slow
def test_a_real_run_of_the_study(tmp_path: Path) -> None:
    from backends.models.random_models import save_talker

    stand_in, journal = str(save_talker(tmp_path / "stand-in")), Journal()
    measure(journal, iter(planned()), 600, find_executor().execute_all, stand_in)
    assert len(journal.finished) == 3
    for one in journal.finished.values():
        assert one["replay_identical"]
        assert one["decided_as_predicted"]
        assert one["measured"]["ttft_s"] >= one["predicted"]["ttft_s"] - 1e-6, "nothing is early"
