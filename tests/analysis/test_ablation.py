from pathlib import Path
from typing import Any

import pytest
import yaml
from scenario_builder import PLAIN, build
from typer import Typer
from typer.testing import CliRunner

import analysis.ablation as ablation
from analysis.ablation import HEATS, MECHANISMS, Laboratory, main, page, pipeinfer_grid, speculative_grid, table
from pipesim.errors import BadInputError
from pipesim.scheduling.policy import make_policy


class Pool:
    """Works in this process."""

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Any, jobs: Any, chunksize: int) -> Any:
        return map(function, jobs)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(ablation, "HEATS", ((range(90, 91), 2), (range(91, 93), 1)))
    monkeypatch.setattr(ablation, "CUTOFFS", (0.0,))
    monkeypatch.setattr(ablation, "SPLITS", (0.15,))


def test_the_page_has_both_rows_for_every_mechanism_and_states_the_gain() -> None:
    text = page(Path("some.yaml"), build("workload.max_new_tokens=8"), range(1, 3))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    both = [row for name in MECHANISMS for row in (name, f"{name}, retuned")]
    assert names == ["policy", "pipeinfer", *both, "speculative", "autoregressive"]
    assert "| 1.000 ± 0.000 |" in rows[1], "speeds are relative to the first row"
    assert len({row.count("|") for row in rows}) == 1
    assert "times as fast as synchronous speculation" in text
    for name in names[1:-1]:
        assert any(line.startswith(f"* {name}: ") and "micro_batch" in line for line in text.splitlines()) or (
            name == "speculative" and "* speculative: max_nodes" in text
        )


def test_settings_are_chosen_on_other_seeds_than_the_tables() -> None:
    used = [seed for seeds, _ in HEATS for seed in seeds]
    assert len(set(used)) == len(used)
    assert min(used) > 1000, "main takes at most 1000 seeds"


def test_the_fastest_settings_are_chosen() -> None:
    grid = [{"name": "speculative", "max_nodes": nodes} for nodes in (1, 4)]
    scenario = build("acceptance.rate=1", "cluster.drafter.level_ms=0")
    assert Laboratory(scenario, Pool()).tune(grid) == grid[1]  # type: ignore[arg-type]
    scenario = build("acceptance.rate=0", "cluster.drafter.level_ms=9")
    assert Laboratory(scenario, Pool()).tune(grid) == grid[0]  # type: ignore[arg-type]


def test_every_entry_of_the_grids_is_a_policy_and_stands_there_once() -> None:
    for grid in [speculative_grid(), *map(pipeinfer_grid, [{}, *MECHANISMS.values()])]:
        entries = list(grid)
        built = {str(make_policy(entry["name"], {k: v for k, v in entry.items() if k != "name"})) for entry in entries}
        assert len(built) == len(entries)


def test_relative_speeds_are_paired_by_seed() -> None:
    frame = Laboratory(build("workload.max_new_tokens=8"), Pool()).measure(  # type: ignore[arg-type]
        {"one": {"name": "speculative"}, "other": {"name": "speculative"}}, range(4)
    )
    assert list(frame["seed"]) == [0, 1, 2, 3] * 2
    assert frame["tokens/s"].nunique() > 1
    assert table(frame).splitlines()[3].count("| 1.000 ± 0.000 |") == 1


def test_a_recorded_trace_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"acceptance\.kind"):
        page(Path("some.yaml"), build("acceptance={kind: trace, file: t.json}"), range(1, 3))


@pytest.mark.parametrize(
    ("scenario", "output", "message"),
    [("none.yaml", "o.md", "none.yaml: the scenario cannot be read"), ("s.yaml", "no/o.md", "o.md: cannot be written")],
)
def test_errors_are_one_message_and_status_2(tmp_path: Path, scenario: str, output: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(PLAIN))
    app = Typer(pretty_exceptions_enable=False)
    app.command()(main)
    result = CliRunner().invoke(app, ["-o", str(tmp_path / output), "--scenario", str(tmp_path / scenario)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
