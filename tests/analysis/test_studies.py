from pathlib import Path

import pytest
from laboratories import in_process, search_little
from typer import Typer
from typer.testing import CliRunner

from analysis.studies.__main__ import SCENARIOS, answer, header, index, main, names, page
from analysis.studies.bench import Bench
from analysis.studies.limit import _starts
from analysis.tuning import METHOD
from pipesim.errors import BadInputError
from pipesim.scenario_file import load_scenario
from pipesim.simulation.pipeline import simulate


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    search_little(monkeypatch)


def test_every_study_has_a_scenario_and_every_page_is_of_a_study() -> None:
    modules = {path.stem.replace("_", "-") for path in Path("analysis/studies").glob("*.py")}
    assert set(names()) == modules - {"--init--", "--main--", "bench"} - SHARED
    scenarios = tuple(path.stem for path in SCENARIOS.glob("*.yaml"))
    for path in Path("docs/studies").iterdir():
        assert path.stem == "README" or path.stem.startswith(scenarios), f"{path} answers no scenario's question"


SHARED = {"clusters", "limit"}
"""Modules of the package that several studies use."""


@pytest.mark.parametrize("name", names())
def test_every_study_answers_its_question(small: None, name: str, tmp_path: Path) -> None:
    bench = Bench(in_process(), SCENARIOS / f"{name}.yaml", quick=True)
    finding = answer(bench, name)
    finding.picture.savefig(tmp_path / f"{name}.png", dpi=20)
    text = page(name, bench, finding)
    assert "nan" not in text
    assert finding.answer.endswith(".")
    (tmp_path / f"{name}.md").write_text(text)
    question, _ = header(bench.path)
    assert f"| [{question}]({name}.md) | {finding.answer} |" in index(tmp_path)


def test_pages_are_not_older_than_their_questions_and_the_ways_to_answer_them() -> None:
    """As far as a glance tells: figures are made anew by the command that stands on the page."""
    everywhere = f"seeds 1 to {Bench(in_process(), SCENARIOS).seeds[-1]}, where nothing else is said"
    for name in names():
        path = Path(f"docs/studies/{name}.md")
        text = " ".join(path.read_text().split()) if path.exists() else ""
        if text:
            question, context = header(SCENARIOS / f"{name}.yaml")
            assert text.startswith(f"# {question} **"), path
            assert context in text, path
            assert everywhere in text, path
            assert METHOD in text or "were tuned alike" not in text, path
    assert METHOD in " ".join(Path("docs/ablation.md").read_text().split())


def test_the_index_is_of_the_pages_that_are_there() -> None:
    assert Path("docs/studies/README.md").read_text() == index(Path("docs/studies"))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("* a falls below b under 2 ms.\n* b does over 5 ms.", "a falls below b under 2 ms. b does over 5 ms."),
        ("No two lines cross beyond chance.", "No two lines cross beyond chance."),
    ],
)  # fmt: skip
def test_the_index_has_what_a_sweep_says(tmp_path: Path, said: str, shown: str) -> None:
    (tmp_path / "network-degradation.md").write_text(f"# Network degradation\n\nWhy?\n\n{said}\n\nSpeed.\n")
    assert f"(network-degradation.md) | {shown} |" in index(tmp_path)


@pytest.mark.parametrize("name", names())
def test_every_scenario_file_can_be_simulated_as_it_is(name: str) -> None:
    assert simulate(load_scenario(SCENARIOS / f"{name}.yaml", ["workload.max_new_tokens=4"])).complete


def test_each_policy_also_climbs_from_where_the_other_got_to() -> None:
    places = {
        ((), "pipelined"): {"micro_batch": 8, "branches": 2, "p_accept": 0.0, "p_split": 0.15, "partitions": 6},
        ((), "synchronous"): {"max_nodes": 48, "branches": 24, "cutoff": 0.6, "split": 0.05},
    }
    assert _starts(places, (), "pipelined") == [
        places[(), "pipelined"],
        {"micro_batch": 48, "branches": 24, "p_accept": 0.6, "p_split": 0.05, "partitions": 6},
    ]
    assert _starts(places, (), "synchronous")[1] == {"max_nodes": 8, "branches": 2, "cutoff": 0.0, "split": 0.15}


def test_a_scenario_without_a_question_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("# Some machines.\nmodel: {}\n")
    with pytest.raises(BadInputError, match="asks no question"):
        header(tmp_path / "s.yaml")


def test_an_unknown_study_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    app = Typer(pretty_exceptions_enable=False)
    app.command()(main)
    result = CliRunner().invoke(app, ["-o", str(tmp_path), "nothing"])
    assert result.exit_code == 2
    assert "nothing: there is no such study, known are asynchronous-speculation" in result.stderr
