"""Pages of results: all that is in the files, no network, broken files named."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
from in_process import InProcess
from observing import ACCEPTANCE
from scenario_builder import PLAIN, build

from analysis.comparison_page import comparison_page
from analysis.report import report_page
from pipesim.comparison import compare, predict
from pipesim.errors import BadInputError
from pipesim.metrics import compute_metrics
from pipesim.simulation.pipeline import simulate
from pipesim.sweep import run_points


def compared(policy: str = "pipeinfer") -> dict[str, object]:
    prediction = predict(build(f"policy.name={policy}", "cluster.links.jitter_ms=2"), ACCEPTANCE)
    figures = compare(prediction, prediction.others[:2], ACCEPTANCE.tokens)
    return {
        "scenario": "toy.yaml",
        "policy": policy,
        "seed": 3,
        "repeats": 2,
        "replays_identical": 2,
        "calibration": None,
        "metrics": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
    }


def test_comparisons_sweeps_and_generations_fit_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipesim.sweep.rows.find_engine", lambda name: InProcess())
    points = [
        {"policy.name": policy, "acceptance.rate": rate} for policy in ("speculative", "pipeinfer") for rate in (0, 0.9)
    ]
    run_points(PLAIN, points, repeats=2).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "both.json").write_text(json.dumps([compared(), compared("speculative")]))
    trace = simulate(build())
    one = {"policy": trace.policy, "seed": trace.seed, "tokens": [], "metrics": compute_metrics(trace).as_dict()}
    (tmp_path / "one.json").write_text(json.dumps(one))
    page = report_page([tmp_path / name for name in ("rows.parquet", "both.json", "one.json")])
    for expected in ("rows.parquet", "both.json (2)", "one.json", "tokens_per_second", "2 of 2 runs replayed"):
        assert expected in page
    assert page.count("<svg") == 3, "two figures of the sweep, one of all predictions"
    assert "src=" not in page
    assert "href=" not in page.replace('xlink:href="#', "")
    assert page == report_page([tmp_path / name for name in ("rows.parquet", "both.json", "one.json")])


def test_a_comparison_s_page_has_both_timelines_on_one_axis() -> None:
    trace = simulate(build())
    page = comparison_page(compared(), {"predicted": trace, "measured": trace}, "how <it> was done")
    first, second = page.split('<svg class="timeline"')[1:]
    assert first.split("</svg>")[0] == second.split("</svg>")[0], "equal traces look alike"
    assert first.count("<rect") > len(trace.spans)
    assert "how &lt;it&gt; was done" in page
    assert "verdict" in page


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", "no results are in it"),
        ("a.json", "not json", "cannot be read as results"),
        ("missing.json", None, "cannot be read as results"),
        ("a.parquet", "nonsense", "cannot be read as Parquet"),
    ],
)
def test_what_holds_no_results_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(BadInputError, match=message):
        report_page([tmp_path / name])


def test_other_tables_are_refused(tmp_path: Path) -> None:
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(BadInputError, match="no sweep's rows"):
        report_page([tmp_path / "x.parquet"])
