from pathlib import Path

import pytest
import yaml
from laboratories import in_process, search_little
from scenario_builder import PLAIN, build
from typer import Typer
from typer.testing import CliRunner

from analysis.ablation import MECHANISMS, main, page, table
from pipesim.errors import BadInputError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    search_little(monkeypatch)


def test_the_page_has_both_rows_for_every_mechanism_and_states_the_gain() -> None:
    text = page(in_process(), Path("some.yaml"), build("workload.max_new_tokens=8"), range(1, 3))
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


def test_relative_speeds_are_paired_by_seed() -> None:
    scenario = build("workload.max_new_tokens=8", "policy.name=speculative")
    frame = in_process().measure({"one": scenario, "other": scenario}, range(4))
    assert list(frame["seed"]) == [0, 1, 2, 3] * 2
    assert frame["tokens/s"].nunique() > 1
    assert table(frame).splitlines()[3].count("| 1.000 ± 0.000 |") == 1


def test_a_recorded_trace_is_refused() -> None:
    scenario = build("acceptance={kind: trace, file: t.json}")
    with pytest.raises(BadInputError, match=r"acceptance\.kind"):
        page(in_process(), Path("some.yaml"), scenario, range(1, 3))


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
